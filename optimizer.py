"""AdamW that keeps every bit of the update, whatever the dtype of the weights.

A bf16 weight of 0.02 has neighbours 0.0001 away. A step of 1e-6 is far below half of that, so added in bf16 it rounds
to nothing: at GRPO's learning rates plain bf16 AdamW loses nearly all of its update. The weights need more bits than
the forward pass reads, and there is a choice of where to keep them:

    mode          bytes a parameter, beside weight and gradient     for
    master        fp32 weight, fp32 moments: 12 (fp32 weights: 8)   small models, and any on the CPU
    split         16 bits that bf16 lacks, bf16 moments: 6           3B on 48 GB
    offload       as master, but in pinned host memory: 0 on GPU    3B on 24 GB

Gradients of bf16 weights accumulate in fp32 (4 bytes): adding up 128 micro-batches in bf16 would cost the gradient
about 1.2 % of its length. Only the head's chunks within one micro-batch (grpo.py) add up in bf16, 16 of them at most.

`split` is exact: bf16 is the upper half of an fp32 number, so a bf16 weight and its 16-bit difference from the fp32
number *are* an fp32 master weight, at half the price. Its bf16 moments are rounded stochastically: with beta2 = 0.999
one step changes the second moment by less than half a bf16 spacing, so rounding to nearest would never let it decay.

`tensors()` and `steps` are the state to save; the learning rate is set from outside, before each step.

Left out: parameter groups with settings of their own, and 8-bit moments.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from data_types import TrainSettings

SLICE = 2**24  # elements updated at a time: temporaries of a whole embedding are gigabytes


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then constant, or a half cosine down to a tenth."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, progress)))


def split_bits(exact: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as (nearest bf16, int16 of the bits between the two): together they hold all of it."""
    bits = exact.view(torch.int32)
    upper = (bits + 0x8000) >> 16  # to the nearest bf16: the rest is signed
    rest = bits - (upper << 16)  # -32768 to 32767
    return upper.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def join_bits(upper: Tensor, rest: Tensor) -> Tensor:
    """The fp32 tensor that `split_bits` took apart."""
    return ((upper.view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)).view(torch.float32)


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 of an fp32 tensor, up or down with the probability that makes it right on average."""
    noise = torch.randint(0, 2**16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    return ((exact.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


class AdamW:
    """AdamW (arXiv 1711.05101, algorithm 2) for parameters that are all fp32 or all bf16; see the table above."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], settings: TrainSettings, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: of the weights in a checkpoint; sharded weights are fp32 here and so their own masters."""
        self.parameters, self.settings, self.dtype = list(parameters), settings, dtype
        self.learning_rate, self.steps = settings.learning_rate, 0
        self.device = self.parameters[0].device
        self.rounding = torch.Generator(self.device)
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32  # autograd casts and accumulates in fp32
        self.states = [self._new_state(parameter.detach()) for parameter in self.parameters]

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        if self.settings.optimizer == "split":
            dtypes = {"rest": torch.int16, "mean": torch.bfloat16, "square": torch.bfloat16}
        else:
            dtypes = {"master": torch.float32, "mean": torch.float32, "square": torch.float32}
        if weight.dtype == torch.float32:
            del dtypes["master"]  # the weight is its own
        # pinned, so that copies run at the bus's full speed
        offloaded: Any = {"device": "cpu", "pin_memory": weight.is_cuda}
        away = offloaded if self.settings.optimizer == "offload" else {}
        state = {name: torch.zeros_like(weight, dtype=dtype, **away) for name, dtype in dtypes.items()}
        if "master" in state:
            state["master"].copy_(weight)
        return state

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients, slice by slice; offloaded state is copied to the device and back."""
        self.steps += 1
        self.rounding.manual_seed(self.steps)  # so that a resumed run rounds alike
        for parameter, state in zip(self.parameters, self.states, strict=True):
            if parameter.grad is None:
                continue
            weight, gradient = flat(parameter.detach()), flat(parameter.grad)
            for start in range(0, len(weight), SLICE):
                part = slice(start, start + SLICE)
                home = {name: flat(tensor)[part] for name, tensor in state.items()}
                here = {name: tensor.to(self.device, non_blocking=True) for name, tensor in home.items()}
                self._update(weight[part], gradient[part], here)
                for name in home:
                    if here[name] is not home[name]:  # offloaded
                        home[name].copy_(here[name])

    def _update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """Algorithm 2 on one slice, in fp32; `.float()` of an fp32 tensor is the tensor itself."""
        beta1, beta2, rate = self.settings.beta1, self.settings.beta2, self.learning_rate
        split = "rest" in state
        exact = join_bits(weight, state["rest"]) if split else state.get("master", weight)
        mean, square = state["mean"].float(), state["square"].float()
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
        exact.mul_(1 - rate * self.settings.weight_decay)
        exact.addcdiv_(mean, deviation, value=-rate / (1 - beta1**self.steps))
        if split:
            upper, rest = split_bits(exact)
            weight.copy_(upper)
            state["rest"].copy_(rest)
            state["mean"].copy_(round_stochastically(mean, self.rounding))
            state["square"].copy_(round_stochastically(square, self.rounding))
        elif exact is not weight:
            weight.copy_(exact)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by names that stay the same from run to run."""
        tensors: dict[str, Tensor] = {}
        for i, (weight, state) in enumerate(zip(self.parameters, self.states, strict=True)):
            tensors |= {f"{i}.{name}": tensor for name, tensor in state.items()}
            if weight.dtype == torch.float32 and self.dtype != torch.float32:
                tensors[f"{i}.master"] = weight.detach()
        return tensors


def flat(tensor: Any) -> Tensor:
    """A tensor, or this rank's shard of it (FSDP2), in one dimension."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1)
