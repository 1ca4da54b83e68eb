"""A run that nobody watches: warnings, numbers that are not finite, too little memory, a full disk.

Most tests are short runs of the tiny config, each disturbed in one place; the run that `calm` left alone says what
should have come out.
"""

import math
import re
import resource
import shutil
import traceback
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import ROOT, ROWS, Done, resume, run, set_scores
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import grpo
import train
from alarms import Alarms
from checkpoint import read_progress
from config import load_config
from countdown_task import ASSISTANT_PREFIX as PREFIX
from data_types import Episode, Progress, RolloutSettings, UserError
from logbook import Logbook
from qwen2_model import Qwen2
from rollout import Response, Sampler
from task import load_task


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Done:
    done = run(tmp_path_factory.mktemp("runs") / "calm")
    assert (done.status, done.complaints) == (0, [])
    return done


HEALTHY = {"reward_correct": 0.4, "groups": 16, "zero_variance": 4, "truncated": 0.1, "entropy": 1, "logprob_gap": 1e-7}
BOUNDS = [  # metrics that are still fine, metrics that are not, the first setting that the warning names
    ({"zero_variance": 8}, {"zero_variance": 9}, "rollout.group_size"),
    ({"entropy": 0.1}, {"entropy": 0.0999}, "train.learning_rate"),
    ({"truncated": 0.5}, {"truncated": 0.501}, "rollout.max_new_tokens"),
    ({"logprob_gap": 1e-5}, {"logprob_gap": 1.1e-5}, ""),
    ({"logprob_gap": 1e-6}, {"logprob_gap": math.nan}, ""),
    ({"eval_greedy": 0.4}, {"eval_greedy": 0.39}, "train.learning_rate"),
    ({"eval_greedy": 0.3, "eval_greedy_se": 0.06}, {"eval_greedy": 0.2}, "train.learning_rate"),
    ({"best": 10.0, "eval_greedy": 8.1}, {"best": 10.0, "eval_greedy": 7.9}, "train.learning_rate"),  # its own scale
    ({"best": -5.0, "eval_greedy": -5.9}, {"best": -5.0, "eval_greedy": -6.1}, "train.learning_rate"),
    ({"reward_correct": 0.05}, {"reward_correct": 0.03, "zero_variance": 16}, "train.learning_rate"),  # nor groups
]
FIRST_SETTING = re.compile(r"(?:rollout|train|data)\.(?!py)[\w*]+|$")


def check(alarms: Alarms, capsys, **changes: float | None) -> list[str]:
    """The warnings about the healthy metrics with these changes."""
    alarms.check(HEALTHY | changes, Progress(best=changes.get("best", 0.5), best_step=7))
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("inside", "outside", "setting"), BOUNDS, ids=[str(row[1]) for row in BOUNDS])
def test_a_warning_comes_just_past_its_bound_and_once(inside, outside, setting, capsys):
    """A bound that is off, or a warning at every step, and nobody reads them any more."""
    alarms = Alarms(load_config(ROOT / "config_tiny.yml"), load_task("countdown"))
    assert check(alarms, capsys, entropy=math.nan) + check(alarms, capsys) + check(alarms, capsys, **inside) == []
    (warning,) = check(alarms, capsys, **outside)
    assert warning.startswith("warning: ")
    assert FIRST_SETTING.search(warning).group() == setting
    assert ("checkpoints/best-000007" in warning) == bool(outside.keys() & {"reward_correct", "eval_greedy"})
    assert check(alarms, capsys, **outside) == []


def test_what_takes_several_steps_or_several_warnings(capsys):
    """A reward stuck at 0 or 0.1 looks like a slow start; a run that goes wrong goes wrong in several ways."""
    alarms = Alarms(load_config(ROOT / "config_tiny.yml", ["model.dtype=bfloat16"]), load_task("countdown"))
    for _ in range(2):  # one right answer starts the count anew
        assert [check(alarms, capsys, reward_correct=value) for value in [1 / 256] + [0.0] * 9] == [[]] * 10
    (warning,) = check(alarms, capsys, reward_correct=0.0)
    assert FIRST_SETTING.search(warning).group() == "data.*"
    assert check(alarms, capsys, logprob_gap=0.02) == [], "real Qwen2.5 weights in bf16 have 0.011"
    outside = {"zero_variance": 15, "truncated": 1.0, "entropy": 0.001, "logprob_gap": 0.06, "eval_greedy": 0.0}
    assert len(set(check(alarms, capsys, **outside))) == 5


@pytest.mark.parametrize(("successes", "full", "best"), [
    ([0.2, 0.5, 0.4, 0.1], False, "checkpoints/best-000001"),
    ([0.5, 0.4, 0.4, 0.1], False, "the model it started from"),
    ([0.4, 0.5, 0.4, 0.1], True, "the model it started from"),
    ([0.2, 0.3, 0.5, 0.49], False, None),
])  # fmt: skip
def test_a_run_that_ends_worse_than_its_best_says_where_the_best_is(successes, full, best, tmp_path, monkeypatch):
    """A promise of weights that are not there: they were never saved, or the disk was full."""
    set_scores(monkeypatch, successes)
    if full:
        monkeypatch.setattr("run.save_best", Mock(side_effect=UserError("no space left")))
    done = run(tmp_path / "run", "eval.every=1")
    lines = [*done.complaints, *done.printed[-3:]]
    promises = [line for line in lines if "checkpoints/best" in line or "the model it started from" in line]
    assert len(promises) == (2 if best else 0)  # in the alarm and at the end
    assert all(best in line for line in promises)
    assert (done.folder / "checkpoints/best-000001/model.safetensors").exists() == (best == "checkpoints/best-000001")


def test_a_damaged_model_is_given_up_after_three_skipped_steps(tmp_path):
    """nan logits earn nothing, so the loss is a clean 0.0 and such a run went on to its end without a word."""
    model = shutil.copytree(ROOT / "tiny", tmp_path / "model")
    weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    weights["model.norm.weight"][5] = math.nan
    save_file(weights, model / "model.safetensors")
    hopeless = run(tmp_path / "run", "train.steps=6", f"model.path={model}", "checkpoint.every=0")
    assert (hopeless.status, [m.get("skipped") for m in hopeless.metrics()]) == (2, [None, 1, 1, 1])
    assert re.findall(r"skipped/step-00000(\d)\.json", "\n".join(hopeless.complaints)) == ["1", "2", "3"]
    assert FIRST_SETTING.search(hopeless.complaints[-1]).group() == "train.learning_rate"
    assert hopeless.tensors(3) == hopeless.tensors(model)
    for step in (1, 2, 3):  # without its episodes nobody finds out what made the numbers go wrong
        assert [math.isnan(sum(episode["old_logprobs"])) for episode in hopeless.skipped(step)] == [True] * ROWS
    assert resume(hopeless.folder).status == 2, "a count that only had to equal the bound has passed it"


BAD_NUMBERS = {  # where the bad number is, in step 2; more settings
    **dict.fromkeys(("gradient", "advantage", "logprob", "loss"), ()),
    "second update": ("train.objective=clipped", "train.updates_per_batch=2"),
    "group without variance": ("rollout.max_draws=2",),  # dynamic sampling left it out, and the weights moved
}


@pytest.mark.parametrize("place", BAD_NUMBERS)
def test_one_bad_number_in_one_step_costs_that_step_and_no_more(place, calm, tmp_path, monkeypatch):
    """One nan that gets into AdamW's averages is there for good; clipping by its norm spreads it to every weight."""
    calls, choose_groups, accumulate_gradient = [], train.choose_groups, grpo.accumulate_gradient

    def choose(episodes: list[Episode], settings: RolloutSettings) -> list[Episode]:
        if (place, len(calls)) == ("advantage", 1):
            episodes[7].advantage = math.nan
        if (place, len(calls)) == ("logprob", 1):
            episodes[9].old_logprobs[1] = math.nan  # `reinforce` does not look at it: its gradient is finite
        for episode in episodes[:4] if (place, len(calls)) == ("group without variance", 1) else []:
            episode.old_logprobs, episode.advantage = [math.nan] * len(episode.response_ids), 0.0
        return choose_groups(episodes, settings)

    def accumulate(policy: Qwen2, episodes: list[Episode], *others: object) -> dict:
        calls.append(len(episodes))
        stats = accumulate_gradient(policy, episodes, *others)
        if (place, len(calls)) in (("gradient", 2), ("second update", 4)):
            policy.layers[0].mlp.down_proj.weight.grad[3, 4] = math.inf
        # as from a token whose probability is 0: its gradient is finite
        return stats | {"loss": -math.inf} if (place, len(calls)) == ("loss", 2) else stats

    monkeypatch.setattr(train, "choose_groups", choose)
    monkeypatch.setattr(grpo, "accumulate_gradient", accumulate)
    done = run(tmp_path / "run", *BAD_NUMBERS[place])
    progress = [read_progress(done.folder / f"checkpoints/step-00000{step}") for step in (2, 3)]
    assert [m.get("skipped") for m in done.metrics()] == [None, 0, 1, 0]
    assert [p.skipped_in_a_row for p in progress] == [1, 0]
    assert sum(str(done.folder / "skipped" / "step-000002.json") in line for line in done.complaints) == 1
    assert len(done.skipped(2)) == 4 * done.metrics()[2]["groups"]
    if place != "second update":  # there the first one counts
        assert [p.optimizer_steps for p in progress] == [1, 2]
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert done.tensors(2, file) == done.tensors(1, file) != done.tensors(3, file)
    if not BAD_NUMBERS[place]:
        assert (calls, done.metrics()[:2], done.tensors(1)) == ([ROWS] * 3, calm.metrics()[:2], calm.tensors(1))
        assert [s["response"] for s in calm.samples()[ROWS:][:ROWS]] == [PREFIX + e["text"] for e in done.skipped(2)]


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


def amid_an_update(patch) -> None:
    """Two micro-batches have left their gradient when the third fails, in backward: added again, they count double."""
    logits, calls = Qwen2.logits, []

    def flaky(self: Qwen2, *hidden: Tensor) -> Tensor:
        calls.extend([1] * torch.is_grad_enabled())
        if torch.is_grad_enabled() and len(calls) == 6:  # in forward and again in backward
            assert "backward" in {frame.name for frame in traceback.extract_stack()}
            raise torch.OutOfMemoryError
        return logits(self, *hidden)

    patch.setattr(Qwen2, "logits", flaky)


def no_graphs(patch) -> None:
    """Some drivers and debuggers refuse to capture a graph; torch 2.11 must then be told that the capture is over."""
    init, refused = Sampler.__init__, RuntimeError("CUDA error: operation not permitted when stream is capturing")
    patch.setattr(Sampler, "__init__", lambda self, *others: (init(self, *others), setattr(self, "graphs", True))[0])
    for name in ("CUDAGraph", "graph_pool_handle", "current_stream", "current_device", "stream"):
        patch.setattr(torch.cuda, name, MagicMock())
    patch.setattr(torch.cuda, "graph", Mock(side_effect=refused))
    patch.setattr(torch._C, "_cuda_endAllocateToPool", Mock(), raising=False)


TROUBLES = {  # what happens, and what the warnings name
    # of the rows of up to 64 tokens four fit in a rollout, in an update one, or two short ones
    "small": (lambda patch: small_card(patch, rollout=270, update=70), "4 rows, 1024, 512, 256, 128, 64 tokens"),
    "late": (amid_an_update, "1024 tokens"),
    "graphs": (no_graphs, "without CUDA graphs"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_run_that_had_to_try_again_ends_as_if_undisturbed(trouble, calm, tmp_path, monkeypatch):
    """What fits is kept: forgotten, it would be found again at each step at the price of failed attempts."""
    disturb, words = TROUBLES[trouble]
    disturb(monkeypatch)
    done = run(tmp_path / "run")
    assert (done.status, done.samples(), len(done.complaints)) == (0, calm.samples(), len(words.split(", ")))
    assert all(word in "\n".join(done.complaints) for word in words.split(", "))
    for mine, theirs in zip(done.metrics(times=True), calm.metrics(), strict=True):
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        sampled = mine.get("response_length", 0) * ROWS  # the tokens of a failed attempt are not counted
        rate, seconds = (mine.get(f"rollout_{key}", 0) for key in ("tokens_per_second", "seconds"))
        assert rate * seconds == pytest.approx(sampled)
    folders = ROOT / "tiny", done.folder / "final", calm.folder / "final"
    start, mine, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    for name, expected in theirs.items():
        assert (mine[name] - expected).norm() <= 1e-5 * expected.norm() < (expected - start[name]).norm()


NO_MEMORY = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
TOO_LITTLE = {  # how memory runs out; the first setting to change; the steps that are saved
    # sampling needs room for a group, the update for one row
    "sampling": (lambda patch, metrics: small_card(patch, metrics, rollout=10), "rollout.max_new_tokens", [1]),
    "update": (lambda patch, metrics: small_card(patch, metrics, update=10), "rollout.max_new_tokens", [1]),
    "optimizer": (lambda patch, metrics: patch.setattr("optimizer.AdamW.step", NO_MEMORY), "train.optimizer", [0]),
    "loading": (lambda patch, metrics: patch.setattr("run.load_model", NO_MEMORY), "train.optimizer", []),
}


@pytest.mark.parametrize("place", TOO_LITTLE)
def test_where_memory_is_too_little_a_run_is_saved_and_says_what_to_change(place, calm, tmp_path, monkeypatch):
    """Halving without an end, or a traceback and all steps lost."""
    disturb, setting, steps = TOO_LITTLE[place]
    disturb(monkeypatch, tmp_path / "run" / "metrics.jsonl")
    done = run(tmp_path / "run", "checkpoint.every=0")
    assert (done.status, FIRST_SETTING.search(done.complaints[-1]).group()) == (2, setting)
    assert 3 <= len(done.complaints) <= 7 if steps == [1] else len(done.complaints) == 1
    assert [path.name for path in done.folder.glob("checkpoints/*")] == [f"step-{step:06d}" for step in steps]
    assert all(done.tensors(step) == calm.tensors(step) for step in steps if step)


def test_the_smallest_micro_batch_is_the_longest_row_that_is_run(tmp_path, monkeypatch):
    """The longest responses are often all wrong, or truncated and masked, and so not run: sized by them, the smallest
    micro-batch held two rows of the others, and a run was given up that one row at a time would have saved."""

    def generate(self: Sampler, prompts: list, uniforms: Tensor, *others: object) -> list[Response]:
        lengths = [10 if row < 4 else 48 for row in range(len(uniforms))]
        return [Response([5] * length, [-1.0] * length, truncated=length == 48) for length in lengths]

    monkeypatch.setattr(Sampler, "generate", generate)
    rewards = [{"correct": float(n % 2 and n % 16 < 12)} for n in range(99)]
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_goes_on_while_its_disk_is_full_and_catches_up_after(calm, tmp_path, monkeypatch, request):
    """Full during step 2, for all its files (a limit that the kernel keeps: it takes half a line, then none).

    TensorBoard's writer does not live through that: its errors kept the samples of all later steps from being written.
    """
    write_step, limits = Logbook.write_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: Logbook, step: int, *others: Any) -> None:
        write_step(self, step, *others)
        room = (self.folder / "metrics.jsonl").stat().st_size + 100 if step == 1 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    monkeypatch.setattr(Logbook, "write_step", limited)
    monkeypatch.setattr("logbook.SummaryWriter", partial(SummaryWriter, flush_secs=0.05))  # else it waits two minutes
    request.addfinalizer(partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    left = run(tmp_path / "run", "checkpoint.every=0")
    assert [str(left.folder) in line for line in left.complaints if line.startswith("warning")] == [True]
    assert (left.status, left.metrics(), left.samples()) == (0, calm.metrics(), calm.samples())
    assert left.tensors("final") == calm.tensors("final")
