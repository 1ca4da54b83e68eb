"""The memory plan against a count of the bytes that the same passes keep alive, on meta tensors and so without a card.

The reserve is left out on both sides: cuBLAS workspaces and fragmentation have no shapes.

    pytest tests/test_memory.py -s     # prints plan and count, in GiB
"""

import dataclasses

import pytest
import torch
from live_bytes import LiveBytes, cuda_kernels

import benchmark
import grpo
import rollout
from config import load_config
from data_types import Episode, Problem
from memory import GIB, RESERVE, plan_memory
from optimizer import AdamW
from qwen2_model import Qwen2

PROMPT = 160


def recipe(name: str, *overrides: str):
    return load_config(name, list(overrides))


def policy_on_meta(size: str, config) -> Qwen2:
    with torch.device("meta"):
        policy = Qwen2(benchmark.shape_config(size)).to(getattr(torch, config.model.dtype))
    policy.vocabulary, policy.checkpoint_layers = 151665, config.train.activation_checkpointing
    return policy


def live_in_update(size: str, config) -> int:
    """Peak bytes beside weights and optimizer: two full micro-batches, forward and backward, and an optimizer step."""
    policy, train = policy_on_meta(size, config), config.train
    state_elsewhere = train.optimizer == "offload"
    optimizer = AdamW(policy.parameters(), dataclasses.replace(train, optimizer="split") if state_elsewhere else train)
    new = 1024 - PROMPT
    episodes = [
        Episode(Problem((1, 1), 2), [1] * PROMPT, [1] * new, [0.0] * new, False, "", advantage=1.0, token_weight=1.0)
        for _ in range(2 * train.tokens_per_microbatch // 1024)
    ]
    with LiveBytes() as live:
        grpo.accumulate_gradient(policy, episodes, config.rollout.sampling, train, train.tokens_per_microbatch)
        optimizer.step()
    return live.peak


def live_in_sampling(size: str, config, rows: int) -> int:
    """Peak bytes of a prefill of one prompt per row and of the longest decode step."""
    policy, new = policy_on_meta(size, config), config.rollout.max_new_tokens
    with LiveBytes() as live, torch.inference_mode():
        cache = rollout.KVCache(policy, [PROMPT] * rows, list(range(rows)), new)
        uniforms = torch.empty(rows, new, device="meta")
        decoder = rollout.Decoder(policy, cache, uniforms, [151645, 151643], config.rollout.sampling)
        decoder.prefill([[1] * PROMPT] * rows)
        decoder.step(rows, PROMPT + new)
    return live.peak


RECIPES = {
    "48 GB": ("config.yml",),
    "24 GB": ("config_24gb.yml",),
    "kept": ("config.yml", "train.activation_checkpointing=false"),
}


@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize("size", ["0.5B", "1.5B", "3B"])
def test_the_plan_is_within_ten_percent_of_the_live_bytes(size, recipe_name, monkeypatch):
    cuda_kernels(monkeypatch)
    config = recipe(*RECIPES[recipe_name])
    plan = plan_memory(config, benchmark.shape_config(size), PROMPT)
    base = sum(plan.always.values()) - RESERVE
    planned = [peak - RESERVE for peak in plan.peaks]
    live = [base + live_in_sampling(size, config, plan.rows), base + live_in_update(size, config)]
    for phase, expected, counted in zip(("sampling", "update"), planned, live, strict=True):
        print(f"\n{size} {recipe_name} {phase}: planned {expected / GIB:.2f}, live {counted / GIB:.2f}", end="")
        print(f" (beside weights: {(expected - base) / GIB:.2f}, {(counted - base) / GIB:.2f})", end="")
    for expected, counted in zip(planned, live, strict=True):
        assert 0.95 * counted <= expected <= 1.1 * counted
