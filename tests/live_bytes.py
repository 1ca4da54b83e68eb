"""Counts what a computation keeps alive, without a card: on meta and fake tensors shapes are real and bytes are not."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optimizer
import qwen2_model
import ranks


class LiveBytes(TorchDispatchMode):
    """While active, `now` is the bytes of all meta storages made since, and `peak` the most that it ever was."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


class HostGenerator(torch.Generator):
    """There are no random numbers on meta."""

    def __new__(cls, device: Any = None) -> "HostGenerator":
        return super().__new__(cls)


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
    bias = None if attn_mask is None else attn_mask.expand(-1, k.shape[1], q.shape[2], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors take the fused kernels that CUDA has, and a host read of a few numbers gives zeros."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight))
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(optimizer, "round_stochastically", lambda exact, generator: exact.to(torch.bfloat16))


class FakeWideMatmul(qwen2_model.WideMatmul):
    """torch has this matmul on CUDA only."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Tensor) -> Tensor:
        context.save_for_backward(hidden, head)
        return hidden.new_empty(len(hidden), len(head), dtype=torch.float32)


@contextmanager
def fake_ranks(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the first of several, with fake tensors: FSDP2 does all its work, but nothing is sent."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        mesh = device_mesh.init_device_mesh("cpu", (count,))
        monkeypatch.setattr(
            device_mesh, "init_device_mesh", lambda *others: mesh
        )  # made above: fake tensors have no values to read
        monkeypatch.setattr(ranks, "gather", lambda mine: mine)
        monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight))
        monkeypatch.setattr(qwen2_model, "wide_matmul", FakeWideMatmul.apply)
        monkeypatch.setattr(
            torch.nn.Module, "float", lambda module: module
        )  # fp32 already; fake weights are not swapped
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        dist.destroy_process_group()
