"""What a GPU would refuse or wait for, found without one: every pass runs on meta tensors, which have no values.

Reading a value (.item(), a boolean index, nonzero) fails on meta, as it would stall a GPU or break the capture of a
CUDA graph. `OneDevice` adds what meta lets pass: an operation between a meta tensor and a tensor of the CPU.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import cuda_kernels
from plain_policy import active_episodes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
import rollout
import run
from config import load_config
from data_types import Sampling, UserError
from optimizer import AdamW
from qwen2_model import Qwen2, Qwen2Config

SHAPE = Qwen2Config(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e6, True, 1024)
CONFIG = load_config("config.yml", ["rollout.max_new_tokens=40", "train.tokens_per_microbatch=128"])
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
SAMPLINGS = [Sampling(), Sampling(0.0), Sampling(0.7, top_k=20), Sampling(1.0, top_p=0.9)]


class OneDevice(TorchDispatchMode):
    """Fails where an operation on meta takes a CPU tensor with dimensions; uploads of whole tensors may be allowed."""

    def __init__(self, uploads: bool = False) -> None:
        super().__init__()
        self.uploads = uploads

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.dim()]
        mixed = len({tensor.device.type for tensor in tensors}) > 1
        upload = self.uploads and str(function).startswith(("aten.to.", "aten._to_copy", "aten.copy_"))
        assert not mixed or upload, f"{function} mixes CPU and GPU tensors"
        return result


@pytest.fixture(autouse=True)
def _meta_stands_in_for_cuda(monkeypatch):
    cuda_kernels(monkeypatch)


def policy_on(device: str, dtype: torch.dtype = torch.bfloat16) -> Qwen2:
    with torch.device(device):
        policy = Qwen2(SHAPE)
    for weight in policy.parameters():  # policy.to(dtype) fails with fake tensors
        weight.data = weight.data.to(dtype)
    policy.vocabulary = 500
    return policy


def prefilled(sampling: Sampling, device: str = "meta") -> rollout.Decoder:
    policy = policy_on(device)
    cache = rollout.KVCache(policy, [len(prompt) for prompt in PROMPTS], 2, 40)
    decoder = rollout.Decoder(policy, cache, torch.empty(6, 40, device=device), [7, 8], sampling)
    with OneDevice(uploads=True):
        decoder.prefill(PROMPTS)
    return decoder


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@torch.inference_mode()
def test_a_decode_step_touches_nothing_but_the_device(sampling):
    decoder, row = prefilled(sampling), torch.empty(1, dtype=torch.long, device="meta")
    with OneDevice():
        for rows, columns in ((6, 128), (6, 6), (4, 11), (1, 12)):
            decoder.step(rows, columns)
        decoder.cache.move(row, row, 9)


@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("objective", ["reinforce", "clipped", "truncated_is"])
def test_a_gradient_synchronizes_once_per_micro_batch(objective, checkpoint_layers, monkeypatch):
    reads, policy = [], policy_on("meta")
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: reads.append(1) or torch.zeros(tensor.shape))
    settings, policy.checkpoint_layers = replace(CONFIG.train, objective=objective), checkpoint_layers
    batch = active_episodes((3, 30), (4, 31), (5, 32), (6, 33))
    with OneDevice(uploads=True):
        grpo.accumulate_gradient(policy, batch, Sampling(0.7, top_p=0.9), settings, 128)
    assert len(reads) == len(grpo.micro_batches([episode.length for episode in batch], 128)) > 1


@pytest.mark.parametrize(("mode", "dtype"), [("master", torch.float32), ("split", torch.bfloat16)])
def test_the_optimizer_stays_on_the_device(mode, dtype, monkeypatch):
    monkeypatch.setattr("optimizer.SLICE", 1000)
    policy = policy_on("meta", dtype)
    optimizer = AdamW(policy.parameters(), replace(CONFIG.train, optimizer=mode))
    for parameter in policy.parameters():
        parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
    with OneDevice():
        optimizer.step()


FAULTS = {
    "item": lambda decoder, logits: decoder.lengths[0].item(),
    "boolean index": lambda decoder, logits: decoder.lengths[decoder.alive],
    "CPU operand": lambda decoder, logits: decoder.lengths + torch.ones(6, dtype=torch.long),
    "CPU index": lambda decoder, logits: decoder.lengths[torch.tensor([0, 1])],
    "upload": lambda decoder, logits: torch.ones(6).to(logits.device),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@torch.inference_mode()
def test_a_planted_fault_in_the_decode_step_is_caught(fault, monkeypatch):
    decoder, record = prefilled(Sampling()), rollout.Decoder.record
    monkeypatch.setattr(rollout.Decoder, "record", lambda self, logits: (fault(self, logits), record(self, logits)))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OneDevice():
        decoder.step(6, 128)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch, but no card")
def test_sampling_runs_on_fake_cuda_tensors(monkeypatch):
    """Beyond meta: CUDA's own dispatch, in a torch that was built for it."""
    monkeypatch.undo()  # the kernels as they are
    with FakeTensorMode(), torch.no_grad():
        decoder = prefilled(Sampling(), "cuda")
        decoder.step(6, 128)
        decoder.step(3, 128)
        assert decoder.tokens.is_cuda
        hidden = torch.empty(3, 64, device="cuda", dtype=torch.bfloat16)
        assert decoder.policy.logits(hidden).dtype == torch.float32


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("auto", 0), ("cuda:1", 1)])
def test_the_device_has_an_index_because_set_device_refuses_one_without(name, index, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert run.find_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index), False]
    with pytest.raises(UserError, match="cuda:2"):
        run.find_device("cuda:2")
