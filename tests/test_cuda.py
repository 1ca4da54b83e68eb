"""What only a card can show, beside the tests marked `cuda` elsewhere. Run `pytest -m cuda` on one."""

import pytest
import torch

import grpo
from optimizer import AdamW
from plain_policy import active_episodes
from plumbing.config import load_config
from plumbing.memory import RESERVE, plan_memory
from plumbing.run import find_device
from short_run import ROOT, resume, run
from tools.benchmark import random_model, shape_config

pytestmark = pytest.mark.cuda


def test_the_peak_of_the_update_is_what_the_plan_says():
    config, shape = load_config(ROOT / "config.yml", ["train.tokens_per_microbatch=4096"]), shape_config("0.5B")
    device = find_device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    policy = random_model(shape, device, torch.bfloat16)
    policy.checkpoint_layers = True
    optimizer = AdamW(policy.parameters(), config.train)
    grpo.accumulate_gradient(policy, active_episodes(*[(160, 864)] * 8), config, 4096)
    grpo.apply_gradient(policy, optimizer, 1.0)
    planned = plan_memory(config, shape, 160).peaks[1] - RESERVE
    assert 0.85 * planned <= torch.cuda.max_memory_allocated() - before <= 1.05 * planned


@pytest.mark.parametrize("mode", ["", "split", "offload"])
def test_a_short_run_trains_and_resumes(mode, tmp_path):
    bf16 = ["model.dtype=bfloat16", f"train.optimizer={mode}"] if mode else []
    assert run(tmp_path / "card", "model.device=cuda", "train.steps=2", *bf16).status == 0
    done = resume(tmp_path / "card", "train.steps=3")
    assert (done.status, [m["step"] for m in done.metrics()]) == (0, [0, 1, 2, 3])
    assert all(m["logprob_gap"] < (0.05 if mode else 1e-5) and not m["skipped"] for m in done.metrics()[1:])
