"""Counts what a computation keeps alive, without a card: on meta tensors shapes are real and bytes are not."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optimizer
from qwen2_model import Qwen2, Qwen2Config


class LiveBytes(TorchDispatchMode):
    """While active, `now` is the bytes of all meta storages made since, and `peak` the most since it was last read."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self._peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def peak(self) -> int:
        peak, self._peak = self._peak, self.now
        return peak

    def add(self, size: int) -> None:
        self.now += size
        self._peak = max(self._peak, self.now)

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) and tensor.is_meta else None
            if storage is not None and storage not in self._seen:
                self._seen.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


class FusedNorm(torch.autograd.Function):
    """What CUDA's fused RMSNorm keeps: its input and one number per row. On meta torch would write it out."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = context.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """What CUDA's fused kernels allocate: on meta torch would make the whole matrix of scores."""
    if attn_mask is None and q.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if enable_gqa:  # fp32 has no kernel that shares K and V
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    bias = None if attn_mask is None else attn_mask.expand(-1, k.shape[1], q.shape[2], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors take the fused kernels that CUDA has; random and read numbers, which meta has not, are zeros."""
    new = {"__new__": lambda kind, device=None, make=torch.Generator.__new__: make(kind)}
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight))
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    monkeypatch.setattr(torch, "Generator", type("Generator", (torch.Generator,), new))
    monkeypatch.setattr(optimizer, "round_stochastically", lambda exact, generator: exact.to(torch.bfloat16))


def policy_on(device: str, shape: Qwen2Config, dtype: str = "bfloat16") -> Qwen2:
    with torch.device(device):
        policy = Qwen2(shape)
    for weight in policy.parameters():  # policy.to(dtype) fails with fake tensors
        weight.data = weight.data.to(getattr(torch, dtype))
    return policy
