"""What a GPU would refuse or wait for, found without one: every pass runs on meta tensors, which have no values.

Reading a value (.item(), a boolean index, nonzero) fails on meta, as it would stall a GPU or break the capture of a
CUDA graph. `OneDevice` adds what meta lets pass: an operation between a meta tensor and a tensor of the CPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
from live_bytes import cuda_kernels, policy_on
from optimizer import AdamW
from plain_policy import active_episodes
from plumbing.config import load_config
from plumbing.run import find_device
from plumbing.terminal import UserError
from qwen2_model import Qwen2Config
from rollout import Decoder, KVCache

SHAPE = Qwen2Config(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e6, True, 1024)
ROOT = Path(__file__).resolve().parent.parent
SIMULATOR = Path(os.environ.get("CUDA_SIM", ROOT.parent / "shared" / "cuda_sim")).resolve()
CONFIG = load_config(ROOT / "config.yml", ["rollout.temperature=0.7"])


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


def prefilled(temperature: float = 1.0, device: str = "meta") -> Decoder:
    policy, prompts = policy_on(device, SHAPE), [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    cache, uniforms = KVCache(policy, [len(prompt) for prompt in prompts], 2, 40), torch.empty(6, 40, device=device)
    decoder = Decoder(policy, cache, uniforms, [7, 8], temperature)
    with OneDevice(uploads=True):
        decoder.prefill(prompts)
    return decoder


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@torch.inference_mode()
def test_a_decode_step_touches_nothing_but_the_device(temperature, monkeypatch):
    cuda_kernels(monkeypatch)
    decoder, row = prefilled(temperature), torch.empty(1, dtype=torch.long, device="meta")
    with OneDevice():
        for rows, columns in ((6, 128), (6, 6), (4, 11), (1, 12)):
            decoder.step(rows, columns)
        decoder.cache.move(row, row, 9)


@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("objective", ["reinforce", "clipped", "gspo", "cispo"])
def test_an_update_synchronizes_once_per_micro_batch(objective, checkpoint_layers, monkeypatch):
    cuda_kernels(monkeypatch)
    monkeypatch.setattr("optimizer.SLICE", 2**14)
    reads, mode = [], "split" if checkpoint_layers else "master"
    policy = policy_on("meta", SHAPE, "bfloat16" if checkpoint_layers else "float32")
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: reads.append(1) or torch.zeros(tensor.shape))
    config = replace(CONFIG, train=replace(CONFIG.train, objective=objective, optimizer=mode))
    policy.checkpoint_layers, batch = checkpoint_layers, active_episodes((6, 33), (5, 32), (4, 31), (3, 30))
    optimizer = AdamW(policy.parameters(), config.train)
    with OneDevice(uploads=True):
        grpo.accumulate_gradient(policy, batch, config, 128)
    assert len(reads) == len(grpo.micro_batches([[episode] for episode in batch], 128)) > 1
    with OneDevice():
        optimizer.step()


@pytest.mark.skipif(
    not (torch.version.cuda or "").startswith("13.") or torch.cuda.is_available() or not (SIMULATOR / "check").exists(),
    reason="needs a torch built for CUDA 13, no card, and a simulated one: CUDA_SIM=FOLDER",
)
@pytest.mark.parametrize("case", ["fp32", "bf16-split", "capture-refused", "memory-sampling", "two-ranks-sharded"])
def test_a_simulated_card_trains_as_the_cpu_does(case):
    """torch's own dispatcher, allocator and graph capture; the values are the CPU's."""
    done = subprocess.run([sys.executable, SIMULATOR / "check", case], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("auto", 0), ("cuda:1", 1)])
def test_the_device_has_an_index_because_set_device_refuses_one_without(name, index, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert find_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index), False]
    with pytest.raises(UserError, match=r"cuda:2.* 2"):
        find_device("cuda:2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"auto.* 2 GPUs"):  # on every rank, not only on the one that has none
        find_device("auto")


def test_a_driver_that_is_too_old_is_no_reason_to_train_on_the_cpu_in_silence(monkeypatch, capsys):
    """NVML counts the cards all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"model\.device.*too old.*CUDA 13\.0.*torch=="):
        find_device("cuda")
    assert find_device("cpu") == find_device("auto") == torch.device("cpu")
    assert "too old" in capsys.readouterr().out.strip("\n").replace("\n", "a second line too")
