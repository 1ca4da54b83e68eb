"""The memory plan counts what the code really allocates, and says what to lower when a run cannot fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memory
import rollout
from data_types import UserError, load_config
from memory import GIB, check_memory, parameter_count, plan_memory, shape_config
from optimizer import AdamW
from qwen2_model import Qwen2, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
SMALL = Qwen2Config(500, 48, 96, 3, 6, 2, 8, 1e-6, 1e4, True, 512)


@pytest.fixture
def config():
    return load_config(str(ROOT / "config.yml"))


@pytest.mark.parametrize(("size", "published"), [
    ("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512),
    ("14B", 14_770_033_664), ("32B", 32_763_876_352), ("72B", 72_706_203_648),
])
def test_real_sizes_have_their_published_number_of_parameters(size, published):
    assert parameter_count(shape_config(size)) == published


@pytest.mark.parametrize("mode", ["master", "split", "offload"])
def test_optimizer_state_and_cache_are_planned_as_they_are_allocated(config, mode):
    train = replace(config.train, optimizer=mode)
    plan = plan_memory(replace(config, train=train), SMALL, None)
    policy = Qwen2(SMALL).to(torch.bfloat16)
    state = AdamW(policy.parameters(), train).state
    allocated = sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors.values())
    planned = plan.always[f"optimizer state ({mode})"]
    assert planned == (0 if mode == "offload" else allocated)  # on the GPU
    columns = memory.PROMPT_TOKENS + config.rollout.max_new_tokens
    cache = rollout.KVCache(policy, 8, torch.full((1,), memory.PROMPT_TOKENS), columns)
    rows = config.rollout.group_size * config.rollout.questions_per_step
    assert plan.rollout[f"rollout: KV cache, {rows} rows of {columns} tokens"] == (
        cache.data.numel() * cache.data.element_size() / 8 * rows)


def test_the_configs_fit_their_cards():
    """config.yml is promised to fit 48 GB, config_24gb.yml 24 GB; each leaves the other's mode no room."""
    for name, card in (("config.yml", 48), ("config_24gb.yml", 24)):
        room = card * 0.95 * GIB
        assert plan_memory(load_config(str(ROOT / name)), shape_config("3B"), room).peak <= room
    assert plan_memory(load_config(str(ROOT / "config.yml")), shape_config("3B"), 24 * GIB).peak > 24 * GIB


def test_a_card_too_small_for_all_rows_gets_waves(config):
    whole, cut = (plan_memory(config, shape_config("3B"), card * GIB) for card in (48, 30))
    assert whole.questions_per_wave == 32 and 1 <= cut.questions_per_wave < 32
    assert cut.peaks[0] <= 30 * GIB
    capped = plan_memory(replace(config, rollout=replace(config.rollout, kv_cache_gib=1.0)), shape_config("3B"), None)
    assert next(iter(capped.rollout.values())) <= GIB


@pytest.mark.parametrize(("changes", "card", "advice"), [
    ({"activation_checkpointing": False}, 44, "train.activation_checkpointing=true"),
    ({"optimizer": "master"}, 46, "train.optimizer=split"),
    ({"optimizer": "split"}, 40, "train.optimizer=offload"),
    ({"optimizer": "offload"}, 16, "train.tokens_per_microbatch"),
])
def test_a_run_that_cannot_fit_is_refused_with_the_setting_to_change(config, changes, card, advice, monkeypatch):
    """Refused from the properties of the card alone, before anything is loaded: so the test can pretend to have one."""

    class Card:
        total_memory = card * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended Card")
    config = replace(config, train=replace(config.train, **changes))
    with pytest.raises(UserError, match=rf"this run needs [\d.]+ GiB, Pretended Card has {card}\.0 GiB: .*{advice}"):
        check_memory(config, shape_config("3B"), torch.device("cuda"))


