"""A run that nobody watches: warnings, numbers that are not finite, too little memory, a full disk.

Most tests are short runs of the tiny config, each disturbed in one place; the run that `calm` left alone says what
should have come out.
"""

import contextlib
import math
import re
import shutil
import subprocess
import sys
import traceback
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import ROOT, ROWS, Done, arguments, run
from torch import Tensor

import grpo
import train
from alarms import Alarms
from checkpoint import read_progress
from config import load_config
from data_types import Episode, Progress, Reward, UserError
from qwen2_model import Qwen2
from rollout import Response, Sampler


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Done:
    done = run(tmp_path_factory.mktemp("runs") / "calm")
    assert (done.status, done.complaints) == (0, [])
    return done


HEALTHY = {"success": 0.4, "groups": 16, "zero_variance": 4, "truncated": 0.1, "entropy": 1.0, "logprob_gap": 1e-7}
BOUNDS = [  # metrics that are still fine, metrics that are not, the first setting that the warning names
    ({"zero_variance": 8}, {"zero_variance": 9}, "rollout.group_size"),
    ({"entropy": 0.1}, {"entropy": 0.0999}, "train.learning_rate"),
    ({"entropy": None, "logprob_gap": None}, {"entropy": 0.09}, "train.learning_rate"),  # None: no row was run
    ({"truncated": 0.5}, {"truncated": 0.501}, "rollout.max_new_tokens"),
    ({"logprob_gap": 1e-5}, {"logprob_gap": 1.1e-5}, ""),
    ({"logprob_gap": 1e-6}, {"logprob_gap": math.nan}, ""),
    ({"eval_success": 0.4}, {"eval_success": 0.39}, "train.learning_rate"),
    ({"eval_success": 0.3, "eval_success_se": 0.06}, {"eval_success": 0.2}, "train.learning_rate"),
    ({"success": 0.05}, {"success": 0.03, "zero_variance": 16}, "train.learning_rate"),  # no larger group cures that
]
FIRST_SETTING = re.compile(r"(?:rollout|train|data)\.(?!py)[\w*]+|$")


def check(alarms: Alarms, capsys, **changes: float | None) -> list[str]:
    """The warnings about the healthy metrics with these changes."""
    alarms.check(HEALTHY | changes, Progress(best=0.5, best_step=7))
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("inside", "outside", "setting"), BOUNDS, ids=[str(row[1]) for row in BOUNDS])
def test_a_warning_comes_just_past_its_bound_and_once(inside, outside, setting, capsys):
    """A bound that is off, or a warning at every step, and nobody reads them any more."""
    alarms = Alarms(load_config(ROOT / "config_tiny.yml"))
    assert check(alarms, capsys, entropy=math.nan) + check(alarms, capsys) + check(alarms, capsys, **inside) == []
    (warning,) = check(alarms, capsys, **outside)
    assert warning.startswith("warning: ")
    assert FIRST_SETTING.search(warning).group() == setting
    assert ("checkpoints/best-000007" in warning) == bool(outside.keys() & {"success", "eval_success"})
    assert check(alarms, capsys, **outside) == []


def test_what_takes_several_steps_or_several_warnings(capsys):
    """A reward stuck at 0 or 0.1 looks like a slow start; a run that goes wrong goes wrong in several ways."""
    alarms = Alarms(load_config(ROOT / "config_tiny.yml", ["model.dtype=bfloat16"]))
    for _ in range(2):  # one right answer starts the count anew
        assert [check(alarms, capsys, success=value) for value in [1 / 256] + [0.0] * 9] == [[]] * 10
    (warning,) = check(alarms, capsys, success=0.0)
    assert FIRST_SETTING.search(warning).group() == "data.*"
    assert check(alarms, capsys, logprob_gap=0.02) == [], "real Qwen2.5 weights in bf16 have 0.011"
    outside = {"zero_variance": 16, "truncated": 1.0, "entropy": 0.001, "logprob_gap": 0.06, "eval_success": 0.0}
    assert len(set(check(alarms, capsys, **outside))) == 5


def test_a_collapse_is_blamed_on_the_learning_rate(tmp_path):
    """All groups get zero variance, and the advice was a larger group."""
    done = run(tmp_path / "run", "train.learning_rate=0.1", "train.seed=3", "rollout.questions_per_step=16")
    assert [(m["success"], m["zero_variance"]) for m in done.metrics()[2:]] == [(0, 16), (0, 16)]
    assert FIRST_SETTING.search(done.complaints[0]).group() == "train.learning_rate"
    assert not re.search("group_size|entropy", "".join(done.complaints)), "no row was run, so there is no entropy"
    assert all("the model it started from" in line for line in (done.complaints[0], done.printed[-2]))


@pytest.mark.parametrize(("successes", "full", "best"), [
    ([0.2, 0.5, 0.4, 0.1], False, "checkpoints/best-000001"),
    ([0.5, 0.4, 0.4, 0.1], False, "the model it started from"),
    ([0.4, 0.5, 0.4, 0.1], True, "the model it started from"),
    ([0.2, 0.3, 0.5, 0.49], False, None),
])  # fmt: skip
def test_a_run_that_ends_worse_than_its_best_says_where_the_best_is(successes, full, best, tmp_path, monkeypatch):
    """A promise of weights that are not there: they were never saved, or the disk was full."""

    def evaluate(run: Any, temperature: float) -> dict[str, float]:
        return {"eval_success": successes[run.progress.step + bool(run.progress.before)], "eval_success_se": 0.01}

    monkeypatch.setattr(train, "evaluate", evaluate)
    if full:
        monkeypatch.setattr("run.save_best", Mock(side_effect=UserError("no space left")))
    done = run(tmp_path / "run", "eval.every=1")
    lines = [*done.complaints, *done.printed[-3:]]
    promises = [line for line in lines if "checkpoints/best" in line or "the model it started from" in line]
    assert len(promises) == (2 if best else 0)  # in the alarm and at the end
    assert all(best in line for line in promises)
    assert (done.folder / "checkpoints/best-000001/model.safetensors").exists() == (best == "checkpoints/best-000001")


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory) -> Done:
    """A run whose model, beside its folder, is damaged from the start."""
    model = shutil.copytree(ROOT / "tiny", tmp_path_factory.mktemp("damaged") / "model")
    weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    weights["model.norm.weight"][5] = math.nan
    save_file(weights, model / "model.safetensors")
    return run(model.parent / "run", "train.steps=6", f"model.path={model}", "checkpoint.every=0")


def test_a_damaged_model_is_given_up_after_three_skipped_steps(hopeless, tmp_path):
    """nan logits earn nothing, so the loss is a clean 0.0 and such a run went on to its end without a word."""
    assert hopeless.status == 2
    assert [m.get("skipped") for m in hopeless.metrics()] == [None, 1, 1, 1]
    assert re.findall(r"skipped/step-00000(\d)\.json", "\n".join(hopeless.complaints)) == ["1", "2", "3"]
    assert FIRST_SETTING.search(hopeless.complaints[-1]).group() == "train.learning_rate"
    assert hopeless.tensors(3) == hopeless.tensors("../model")
    for step in (1, 2, 3):  # without its episodes nobody finds out what made the numbers go wrong
        assert [math.isnan(sum(episode["old_logprobs"])) for episode in hopeless.skipped(step)] == [True] * ROWS
    again = run(shutil.copytree(hopeless.folder, tmp_path / "run"), resume=True)
    assert again.status == 2, "a count that only has to equal the bound has passed it for good"


@pytest.mark.parametrize("place", ["gradient", "advantage", "logprob", "loss", "second update"])
def test_one_bad_number_in_one_step_costs_that_step_and_no_more(place, calm, tmp_path, monkeypatch):
    """One nan that gets into AdamW's averages is there for good; clipping by its norm spreads it to every weight."""
    calls, twice, accumulate_gradient = [], place == "second update", grpo.accumulate_gradient

    def accumulate(policy: Qwen2, episodes: list[Episode], *others: object) -> dict:
        calls.append(len(episodes))
        if len(calls) != (4 if twice else 2):
            return accumulate_gradient(policy, episodes, *others)
        if place == "advantage":
            episodes[7].advantage = math.nan
        if place == "logprob":
            episodes[9].old_logprobs[1] = math.nan  # `reinforce` does not look at it: its gradient is finite
        stats = accumulate_gradient(policy, episodes, *others)
        if place in ("gradient", "second update"):
            policy.layers[0].down.weight.grad[3, 4] = math.inf
        # as from a token whose probability is 0: its gradient is finite
        return stats | {"loss": -math.inf} if place == "loss" else stats

    monkeypatch.setattr(grpo, "accumulate_gradient", accumulate)
    done = run(tmp_path / "run", *["train.objective=clipped", "train.updates_per_batch=2"] * twice)
    assert [m.get("skipped") for m in done.metrics()] == [None, 0, 1, 0]
    assert sum(str(done.folder / "skipped" / "step-000002.json") in line for line in done.complaints) == 1
    assert len(done.skipped(2)) == ROWS
    assert read_progress(done.folder / "checkpoints/step-000003").skipped_in_a_row == 0
    if not twice:  # of two updates the first one counts
        assert calls == [ROWS] * 3
        assert done.metrics()[:2] == calm.metrics()[:2]
        assert done.tensors(2, "optimizer.safetensors") == calm.tensors(1, "optimizer.safetensors")
        assert done.tensors(2) == calm.tensors(1) != done.tensors(3)
        assert all(f"<think>{episode['text']}" in calm.samples() for episode in done.skipped(2))


def small_card(patch, after: Path | None = None, **most: float) -> None:
    """A forward of more tokens (rows x length) runs out of memory, once the metrics `after` have a step.

    An exception holds its frames, and they their tensors: these must be gone before the next attempt.
    """
    forward, held = Qwen2.forward, []

    def limited(self: Qwen2, tokens: Tensor, positions: Tensor | None = None, *others: Any, **named: Any) -> Tensor:
        length = tokens.shape[1] if positions is None else int(positions.max()) + 1
        phase = "update" if torch.is_grad_enabled() else "rollout"
        full = len(tokens) * length > most.get(phase, math.inf)
        if full and (after is None or after.read_text().count("\n") > 1):
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError if phase == "update" else RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
        return forward(self, tokens, positions, *others, **named)

    def empty_cache() -> None:
        assert [reference() for reference in held] == [None] * len(held)

    patch.setattr(Qwen2, "forward", limited)
    patch.setattr(torch.cuda, "empty_cache", empty_cache)


def amid_an_update(patch, number: int) -> None:
    """The first micro-batches have left their gradient when the third one fails: added again, they count double."""
    logits, calls = Qwen2.logits, []

    def flaky(self: Qwen2, hidden: Tensor) -> Tensor:
        calls.extend([1] * torch.is_grad_enabled())
        if torch.is_grad_enabled() and len(calls) == number:
            assert ("backward" in {frame.name for frame in traceback.extract_stack()}) == (number == 6)
            raise torch.OutOfMemoryError
        return logits(self, hidden)

    patch.setattr(Qwen2, "logits", flaky)


def no_graphs(patch) -> None:
    """Some drivers and debuggers refuse to capture a graph; torch 2.11 must then be told that the capture is over."""
    init, refused = Sampler.__init__, RuntimeError("CUDA error: operation not permitted when stream is capturing")
    patch.setattr(Sampler, "__init__", lambda self, *others: (init(self, *others), setattr(self, "graphs", True))[0])
    for name in ("CUDAGraph", "graph_pool_handle", "current_stream", "current_device"):
        patch.setattr(torch.cuda, name, Mock())
    patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    patch.setattr(torch.cuda, "graph", Mock(side_effect=refused))
    patch.setattr(torch._C, "_cuda_endAllocateToPool", Mock(), raising=False)


TROUBLES = {  # what happens, and what the warnings name
    # of the rollout's 16 rows of up to 66 tokens two or three fit, of the update one, or two short ones
    "small": (
        lambda patch: small_card(patch, rollout=200, update=70),
        "4 rows, 2 rows, 1024, 512, 256, 128, 66 tokens",
    ),
    "forward": (lambda patch: amid_an_update(patch, 5), "1024 tokens"),
    "backward": (lambda patch: amid_an_update(patch, 6), "1024 tokens"),  # there the head is computed again
    "graphs": (no_graphs, "without CUDA graphs"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_run_that_had_to_try_again_ends_as_if_undisturbed(trouble, calm, tmp_path, monkeypatch):
    """What fits is kept: forgotten, it would be found again at each step at the price of failed attempts."""
    disturb, words = TROUBLES[trouble]
    disturb(monkeypatch)
    done = run(tmp_path / "run")
    said = "\n".join(done.complaints)
    assert (done.status, done.samples(), len(done.complaints)) == (0, calm.samples(), len(words.split(", ")))
    assert all(word in said for word in words.split(", "))
    assert "unchanged" not in said, "another batch shape rounds differently"
    for mine, theirs in zip(done.metrics(times=True), calm.metrics(), strict=True):
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        sampled = mine.get("response_length", 0) * ROWS  # the tokens of a failed attempt are not counted
        rate, seconds = (mine.get(f"rollout_{key}", 0) for key in ("tokens_per_second", "seconds"))
        assert rate * seconds == pytest.approx(sampled)
    folders = ROOT / "tiny", done.folder / "final", calm.folder / "final"
    start, mine, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    for name, expected in theirs.items():
        assert (mine[name] - expected).norm() <= 1e-5 * expected.norm() < (expected - start[name]).norm()


@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_when_not_even_one_row_fits_the_run_stops_and_says_what_to_lower(phase, calm, tmp_path):
    """Halving without an end, or a traceback and all steps lost; resumed with room, it ends as if undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        small_card(patch, tmp_path / "run" / "metrics.jsonl", **{phase: 10})
        done = run(tmp_path / "run", "checkpoint.every=0")
    assert (done.status, done.tensors(1)) == (2, calm.tensors(1))
    assert FIRST_SETTING.search(done.complaints[-1]).group() == "rollout.max_new_tokens"
    assert 4 <= len(done.complaints) <= 7
    again = run(done.folder, resume=True)
    assert (again.status, again.metrics(), again.samples()) == (0, calm.metrics(), calm.samples())
    assert again.tensors("final") == calm.tensors("final")


def test_the_smallest_micro_batch_is_the_longest_row_that_is_run(tmp_path, monkeypatch):
    """The longest responses are often all wrong, or truncated and masked, and so not run: sized by them, the smallest
    micro-batch held two rows of the others, and a run was given up that one row at a time would have saved."""

    def generate(self: Sampler, prompts: list, uniforms: Tensor, *others: object) -> list[Response]:
        lengths = [10 if row < 4 else 48 for row in range(len(uniforms))]
        return [Response([5] * length, [-1.0] * length, truncated=length == 48) for length in lengths]

    monkeypatch.setattr(Sampler, "generate", generate)
    rewards = [Reward(0.0, float(n % 2 and n % 16 < 12)) for n in range(99)]
    monkeypatch.setattr(train, "grade", Mock(side_effect=rewards))
    small_card(monkeypatch, update=30)
    done = run(tmp_path / "run", "train.truncated=mask", "train.steps=1")
    assert (done.status, done.metrics()[1]["zero_variance"]) == (0, 1), done.complaints


def test_any_other_error_of_a_gpu_is_not_swallowed(tmp_path, monkeypatch):
    """Tried again it would come again with each size, and end as advice about memory."""
    forward = Mock(side_effect=[RuntimeError("CUDA error: an illegal memory access was encountered while capturing")])
    monkeypatch.setattr(Qwen2, "forward", forward)
    with pytest.raises(RuntimeError, match="illegal"):
        run(tmp_path / "run")
    assert forward.call_count == 1


LIMITED = """
import functools, resource, sys, logbook, train
write_step, most = logbook.Logbook.write_step, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def limited(self, step, *others):
    write_step(self, step, *others)
    room = (self.folder / "metrics.jsonl").stat().st_size + 100 if step == 1 else most
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
logbook.Logbook.write_step = limited
logbook.SummaryWriter = functools.partial(logbook.SummaryWriter, flush_secs=0.05)  # else it waits two minutes
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_goes_on_while_its_disk_is_full_and_catches_up_after(calm, tmp_path):
    """Full during step 2, for all its files (a limit that the kernel keeps: it takes half a line, then none).

    TensorBoard's writer does not live through that: its errors kept the samples of all later steps from being written.
    """
    command = [sys.executable, "-c", LIMITED, *arguments(tmp_path / "run", "checkpoint.every=0")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    left = Done(tmp_path / "run", done.returncode, [], done.stderr.splitlines())
    assert left.status == 0, done.stderr
    assert [str(left.folder) in line for line in left.complaints if line.startswith("warning")] == [True]
    assert (left.metrics(), left.samples()) == (calm.metrics(), calm.samples())
    assert left.tensors("final") == calm.tensors("final")


@pytest.mark.parametrize("where", ["optimizer.AdamW.step", "run.load_model"])
def test_memory_that_runs_out_where_nothing_can_shrink_is_one_line(where, tmp_path, monkeypatch):
    """It ended in a traceback, and the steps that were done were not saved."""
    monkeypatch.setattr(where, Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    done = run(tmp_path / "run", "train.steps=2")
    assert (done.status, "train.optimizer=offload" in done.complaints[-1]) == (2, True)
    assert (done.folder / "checkpoints/step-000000").exists() == (where != "run.load_model")


def test_a_skipped_step_moves_nothing_though_its_bad_numbers_are_in_a_zero_variance_group(tmp_path, monkeypatch):
    """Dynamic sampling left such a group out: the step was counted as skipped, and the weights moved."""
    sample = train.sample

    def one_bad_group(*arguments: Any) -> list:
        episodes = sample(*arguments)
        for episode in episodes[:4]:
            episode.old_logprobs, episode.text = [math.nan] * len(episode.response_ids), ""
        return episodes

    monkeypatch.setattr(train, "sample", one_bad_group)
    done = run(tmp_path / "run", "train.steps=1", "rollout.max_draws=2")
    assert done.metrics()[1]["skipped"] == 1
    progress = read_progress(done.folder / "checkpoints/step-000001")
    assert (progress.optimizer_steps, progress.skipped_in_a_row) == (0, 1)
