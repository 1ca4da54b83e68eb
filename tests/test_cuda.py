"""What only a card can show, beside the tests marked `cuda` elsewhere. Run `pytest -m cuda` on one."""

import json

import pytest
import torch
from plain_policy import active_episodes

import benchmark
import grpo
import run
import train
from config import load_config
from data_types import Sampling
from memory import RESERVE, plan_memory
from optimizer import AdamW

pytestmark = pytest.mark.cuda


def test_the_peak_of_the_update_is_what_the_plan_says():
    config, shape = load_config("config.yml", ["train.tokens_per_microbatch=4096"]), benchmark.shape_config("0.5B")
    device = run.find_device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy = benchmark.random_model(shape, device, torch.bfloat16)
    policy.checkpoint_layers = True
    optimizer = AdamW(policy.parameters(), config.train)
    grpo.accumulate_gradient(policy, active_episodes(*[(160, 864)] * 8), Sampling(), config.train, 4096)
    grpo.apply_gradient(policy, optimizer, 1.0)
    planned = plan_memory(config, shape, 160).peaks[1] - RESERVE
    assert 0.85 * planned <= torch.cuda.max_memory_allocated() - before <= 1.05 * planned


@pytest.mark.parametrize(
    "extra", [[], *(["model.dtype=bfloat16", f"train.optimizer={m}"] for m in ("split", "offload"))]
)
def test_a_short_run_trains_and_resumes(extra, tmp_path):
    settings = ["model.device=cuda", f"output.folder={tmp_path}", "data.held_out=32", "train.steps=2"]
    assert train.main(["--config", "config_tiny.yml", "--name", "card", *settings, "checkpoint.every=1", *extra]) == 0
    assert train.main(["--resume", str(tmp_path / "card"), "train.steps=3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "card" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["logprob_gap"] < (0.05 if extra else 1e-5) and not line["skipped"] for line in lines[1:])
