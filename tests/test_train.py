"""train.py as a person uses it: short runs of the tiny config, the files and metrics they leave, and determinism."""

import copy
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from short_run import ROOT, Done, arguments, run
from transformers import AutoModelForCausalLM

import train
from config import load_config
from data_types import Episode, Progress
from logbook import Logbook
from model_folder import load_model
from optimizer import AdamW

STEP_KEYS = """step reward success format_rate response_length truncated groups zero_variance loss entropy approx_kl
    logprob_gap clip_fraction grad_norm skipped rollout_seconds rollout_tokens_per_second update_seconds
    update_tokens_per_second"""
GREEDY, SAMPLED = ({f"eval_{kind}", f"eval_{kind}_se"} for kind in ("greedy", "sampled"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Done:
    """A run from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    command = [sys.executable, "train.py", *arguments(folder, "eval.every=2", "checkpoint.keep=2", "output.samples=2")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return Done(folder, done.returncode, done.stdout.splitlines(), done.stderr.splitlines())


def test_the_run_folder_holds_what_the_readme_promises(finished):
    folder, status, printed, complaints = finished
    assert (status, complaints) == (0, [])
    metrics = finished.metrics(times=True)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert [m.keys() & (GREEDY | SAMPLED) for m in metrics] == [GREEDY | SAMPLED, set(), GREEDY, GREEDY | SAMPLED]
    for m in metrics[1:]:
        assert m.keys() >= set(STEP_KEYS.split())
        assert max(m["logprob_gap"], abs(m["approx_kl"])) < 1e-5, "the first update is on-policy"
    assert list((folder / "tensorboard").glob("events.*"))
    assert finished.samples().count("--- step") == 6  # two per step
    typed = arguments(folder, "eval.every=2", "checkpoint.keep=2", "output.samples=2")
    assert load_config(folder / "config.yml") == load_config(typed[1], typed[4:])
    assert [line.split()[1] for line in printed if line.startswith("step")] == ["0/3", "1/3", "2/3", "3/3"]
    for kind in ("sampled", "greedy"):
        (line,) = [line for line in printed if kind in line and not line.startswith("step")]
        assert re.findall(r"[\d.]+%", line) == [f"{metrics[step][f'eval_{kind}']:.1%}" for step in (0, 3)]


def test_checkpoints_and_the_final_model_are_folders_that_transformers_opens(finished):
    """Only the newest checkpoints stay; training has moved the weights; the logits are those of the policy."""
    assert {path.name for path in finished.folder.glob("checkpoints/step-*")} == {"step-000002", "step-000003"}
    assert finished.tensors(2) != finished.tensors(3) == finished.tensors("final") != finished.tensors(ROOT / "tiny")
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    for folder in (finished.folder / "final", finished.folder / "checkpoints" / "step-000002"):
        policy = load_model(folder, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits.flatten(0, 1)
            torch.testing.assert_close(policy.logits(policy(tokens).flatten(0, 1)), theirs, atol=1e-4, rtol=0)


def test_a_run_follows_from_its_seed_however_often_it_is_evaluated(finished, tmp_path):
    """An evaluation that drew from training's generator would change every later step."""
    again, other = run(tmp_path / "again", "eval.every=1", "output.samples=2"), run(tmp_path / "2", "train.seed=2")
    for mine, theirs in zip(again.metrics(), finished.metrics(), strict=True):
        assert {key: mine[key] for key in theirs} == theirs
        assert {key.partition("_")[0] for key in mine.keys() - theirs.keys()} <= {"eval"}
    assert (again.samples(), again.tensors("final")) == (finished.samples(), finished.tensors("final"))
    assert other.metrics()[1:] != finished.metrics()[1:]
    assert len({done.metrics()[0]["eval_greedy"] for done in (finished, other)}) == 1, "greedy depends on no seed"


def test_the_metrics_mean_what_they_say(tmp_path, monkeypatch):
    """Tokens that no update ran made the update look fast: zero-variance groups, masked and surplus responses."""
    steps, write_step, update = [], Logbook.write_step, AdamW.step

    def spying(self: Logbook, step: int, metrics: dict, episodes: list[Episode]) -> None:
        steps.append((dict(metrics), copy.deepcopy(episodes)))
        write_step(self, step, metrics, episodes)

    monkeypatch.setattr(Logbook, "write_step", spying)
    monkeypatch.setattr(AdamW, "step", lambda self: (time.sleep(0.3), update(self)))
    recipe = "train.objective=clipped train.updates_per_batch=2 train.truncated=mask train.steps=2 train.seed=7"
    recipe += " rollout.max_draws=3 rollout.max_new_tokens=29"
    assert run(tmp_path / "run", *recipe.split()).status == 0
    for m, episodes in steps[1:]:
        count = len(episodes)
        groups = [episodes[first : first + 4] for first in range(0, count, 4)]
        active = [group for group in groups if len({e.reward.total for e in group}) > 1]
        ran = [e for group in active[:4] for e in group if not e.truncated]
        assert (m["groups"], m["zero_variance"]) == (count / 4, len(groups) - len(active))
        assert m["reward"] == pytest.approx(sum(e.reward.format + e.reward.correct for e in episodes) / count)
        assert m["success"] == sum(e.reward.correct == 1 for e in episodes) / count
        assert m["format_rate"] == sum(e.reward.format == 0.1 for e in episodes) / count
        assert m["truncated"] == sum(e.truncated for e in episodes) / count
        sampled = sum(len(e.response_ids) for e in episodes)
        assert m["response_length"] == sampled / count
        assert m["rollout_tokens_per_second"] * m["rollout_seconds"] == pytest.approx(sampled)
        updated = 2 * sum(len(e.prompt_ids) + len(e.response_ids) for e in ran)
        assert m["update_tokens_per_second"] * m["update_seconds"] == pytest.approx(updated)
        assert m["update_seconds"] > 0.6, "the optimizer's steps are part of the update"
        assert min(m["groups"] - m["zero_variance"] - 4, m["zero_variance"], m["truncated"]) > 0, "not the case"


def test_an_epoch_visits_every_problem_once_and_the_next_in_another_order():
    config = load_config(ROOT / "config_tiny.yml", ["rollout.questions_per_step=3"])
    runs = [SimpleNamespace(config=config, training=range(10), progress=Progress(drawn=n)) for n in range(0, 21, 3)]
    problems = [problem for run in runs for problem in train.next_problems(run, 0)]
    assert sorted(problems[:10]) == sorted(problems[10:20]) == list(range(10))
    assert problems[:10] != problems[10:20]
    assert train.next_problems(runs[0], 1) == train.next_problems(runs[1], 0), "a further draw goes on from the first"


def test_generators_of_different_purposes_and_steps_differ():
    cases = [(seed, purpose, step) for seed in (1, 2) for purpose in ("rollout 0", "evaluation") for step in (0, 1, 2)]
    assert len({torch.rand(1, generator=train.make_generator(*case)).item() for case in cases}) == 12
