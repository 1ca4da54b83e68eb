"""A run that nobody watches: warnings, numbers that are not finite, too little memory, a full disk.

Most tests are short runs, each disturbed in one place; the run that `calm` left alone says what should have come out.
"""

import math
import re
import resource
import shutil
import weakref
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import train
from data_types import Episode, Progress
from plumbing.checkpoint import read_progress
from plumbing.config import load_config
from plumbing.logbook import Alarms, Logbook
from plumbing.tasks import load_task
from qwen2_model import Qwen2
from rollout import Sampler
from short_run import ROOT, ROWS, Done, resume, run, set_scores


@pytest.fixture(scope="module")
def calm(small, tmp_path_factory) -> Done:
    done = run(tmp_path_factory.mktemp("runs") / "calm", *small)
    assert (done.status, done.complaints) == (0, [])
    return done


HEALTHY = {"reward_correct": 0.4, "groups": 16, "zero_variance": 4, "truncated": 0.1, "logprob_gap": 1e-7}
BOUNDS = [  # metrics that are still fine, metrics that are not, the first setting that the warning names
    ({"zero_variance": 8}, {"zero_variance": 9}, "rollout.group_size"),
    ({"truncated": 0.5}, {"truncated": 0.501}, "rollout.max_new_tokens"),
    *[({"logprob_gap": 1e-5}, {"logprob_gap": gap}, "") for gap in (1.1e-5, math.nan)],
    ({"reward_correct": 0.05}, {"reward_correct": 0.03, "zero_variance": 16}, "train.learning_rate"),  # nor groups
]
FIRST_SETTING = re.compile(r"(?:rollout|train|data)\.(?!py)[\w*]+|$")


def check(alarms: Alarms, capsys, **changes: float | None) -> list[str]:
    alarms.check(HEALTHY | changes, Progress(best=changes.get("best", 0.5), best_step=7))
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("inside", "outside", "setting"), BOUNDS, ids=[str(row[1]) for row in BOUNDS])
def test_a_warning_comes_just_past_its_bound_and_once(inside, outside, setting, capsys):
    alarms = Alarms(load_config(ROOT / "config_tiny.yml"), load_task("countdown"))
    assert check(alarms, capsys) + check(alarms, capsys, **inside) == []
    (warning,) = check(alarms, capsys, **outside)
    assert FIRST_SETTING.search(warning).group() == setting
    assert ("checkpoints/best-000007" in warning) == ("reward_correct" in outside)
    assert check(alarms, capsys, **outside) == []


def test_several_warnings_at_once(capsys):
    alarms = Alarms(load_config(ROOT / "config_tiny.yml", ["model.dtype=bfloat16"]), load_task("countdown"))
    assert check(alarms, capsys, logprob_gap=0.02) == [], "real Qwen2.5 weights in bf16 have 0.011"
    outside = {"zero_variance": 15, "truncated": 1.0, "logprob_gap": 0.06}
    assert len(set(check(alarms, capsys, **outside))) == 3


BEST, START = "checkpoints/best-000001", "the model it started from"
ENDS = [  # the score after 0, 1, ... steps; what fails when the best weights are saved; what is said to be the best
    ([0.2, 0.5, 0.4, 0.1], None, [BEST]),
    ([0.5, 0.4, 0.4, 0.1], None, [START]),
    ([0.4, 0.5, 0.4, 0.1], TypeError("of a library"), [START]),
    ([0.2, 0.3, 0.5, 0.49], None, []),
]


@pytest.mark.parametrize(("scores", "error", "promises"), ENDS)
def test_a_run_that_ends_worse_than_its_best_says_where_it_is(scores, error, promises, small, tmp_path, monkeypatch):
    set_scores(monkeypatch, scores)
    if error:
        monkeypatch.setattr("plumbing.checkpoint.save_best", Mock(side_effect=error))
    done = run(tmp_path / "run", *small)
    found = re.findall(f"checkpoints/best-0*1|{START}", "\n".join([*done.complaints, *done.printed[-3:]]))
    assert (done.status, found, (done.folder / BEST).exists()) == (0, promises, BEST in promises)


def test_a_damaged_model_is_given_up_after_three_skipped_steps(small, tmp_path):
    """nan logits earn nothing, so the loss is a clean 0.0 and such a run went on to its end without a word."""
    model = shutil.copytree(small[0].partition("=")[2], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][5] = math.nan
    save_file(weights, model / "model.safetensors")
    hopeless = run(tmp_path / "run", *small, "train.steps=6", f"model.path={model}", "checkpoint.every=0")
    assert (hopeless.status, [m.get("skipped") for m in hopeless.metrics()]) == (2, [None, 1, 1, 1])
    assert FIRST_SETTING.search(hopeless.complaints[-1]).group() == "train.learning_rate"
    assert hopeless.tensors(3) == hopeless.tensors(model)
    assert resume(hopeless.folder).status == 2, "a count that only had to equal the bound has passed it"


@pytest.mark.parametrize("place", ["advantage", "logprob", "gradient", "norm", "loss", "second update"])
def test_one_bad_number_in_one_step_costs_that_step_and_no_more(place, small, calm, tmp_path, monkeypatch):
    """One nan that gets into AdamW's averages is there for good; clipping by its norm spreads it to every weight."""
    calls, accumulate_gradient = count(1), train.accumulate_gradient
    updates, objective = (2, "clipped") if place == "second update" else (1, "reinforce")

    def accumulate(policy: Qwen2, episodes: list[Episode], *others: object) -> dict:
        now = place if next(calls) == 2 * updates else ""  # the last update of step 2
        if now == "advantage":
            episodes[7].advantage = math.nan
        if now == "logprob":
            episodes[9].old_logprobs[0] = math.nan  # `reinforce` does not look at it: its gradient is finite
        stats = accumulate_gradient(policy, episodes, *others)
        if now in ("gradient", "second update"):
            policy.layers[0].mlp.down_proj.weight.grad[3, 4] = math.inf
        if now == "norm":
            policy.layers[0].mlp.down_proj.weight.grad.fill_(1e38)  # whose squares are infinite
        return stats | {"loss": -math.inf} if now == "loss" else stats  # as from a token whose probability is 0

    monkeypatch.setattr(train, "accumulate_gradient", accumulate)
    done = run(tmp_path / "run", *small, f"train.objective={objective}", f"train.updates_per_batch={updates}")
    progress = [read_progress(done.folder / f"checkpoints/step-00000{step}") for step in (2, 3)]
    assert (done.status, [m.get("skipped") for m in done.metrics()]) == (0, [None, 0, 1, 0])
    assert [(p.skipped_in_a_row, p.optimizer_steps) for p in progress] == [(1, 2 * updates - 1), (0, 3 * updates - 1)]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert done.tensors(2, file) != done.tensors(3, file)
        assert (done.tensors(2, file) == done.tensors(1, file)) == (updates == 1)
    assert updates == 2 or done.samples()[: 2 * ROWS] == calm.samples()[: 2 * ROWS]


def small_card(patch, after: Path | None = None, **most: float) -> None:
    """A forward of more tokens runs out of memory, once the metrics `after` have a step. An exception
    holds its frames, and they their tensors: these must be gone before the next attempt."""
    forward, held = Qwen2.forward, []

    def limited(self: Qwen2, tokens: Tensor, *others: Any, **named: Any) -> Tensor:
        phase = "update" if torch.is_grad_enabled() else "rollout"
        size = tokens.numel() if phase == "update" else len(tokens) * 26  # a row has up to 26 tokens
        if size > most.get(phase, math.inf) and (not after or after.read_text().count("\n") > 1):
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            if len(held) == 1:
                torch.empty(2**60)  # no machine holds it
            raise RuntimeError("out of memory" if phase == "update" else "CUBLAS_STATUS_ALLOC_FAILED")
        return forward(self, tokens, *others, **named)

    def empty_cache() -> None:
        assert [reference() for reference in held] == [None] * len(held)

    patch.setattr(Qwen2, "forward", limited)
    patch.setattr(torch.cuda, "empty_cache", empty_cache)


NO_MEMORY = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))


def amid_an_update(patch) -> None:
    """Two micro-batches have left their gradient when the third fails, in backward: added again, they count double."""
    logits, calls = Qwen2.logits, count(1)  # in forward and again in backward
    failing = lambda: torch.is_grad_enabled() and next(calls) == 6  # noqa: E731
    patch.setattr(Qwen2, "logits", lambda *of: NO_MEMORY() if failing() else logits(*of))


def no_graphs(patch) -> None:
    """Some drivers and debuggers refuse to capture a graph; torch 2.11 must then be told that the capture is over."""
    init, refused = Sampler.__init__, RuntimeError("CUDA error: operation not permitted when stream is capturing")
    patch.setattr(Sampler, "__init__", lambda self, *others: (init(self, *others), setattr(self, "graphs", True))[0])
    for name in ("CUDAGraph", "graph_pool_handle", "current_stream", "current_device", "stream"):
        patch.setattr(torch.cuda, name, MagicMock())
    patch.setattr(torch.cuda, "graph", Mock(side_effect=refused))
    patch.setattr(torch._C, "_cuda_endAllocateToPool", Mock(), raising=False)


TROUBLES = {  # what the warnings name, and what happens
    # of the rows of up to 26 tokens four fit in a rollout, in an update one
    "8 rows, 4 rows, 128 tokens, 64 tokens, 32 tokens, 23 tokens": partial(small_card, rollout=110, update=30),
    "128 tokens": amid_an_update,
    "without CUDA graphs": no_graphs,
}


@pytest.mark.parametrize("words", TROUBLES)
def test_a_run_that_had_to_try_again_ends_as_if_undisturbed(words, small, calm, tmp_path, monkeypatch):
    TROUBLES[words](monkeypatch)
    done = run(tmp_path / "run", *small, "train.tokens_per_microbatch=256")
    assert (done.status, done.samples()) == (0, calm.samples())
    assert len(done.complaints) == len(words.split(", ")), done.complaints
    assert all(word in line for word, line in zip(words.split(", "), done.complaints, strict=True))
    for mine, theirs in zip(done.metrics(), calm.metrics(), strict=True):
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    folders = small[0].partition("=")[2], done.folder / "final", calm.folder / "final"
    start, mine, theirs = (load_file(f"{folder}/model.safetensors") for folder in folders)
    for name, expected in theirs.items():
        assert (mine[name] - expected).norm() <= 1e-5 * expected.norm() < (expected - start[name]).norm()


TOO_LITTLE = {  # how memory runs out; the first setting to change; the steps that are saved
    "sampling": (partial(small_card, rollout=10), "train.optimizer", [1]),
    "update": (partial(small_card, update=10), "train.optimizer", [1]),
    # too late
    "optimizer": (lambda patch, _: patch.setattr("optimizer.AdamW._update", NO_MEMORY), "train.optimizer", []),
    "loading": (lambda patch, _: patch.setattr("plumbing.model_folder.load_model", NO_MEMORY), "train.optimizer", []),
}


@pytest.mark.parametrize("place", TOO_LITTLE)
def test_where_memory_is_too_little_a_run_is_saved_and_says_what_to_change(place, small, calm, tmp_path, monkeypatch):
    disturb, setting, steps = TOO_LITTLE[place]
    disturb(monkeypatch, tmp_path / "run" / "metrics.jsonl")
    done = run(tmp_path / "run", *small, "checkpoint.every=0")
    assert (done.status, FIRST_SETTING.search(done.complaints[-1]).group()) == (2, setting)
    assert 3 <= len(done.complaints) <= 8 if steps else len(done.complaints) == 1
    assert len([*done.folder.glob("checkpoints/*")]) == len(steps)
    assert all(done.tensors(step) == calm.tensors(step) for step in steps)


def test_any_other_error_of_a_gpu_is_not_swallowed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen2, "forward", Mock(side_effect=[RuntimeError("CUDA error: illegal, while capturing")]))
    with pytest.raises(RuntimeError, match="illegal"):  # at the first attempt
        run(tmp_path / "run", *small)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_goes_on_while_its_disk_is_full_and_catches_up_after(small, calm, tmp_path, monkeypatch, request):
    """Full during step 2, for all its files (by a limit of the kernel: it takes half a line, then none). TensorBoard's
    writer does not live through that, and its errors kept all later samples from being written."""
    write_step, limits = Logbook.write_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: Logbook, step: int, *others: Any) -> None:
        write_step(self, step, *others)
        room = (self.folder / "metrics.jsonl").stat().st_size + 100 if step == 1 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

    monkeypatch.setattr(Logbook, "write_step", limited)
    # TensorBoard writes at once instead of after two minutes
    monkeypatch.setattr("plumbing.logbook.SummaryWriter", partial(SummaryWriter, flush_secs=0.05))
    request.addfinalizer(partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    left = run(tmp_path / "run", *small, "checkpoint.every=0")
    assert [str(left.folder) in line for line in left.complaints] == [True]
    assert (left.status, left.metrics(), left.samples()) == (0, calm.metrics(), calm.samples())
    assert left.tensors("final") == calm.tensors("final")
