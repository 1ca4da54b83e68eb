"""The memory plan against a count of the bytes that the same passes keep alive, on meta tensors and so without a card.

The reserve is left out on both sides: cuBLAS workspaces and fragmentation have no shapes.

    pytest tests/test_memory.py -s     # prints plan and count, in GiB
"""

from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes, cuda_kernels
from plain_policy import active_episodes

import benchmark
import grpo
import rollout
from config import load_config
from data_types import Config
from memory import GIB, RESERVE, plan_memory
from optimizer import AdamW
from qwen2_model import Qwen2

PROMPT = 160
RECIPES = {
    "48 GB": ("config.yml",),
    "24 GB": ("config_24gb.yml",),
    "kept": ("config.yml", ["train.activation_checkpointing=false"]),
}


def live_in_update(policy: Qwen2, config: Config) -> int:
    """Peak bytes beside weights and optimizer: two full micro-batches, forward and backward, and an optimizer step."""
    train, policy.checkpoint_layers = config.train, config.train.activation_checkpointing
    state_elsewhere = train.optimizer == "offload"
    optimizer = AdamW(policy.parameters(), replace(train, optimizer="split") if state_elsewhere else train)
    episodes = active_episodes(*[(PROMPT, 1024 - PROMPT)] * (2 * train.tokens_per_microbatch // 1024))
    with LiveBytes() as live:
        grpo.accumulate_gradient(policy, episodes, config.rollout.sampling, train, train.tokens_per_microbatch)
        optimizer.step()
    return live.peak


def live_in_sampling(policy: Qwen2, config: Config, rows: int) -> int:
    """Peak bytes of a prefill of one prompt per row and of the longest decode step."""
    new = config.rollout.max_new_tokens
    with LiveBytes() as live, torch.inference_mode():
        cache, uniforms = rollout.KVCache(policy, [PROMPT] * rows, 1, new), torch.empty(rows, new, device="meta")
        decoder = rollout.Decoder(policy, cache, uniforms, [151645, 151643], config.rollout.sampling)
        decoder.prefill([[1] * PROMPT] * rows)
        decoder.step(rows, PROMPT + new)
    return live.peak


PAIRS = [(size, "24 GB") for size in ("0.5B", "1.5B", "3B")] + [("0.5B", "kept"), ("3B", "48 GB")]


@pytest.mark.parametrize(("size", "recipe"), PAIRS)  # every size and every recipe: all nine pairs take 50 s
def test_the_plan_is_within_ten_percent_of_the_live_bytes(size: str, recipe: str, monkeypatch: pytest.MonkeyPatch):
    cuda_kernels(monkeypatch)
    config, shape = load_config(*RECIPES[recipe]), benchmark.shape_config(size)
    policy = benchmark.random_model(shape, torch.device("meta"), getattr(torch, config.model.dtype))
    plan = plan_memory(config, shape, PROMPT)
    base = sum(plan.always.values())
    live = live_in_sampling(policy, config, plan.rows), live_in_update(policy, config)
    for phase, peak, beside in zip(("sampling", "update"), plan.peaks, live, strict=True):
        planned, counted = peak - RESERVE, base - RESERVE + beside
        print(f"\n{size} {recipe} {phase}: planned {planned / GIB:.2f}, live {counted / GIB:.2f}", end="")
        assert 0.95 * counted <= planned <= 1.1 * counted
