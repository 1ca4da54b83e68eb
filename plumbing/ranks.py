"""The processes of a run that torchrun started on several GPUs or machines; without torchrun there is one.

    torchrun --nproc_per_node=8 train.py --config config.yml

Each rank samples responses to its shard of the questions and gathers those of the others. So every rank knows the whole
batch, and rewards, advantages, the loss's denominator and the metrics are those of one process. In the update each
takes its shard of the groups, and the gradients are all-reduced. Rank zero alone writes and prints.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_types import Episode
from plumbing.terminal import UserError, one_line
from qwen2_model import Qwen2

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group, where torchrun started several processes; of their errors one is shown, the first."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:  # the timeout must do for a rank that samples the longest responses, or saves a checkpoint
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{one_line(error)}: start all with torchrun, or unset WORLD_SIZE") from None
    try:
        yield
    except (UserError, OSError):
        with suppress(RuntimeError):  # the store is gone, with the process that kept it
            if world_size() > 1 and dist.distributed_c10d._get_default_store().add("failed", 1) > 1:
                raise SystemExit(2) from None  # it is the same error, or follows from the first
        raise
    if world_size() > 1:  # not after an error: the others may be gone
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def collective() -> Iterator[None]:
    """What all ranks do together: one that is lost is a UserError."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"rank {rank()} lost the others; --resume continues the run: {one_line(error)}") from None


def shard_of(length: int) -> slice:
    """This rank's part of a list of this length."""
    return slice(length * rank() // world_size(), length * (rank() + 1) // world_size())


def all_gather(mine: list[T]) -> list[T]:
    """The lists of all ranks, one after the other."""
    if world_size() == 1:
        return mine
    parts: list[Any] = [None] * world_size()
    with collective():
        dist.all_gather_object(parts, mine)
    return [each for part in parts for each in part]


def on_rank_zero(work: Callable[[], T]) -> T:
    """What `work` returns on rank zero, on every rank; an error that it raises is raised on all."""
    result: list[Any] = [None]
    if rank() == 0:
        try:
            result[0] = work()
        except (UserError, OSError) as error:
            result[0] = UserError(one_line(error))
    if world_size() > 1:
        with collective():
            dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def all_reduce_gradients(policy: Qwen2, sums: Tensor) -> None:
    """Replace every gradient, and `sums`, by its sum over all ranks."""
    if world_size() == 1:
        return
    with collective():
        dist.all_reduce(sums)
        for parameter in policy.parameters() if not is_sharded(policy) else ():  # FSDP2 has reduced its own
            if parameter.grad is None:  # a rank without rows
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            dist.all_reduce(parameter.grad)


# ---- Weights that do not fit on one GPU: FSDP2 ---------------------------------------------------------------


def shard_weights(policy: Qwen2, device: torch.device) -> None:
    """Shard every weight (FSDP2), in fp32; each layer is all-gathered in the policy's dtype while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in (*policy.layers, policy):
        precision = MixedPrecisionPolicy(policy.dtype, torch.float32, cast_forward_inputs=False)
        sharded: Any = fully_shard(module.float(), mesh=mesh, mp_policy=precision)
        sharded.set_gradient_divide_factor(1.0)  # gradients are summed, not averaged
        sharded.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else


def is_sharded(policy: Qwen2) -> bool:
    return hasattr(policy, "unshard")


def unsharded(tensor: Any) -> Tensor:
    """All of a DTensor, gathered from all ranks; any other tensor as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    with collective():  # a copy: where the ranks' parts differ it is a view of more, which safetensors refuses
        return tensor.full_tensor().clone()


def load_shard(target: Any, tensor: Tensor) -> None:
    """Copy a whole tensor into `target`; a DTensor takes this rank's shard of it."""
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        tensor = tensor.to(target.device)
        tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(tensor)


def unsharded_copy(policy: Qwen2) -> Qwen2:
    """A copy with all the weights, to sample with and to save; the policy itself where it is not sharded."""
    if not is_sharded(policy):
        return policy
    with torch.device("meta"):
        copy = Qwen2(policy.config)
    weights = {name: unsharded(weight.detach()).to(policy.dtype) for name, weight in policy.named_parameters()}
    copy.load_state_dict(weights, assign=True)
    copy.vocabulary = policy.vocabulary
    return copy


def pad_with_empty_batches(policy: Qwen2, batches: list[list[Episode]], filler: Episode) -> list[list[Episode]]:
    """`batches`, and where another rank has more, batches of weight zero: FSDP2's collectives need as many on each."""
    missing = max(all_gather([len(batches)])) - len(batches) if is_sharded(policy) else 0
    return batches + [[replace(filler, token_weight=0.0, advantage=0.0)]] * missing
