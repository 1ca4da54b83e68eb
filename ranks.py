"""The processes of a run that torchrun started on several GPUs or machines; without torchrun there is one.

    torchrun --nproc_per_node=8 train.py --config config.yml

Each process ("rank") samples responses to its share of the questions and hands them to all the others. So every rank
knows the whole batch, and rewards, advantages, the loss's denominator and the metrics are those of one process. In the
update each takes its share of the rows, and torch.distributed adds up the gradients. Rank 0 alone writes and prints.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_types import Episode, UserError
from qwen2_model import Qwen2

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # for a rank that samples the longest responses, or saves a checkpoint
LOST = "another process of this run has died or hangs (its own message says more); --resume continues the run"


@contextmanager
def ranks() -> Iterator[None]:
    """Meet the other processes, where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    yield
    if several():  # not after an error: the others may be gone
        dist.destroy_process_group()


def several() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if several() else 0


def count() -> int:
    return dist.get_world_size() if several() else 1


@contextmanager
def together() -> Iterator[None]:
    """What all ranks do at the same time: one that is lost is a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{LOST} ({str(error).partition(chr(10))[0]:.100})") from None


def share(length: int) -> slice:
    """This rank's part of a list of this length."""
    return slice(length * rank() // count(), length * (rank() + 1) // count())


def gather(mine: list[T]) -> list[T]:
    """The parts of all ranks, one after the other."""
    if not several():
        return mine
    parts: list[Any] = [None] * count()
    with together():
        dist.all_gather_object(parts, mine)
    return [each for part in parts for each in part]


def add_up(parameters: Iterable[torch.nn.Parameter], sums: torch.Tensor) -> None:
    """Replace `sums` and every gradient by its sum over all ranks."""
    if not several():
        return
    with together():
        dist.all_reduce(sums)
        for parameter in parameters:
            if not hasattr(parameter, "to_local"):  # FSDP2 has added up the others
                if parameter.grad is None:  # a rank without rows
                    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
                dist.all_reduce(parameter.grad)


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, for all ranks; so is a UserError that it raises."""
    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result[0] = work()
        except UserError as error:
            result[1] = str(error)
    if several():
        with together():
            dist.broadcast_object_list(result)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def largest(number: int) -> int:
    """The largest number that a rank gives."""
    return max(gather([number]))


# ---- Weights that do not fit on one GPU: FSDP2 -----------------------------------------------------------------


def shard(policy: Qwen2, device: torch.device, dtype: torch.dtype) -> None:
    """Leave each rank its part of every weight, in fp32; a layer is put together in `dtype` while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (count(),))
    for module in (*policy.layers, policy):
        rule = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        sharded: Any = fully_shard(module.float(), mesh=mesh, mp_policy=rule)
        sharded.set_gradient_divide_factor(1.0)  # gradients are added up, not averaged
        sharded.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else


def sharded(policy: Qwen2) -> bool:
    return hasattr(policy, "unshard")


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a weight or gradient, flat; all of it where it is not sharded."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1)


def whole(policy: Qwen2, dtype: torch.dtype) -> Qwen2:
    """A copy with all the weights, to sample with and to save; the policy itself where it is not sharded."""
    if not sharded(policy):
        return policy
    with torch.device("meta"):
        copy = Qwen2(policy.config)
    with together(), torch.no_grad():
        weights: dict[str, Any] = dict(policy.named_parameters())
        copy.load_state_dict({name: weight.full_tensor().to(dtype) for name, weight in weights.items()}, assign=True)
    copy.vocabulary = policy.vocabulary
    return copy


def whole_tensor(part: torch.Tensor, like: Any) -> torch.Tensor:
    """The whole flat tensor on rank 0, on the CPU; empty elsewhere. `part` is this rank's, laid out as `like` is."""
    from torch.distributed.tensor import DTensor

    layout = {"shape": like.shape, "stride": like.stride()}
    with together():
        tensor = DTensor.from_local(part.view_as(like.to_local()), like.device_mesh, like.placements, **layout)
        full = tensor.full_tensor().view(-1)
    return full.cpu() if rank() == 0 else full.new_empty(0)  # a machine's other ranks would fill its memory with copies


def whole_norm(norm: Any) -> float:
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def part_of(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """The part of a flat tensor that belongs to this rank; the tensor itself where `like` is not sharded."""
    if not hasattr(like, "to_local"):
        return tensor
    parts = tensor.view(like.shape).chunk(count())
    return parts[rank()].reshape(-1) if rank() < len(parts) else tensor[:0]


def as_many_on_each(policy: Qwen2, batches: list[list[Episode]], filler: Episode) -> list[list[Episode]]:
    """`batches`, and fillers that weigh nothing where another rank has more: all make FSDP2's passes together."""
    missing = largest(len(batches)) - len(batches) if sharded(policy) else 0
    return batches + [[replace(filler, token_weight=0.0, advantage=0.0)]] * missing
