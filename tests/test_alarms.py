"""A run that nobody watches: warnings, numbers that are not finite, too little memory, hostile answers, a full disk.

Most tests are short real runs of the tiny config, each disturbed in one place; the run that `calm` left alone says what
should have come out.
"""

import contextlib
import dataclasses
import errno
import html
import io
import json
import math
import re
import shutil
import subprocess
import sys
import traceback
import unicodedata
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_policy import UNCUT, VOCABULARY, small_policy
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from torch import Tensor

import alarms
import grpo
import logbook
import train
from data_types import Config, Episode, Problem, UserError, load_config
from logbook import Logbook, printable
from memory import fit_in_memory
from optimizer import AdamW
from qwen2_model import Qwen2, causal_attention
from rollout import Answer
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ROWS = 16  # answers a step
SETTINGS = [f"model.path={ROOT / 'tiny'}", f"data.path={ROOT / 'tiny' / 'problems.parquet'}", "rollout.group_size=4",
            "rollout.questions_per_step=4", "rollout.max_new_tokens=48", "train.steps=3", "eval.size=8", "eval.every=0",
            "checkpoint.every=0", "train.threads=1", f"output.samples={ROWS}"]
EVERY_STEP = ["checkpoint.every=1", "checkpoint.keep=9"]


@dataclasses.dataclass
class Done:
    """What a run left behind."""

    folder: Path
    status: int
    printed: str
    complaints: list[str]  # lines on stderr

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, without the times; NaN and Infinity, which are no JSON, are refused."""
        def refuse(token: str) -> None:
            raise AssertionError(f"{token} in metrics.jsonl")

        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line, parse_constant=refuse).items() if "second" not in k}
                for line in lines]

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def weights(self, step: int) -> dict[str, Tensor]:
        return load_file(self.checkpoint(step) / "model.safetensors")

    def skipped(self, step: int) -> list[dict]:
        """The episodes of the batch that was not learnt from."""
        return json.loads((self.folder / "skipped" / f"step-{step:06d}.json").read_text())

    @property
    def samples(self) -> bytes:
        return (self.folder / "samples.txt").read_bytes()


def run(folder: Path, *overrides: str, resume: bool = False) -> Done:
    """Train in this process, in `folder`."""
    which = ["--resume", str(folder)] if resume else ["--name", folder.name, f"output.folder={folder.parent}"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train.main(["--config", str(ROOT / "config_tiny.yml"), *which, *SETTINGS, *overrides])
    return Done(folder, status, out.getvalue(), err.getvalue().splitlines())


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Done:
    """The run that nothing disturbs."""
    done = run(tmp_path_factory.mktemp("runs") / "calm", *EVERY_STEP)
    assert done.status == 0
    return done


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, nan too."""
    return left.keys() == right.keys() and all(
        left[name].numpy().tobytes() == right[name].numpy().tobytes() for name in left)


# ------------------------------------------------------------------------------------------------------ warnings

HEALTHY = {"success": 0.4, "groups": 16, "zero_spread": 4, "truncated": 0.1, "entropy": 1.0, "logprob_gap": 1e-7}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(str(ROOT / "config_tiny.yml"))


def warnings(watch: alarms.Alarms, capsys, best: float = 0.5, **changes: float | None) -> list[str]:
    """What is said about the healthy metrics with these changes."""
    watch.check({**HEALTHY, **changes}, best)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("inside", "outside", "advice"), [
    ({"zero_spread": 8}, {"zero_spread": 9}, r"most groups have no spread.*rollout\.group_size or rollout\.most_draws"),
    ({"zero_spread": 7, "groups": 15}, {"zero_spread": 8, "groups": 15}, "most groups have no spread.*"),
    ({"entropy": 0.1}, {"entropy": math.nextafter(0.1, 0)},
     r"the entropy is below a tenth of what it was.*lower train\.learning_rate, or raise train\.clip_high.*"),
    ({"truncated": 0.5}, {"truncated": 0.5 + 2**-53},
     r"more than half of the answers are cut off: raise rollout\.max_new_tokens.*train\.truncated=penalize"),
    ({"logprob_gap": 1e-5}, {"logprob_gap": 1.5e-5},
     r"the trainer's logprobs are 1\.5e-05 away from the sampler's \(bound 1e-05\).*"),
    ({"logprob_gap": 1e-5}, {"logprob_gap": math.nan}, "the trainer's logprobs are nan away .*"),
    ({"eval_success": 0.4, "eval_success_se": 0.025}, {"eval_success": 0.375, "eval_success_se": 0.025},
     r"held-out success has fallen to 0\.375 from 0\.5: the best weights are kept in checkpoints/best-\*.*"),
    ({"eval_success": 0.25, "eval_success_se": 0.0625}, {"eval_success": 0.2421875, "eval_success_se": 0.0625},
     r"held-out success has fallen to 0\.2421875 from 0\.5.*"),
])
def test_a_warning_comes_just_past_its_bound_and_once(config, inside, outside, advice, capsys):
    """A bound that is off, or a warning at every step, and nobody reads them any more."""
    watch = alarms.Alarms(config)
    assert warnings(watch, capsys) == []
    assert warnings(watch, capsys, **inside) == []
    told = warnings(watch, capsys, **outside)
    assert len(told) == 1 and re.fullmatch(f"warning: {advice}", told[0]), told
    assert warnings(watch, capsys, **outside) == []


def test_a_bf16_model_is_allowed_a_wider_gap_than_an_fp32_one(config, capsys):
    """With the fp32 bound every bf16 run would be called broken in its first step."""
    watch = alarms.Alarms(dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16")))
    assert warnings(watch, capsys, logprob_gap=0.01) == []
    assert "(bound 0.01)" in warnings(watch, capsys, logprob_gap=0.0101)[0]


def test_ten_steps_in_a_row_without_a_right_answer_are_told_nine_are_not(config, capsys):
    """A reward stuck at 0 or 0.1 looks like a slow start; and one right answer starts the count anew."""
    watch = alarms.Alarms(config)
    for _ in range(2):
        assert [warnings(watch, capsys, success=0.0) for _ in range(9)] == [[]] * 9
        assert warnings(watch, capsys, success=1 / 256) == []
    told = [warnings(watch, capsys, success=0.0) for _ in range(15)]
    assert told[:9] == [[]] * 9 and told[10:] == [[]] * 5
    assert len(told[9]) == 1 and told[9][0].startswith("warning: no right answer in 10 steps"), told[9]


def test_one_warning_does_not_keep_another_from_being_told(config, capsys):
    """A run that goes wrong goes wrong in several ways: all six are told, those of one step too."""
    watch = alarms.Alarms(config)
    assert len(warnings(watch, capsys, truncated=0.9)) == 1
    for _ in range(9):
        warnings(watch, capsys, success=0.0)
    told = warnings(watch, capsys, success=0.0, zero_spread=16, truncated=1.0, entropy=0.001, logprob_gap=1.0,
                    eval_success=0.0, eval_success_se=0.0)
    assert len(told) == len(set(told)) == 5, told


def test_the_metrics_of_a_healthy_run_give_no_warning(config, calm, capsys):
    """A false alarm in every good run: shown by a real run, and by the course of the embedded demo's 80 steps."""
    assert calm.complaints == []
    watch = alarms.Alarms(config)
    for step in range(80):
        part = step / 79
        changes = {"success": 0.2 + 0.7 * part, "entropy": 0.15 - 0.06 * part, "truncated": 0.26 - 0.2 * part,
                   "zero_spread": round(8 * part), "logprob_gap": 1e-7}
        if step % 20 == 0:
            changes |= {"eval_success": 0.9 - 0.08 * (step % 40 == 0), "eval_success_se": 0.0133}
        assert warnings(watch, capsys, best=0.9, **changes) == []


def test_a_step_without_any_spread_has_no_entropy_to_judge(config, capsys):
    """No row is run for such a batch, so these metrics are None: no TypeError, and the first number still counts."""
    watch = alarms.Alarms(config)
    nothing = {"entropy": None, "logprob_gap": None}
    assert warnings(watch, capsys, **nothing) == []
    assert warnings(watch, capsys, entropy=1.0) == []
    assert warnings(watch, capsys, **nothing) == []
    assert len(warnings(watch, capsys, entropy=0.09)) == 1


def test_a_first_step_that_is_not_finite_does_not_disarm_the_entropy_alarm(config, capsys):
    """Compared with nan, no later entropy is small: the alarm would be off for the whole run."""
    watch = alarms.Alarms(config)
    warnings(watch, capsys, entropy=math.nan)
    assert warnings(watch, capsys, entropy=1.0) == []
    assert len(warnings(watch, capsys, entropy=0.09)) == 1


# ----------------------------------------------------------------------------------------- numbers that are not finite

@pytest.fixture(scope="module")
def hopeless(tmp_path_factory) -> tuple[Done, Path]:
    """A run whose model is damaged from the start, and the model's folder."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(ROOT / "tiny", folder / "model")
    weights = load_file(ROOT / "tiny" / "model.safetensors")
    weights["model.norm.weight"][5] = math.nan
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return run(folder / "run", "train.steps=6", f"model.path={folder / 'model'}"), folder / "model"


def test_a_damaged_model_is_given_up_after_three_skipped_steps(hopeless):
    """nan logits earn nothing, so the loss is a clean 0.0 and such a run went on to its end without a word."""
    done, model = hopeless
    assert done.status == 2
    assert [m["step"] for m in done.metrics] == [0, 1, 2, 3] and [m["skipped"] for m in done.metrics[1:]] == [1, 1, 1]
    *others, last = done.complaints
    assert re.fullmatch(r"train\.py: 3 steps in a row .* not finite: train\.learning_rate is too high, the weights it "
                        r"began with are damaged, or the GPU is faulty; see the folder skipped", last), last
    skips = [line for line in others if "skipped" in line]
    assert [re.search(r"step (\d) skipped.*step-00000(\d)\.json$", line).groups() for line in skips] == [
        ("1", "1"), ("2", "2"), ("3", "3")]
    assert all(line.startswith("warning: ") for line in others)
    assert same(done.weights(3), {k: v.float() for k, v in load_file(model / "model.safetensors").items()})


def test_the_batch_of_a_skipped_step_can_be_looked_into(hopeless):
    """Without the answers themselves nobody finds out which of them made the numbers go wrong."""
    done, _ = hopeless
    for step in (1, 2, 3):
        episodes = done.skipped(step)
        assert len(episodes) == ROWS
        assert episodes[0].keys() == {field.name for field in dataclasses.fields(Episode)}
        assert all(len(e["logprobs"]) == len(e["response_ids"]) > 0 for e in episodes)
        assert any(math.isnan(logprob) for e in episodes for logprob in e["logprobs"])
    firsts = [done.skipped(step)[0]["problem"] for step in (1, 2, 3)]
    assert firsts[0] != firsts[1] != firsts[2]


def test_a_run_that_was_given_up_is_given_up_again_when_resumed(hopeless, tmp_path):
    """Its checkpoint says three skips in a row; a count that only has to equal the bound has passed it for good."""
    done, model = hopeless
    folder = shutil.copytree(done.folder, tmp_path / "run")
    again = run(folder, "train.steps=6", f"model.path={model}", resume=True)
    assert again.status == 2 and again.metrics[-1]["step"] <= 6
    assert "steps in a row" in again.complaints[-1]


@pytest.mark.parametrize("place", ["gradient", "advantage", "logprob", "loss"])
def test_one_bad_number_in_one_step_costs_that_step_and_no_more(place, calm, tmp_path, monkeypatch):
    """One nan that gets into AdamW's averages is there for good; clipping by its norm spreads it to every weight."""
    calls = []
    real_accumulate, real_generate = train.accumulate_gradient, train.generate

    def accumulate(policy: Qwen2, episodes: list[Episode], *others: object) -> dict:
        calls.append(len(episodes))
        if place == "advantage" and len(calls) == 2:
            episodes[7].advantage = math.nan
        figures = real_accumulate(policy, episodes, *others)
        if place == "gradient" and len(calls) == 2:
            policy.layers[0].down.weight.grad[3, 4] = math.inf
        if place == "loss" and len(calls) == 2:
            figures["loss"] = -math.inf  # as from a token whose probability is 0: its gradient is finite
        return figures

    def generate(*arguments: object, **named: object) -> list[Answer]:
        answers = real_generate(*arguments, **named)
        if place == "logprob" and len(answers) == ROWS and len(calls) == 1:
            answers[9].logprobs[1] = math.nan  # the plain objective does not look at it: its gradient is finite
        return answers

    monkeypatch.setattr(train, "accumulate_gradient", accumulate)
    monkeypatch.setattr(train, "generate", generate)
    done = run(tmp_path / "run", *EVERY_STEP)

    assert done.status == 0 and calls == [ROWS] * 3
    assert [m.get("skipped") for m in done.metrics] == [None, 0, 1, 0]
    assert done.metrics[:2] == calm.metrics[:2] and same(done.weights(1), calm.weights(1))
    assert same(done.weights(2), done.weights(1))
    state = [load_file(done.checkpoint(step) / "optimizer.safetensors") for step in (1, 2)]
    assert state[0] and same(*state)
    moved = done.weights(3)
    assert not same(moved, done.weights(2)) and all(t.isfinite().all() for t in moved.values())
    progress = [json.loads((done.checkpoint(step) / "state.json").read_text())["progress"] for step in (1, 2, 3)]
    assert [p["skipped_in_a_row"] for p in progress] == [0, 1, 0]
    assert [p["optimizer_steps"] for p in progress] == [1, 1, 2]
    assert [line for line in done.complaints if "skipped" in line] == [
        "warning: step 2 skipped, its numbers are not finite; the batch: "
        f"{tmp_path / 'run' / 'skipped' / 'step-000002.json'}"]
    seen = calm.samples.decode()  # the weights of step 1 are those of the calm run, so step 2's answers are too
    assert all(f"{printable('<think>' + e['text'])}{'' if e['ended'] else ' [cut off]'}\n\n" in seen
               for e in done.skipped(2))


# ------------------------------------------------------------------------------------------------- too little memory

def small_card(monkeypatch, **room: float) -> dict[str, float]:
    """From now on a forward of more than so many tokens (rows x length) runs out of memory; returns the limits."""
    forward = Qwen2.forward

    def limited(self: Qwen2, tokens: Tensor, positions: Tensor | None = None, attend=causal_attention) -> Tensor:
        length = tokens.shape[1] if positions is None else int(positions.max()) + 1
        if len(tokens) * length > room.get("update" if torch.is_grad_enabled() else "rollout", math.inf):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(self, tokens, positions, attend)

    monkeypatch.setattr(Qwen2, "forward", limited)
    return room


def lowerings(done: Done, what: str) -> list[tuple[int, int]]:
    """The sizes of the warnings about `what`, as (from, to)."""
    found = [re.search(rf"{what} lowered from ([\d,]+) to ([\d,]+), results unchanged", line)
             for line in done.complaints]
    return [tuple(int(number.replace(",", "")) for number in match.groups()) for match in found if match]


def assert_as_calm(done: Done, calm: Done) -> None:
    """The same answers; the same numbers but for how sums over another number of rows round."""
    assert done.status == 0
    assert done.samples == calm.samples
    for mine, theirs in zip(done.metrics, calm.metrics, strict=True):
        gap = mine.pop("logprob_gap", None), theirs.pop("logprob_gap", None)  # nothing but rounding
        assert gap == (None, None) or max(gap) < 1e-6
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    start, weights, expected = load_file(ROOT / "tiny" / "model.safetensors"), done.weights(3), calm.weights(3)
    for name, tensor in expected.items():
        assert (weights[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
        assert (tensor - start[name]).norm() > 0


def after_step(monkeypatch, number: int, action: Callable[[], object]) -> None:
    """Let something happen when that step is done."""
    finish_step = train.finish_step

    def finish(run: train.Run, book: Logbook, step: int, *others: object) -> None:
        finish_step(run, book, step, *others)
        if step == number:
            action()

    monkeypatch.setattr(train, "finish_step", finish)


def test_a_run_that_is_short_of_memory_goes_on_in_smaller_pieces(calm, tmp_path, monkeypatch):
    """A card a little too small, or shared, ended the run hours in; and smaller pieces must change nothing.

    The rollout is 16 rows of up to 66 tokens, of which two or three fit; of the update, one row fits, or two short
    ones. What fits is kept: forgotten, it would be found again at each step at the price of failed attempts.
    """
    small_card(monkeypatch, rollout=200, update=100)
    done = run(tmp_path / "run", *EVERY_STEP)
    assert_as_calm(done, calm)
    assert all(line.startswith("warning: out of GPU memory; ") for line in done.complaints)
    assert lowerings(done, "micro-batch") == [(2048, 1024), (1024, 512), (512, 256), (256, 128), (128, 64)]
    waves = lowerings(done, "KV cache")
    assert len(done.complaints) == 5 + len(waves) and 2 <= len(waves) <= 4
    assert all(after == before // 2 for before, after in waves)
    assert [before for before, _ in waves[1:]] == [after for _, after in waves[:-1]]


@pytest.mark.parametrize(("number", "in_backward"), [(5, False), (6, True)])
def test_running_out_of_memory_amid_an_update_counts_no_micro_batch_twice(number, in_backward, calm, tmp_path,
                                                                          monkeypatch):
    """The first micro-batches have left their gradient when the third one fails: added again, they count double.

    The head is computed in forward and again in backward, so its sixth call in a step is the third one's backward.
    """
    calls: list[bool] = []  # of step 2: was it in backward?
    armed: list[bool] = []
    head_logits = grpo.head_logits

    def flaky(hidden: Tensor, head: Tensor) -> Tensor:
        if armed:
            calls.append("backward" in {frame.name for frame in traceback.extract_stack()})
            if len(calls) == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return head_logits(hidden, head)

    monkeypatch.setattr(grpo, "head_logits", flaky)
    after_step(monkeypatch, 1, lambda: armed.append(True))
    done = run(tmp_path / "run", *EVERY_STEP)
    assert calls[number - 1] == in_backward and len(calls) > 2 * number
    assert_as_calm(done, calm)
    assert lowerings(done, "micro-batch") == [(2048, 1024)] and len(done.complaints) == 1


@pytest.mark.parametrize(("phase", "what"), [("rollout", "KV cache"), ("update", "micro-batch")])
def test_when_not_even_one_row_fits_the_run_stops_and_says_what_to_lower(phase, what, calm, tmp_path):
    """Halving without an end, or a traceback and all steps lost; resumed with room, it ends as if never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        room = small_card(patch)
        after_step(patch, 1, lambda: room.update({phase: 10}))
        done = run(tmp_path / "run")
    *others, last = done.complaints
    assert done.status == 2
    assert re.fullmatch(rf"train\.py: out of GPU memory even with the smallest {what}: lower rollout\.max_new_tokens, "
                        r"set train\.activation_checkpointing=true or train\.optimizer=offload, or free the GPU", last)
    assert 3 <= len(others) == len(lowerings(done, what)) <= 5
    assert [path.name for path in (done.folder / "checkpoints").iterdir()] == ["step-000001"]
    assert same(done.weights(1), calm.weights(1)) and done.metrics == calm.metrics[:2]

    again = run(done.folder, *EVERY_STEP, resume=True)
    assert again.status == 0 and again.metrics == calm.metrics and again.samples == calm.samples
    assert same(again.weights(3), calm.weights(3))


@pytest.mark.parametrize("spared", ["no spread", "masked"])
def test_the_smallest_micro_batch_is_the_longest_row_that_is_run(spared, config, monkeypatch):
    """The longest answers are often all wrong, or cut off and masked, and so not run: sized by them, the smallest
    micro-batch held two rows of the others, and a run was given up that one row at a time would have saved."""
    settings = dataclasses.replace(config.train, truncated="mask")
    short, long = [(18, 1.0), (18, -1.0)] * 2, [(60, 0.0 if spared == "no spread" else -0.5)] * 4

    def update(policy: Qwen2) -> dict[str, float | None]:
        episodes = [Episode(Problem((1, 2), 3), row // 4, [3, 5], [7 + row] * length, [-1.0] * length,
                            ended=length < 60 or spared != "masked", text="", advantage=advantage)
                    for row, (length, advantage) in enumerate(short + long)]
        state = train.Run(dataclasses.replace(config, train=settings), ROOT, policy, range(VOCABULARY),
                          AdamW(policy.parameters(), settings), [], [], math.inf, 2048, None)
        return train.update_policy(state, episodes, UNCUT, lambda count: None)

    expected, policy = small_policy(3), small_policy(3)
    whole = update(expected)
    small_card(monkeypatch, update=20)
    assert update(policy) == pytest.approx(whole, rel=1e-4)
    for name, tensor in expected.state_dict().items():
        assert (policy.state_dict()[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_sizes_are_halved_down_to_the_least_and_no_further(capsys):
    """One attempt too few gives up a run that fits; one too many, or below the least, tries what is no smaller."""
    def try_with(most: float) -> tuple[tuple[str, float] | None, list[float], str]:
        """What comes out where no more than `most` fits, the sizes that were tried, and what was printed."""
        sizes: list[float] = []

        def attempt(size: float) -> str:
            sizes.append(size)
            if size > most:
                raise torch.OutOfMemoryError
            return "done"

        try:
            result = fit_in_memory(attempt, 100, 30, "wave")
        except UserError as error:
            assert "even with the smallest wave: lower rollout.max_new_tokens" in str(error)
            result = None
        return result, sizes, capsys.readouterr().err

    first, second = (f"warning: out of GPU memory; wave lowered from {change}, results unchanged\n"
                     for change in ("100 to 50", "50 to 30"))
    assert try_with(100) == (("done", 100), [100], "")
    assert try_with(99) == (("done", 50), [100, 50], first)
    assert try_with(50) == (("done", 50), [100, 50], first)
    assert try_with(30) == (("done", 30), [100, 50, 30], first + second)
    assert try_with(29) == (None, [100, 50, 30], first + second)


def test_only_running_out_of_memory_is_tried_again():
    """Any other error of a GPU would come again with each size, and end as advice about memory."""
    sizes: list[float] = []

    def attempt(size: float) -> None:
        sizes.append(size)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        fit_in_memory(attempt, 100, 30, "wave")
    assert sizes == [100]


def test_a_failed_attempt_gives_its_memory_back_before_the_next_one(monkeypatch):
    """An exception holds its frames, and they their tensors: with it at hand the next attempt has less room still."""
    held: list[weakref.ref] = []
    alive: list[list[bool]] = []  # of the tensors so far, when the cache is emptied and when the next attempt begins

    def look() -> None:
        alive.append([reference() is not None for reference in held])

    def attempt(size: float) -> float:
        look()
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        if size > 25:
            raise torch.OutOfMemoryError
        return size

    monkeypatch.setattr(torch.cuda, "empty_cache", look)
    assert fit_in_memory(attempt, 100, 1, "wave") == (25, 25)
    assert alive == [[], [False], [False], [False, False], [False, False]]


# ------------------------------------------------------------------------------------------------------ hostile text

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\x90q\x9c", "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "&lt;script&gt;&#60;b&#62;", "[click](javascript:alert(1)) ```\n# big\n```", "\u202edlrow\u2066\u200f\u061c",
    "half \ud800 and \udfff", "nul \0 bell \a back \b\b\b cr \r tab \t del \x7f",
    "\u2028\u2029\u200b\ufeff\xad\x85\x0b\x0c",
    "\U000e0041\U000f0000\U0010ffff\ufff9", "x" * 200_000, "\x00" * 20_000, "", "ordinary: 3*4=12, sí, 是, 😀",
    "' onmouseover='alert(1)' \" onclick=\"alert(1)", "%s %n {0} \\x1b[31m",
]
DANGEROUS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format, surrogate, private, unassigned, separators


def dangerous(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in DANGEROUS and c != "\n"}


@pytest.fixture(scope="module")
def attacked(hopeless, tmp_path_factory) -> Done:
    """A run whose model says such things; its numbers are nan, so that its batch is written out too."""
    texts = iter(range(10**9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "decode", lambda self, ids: HOSTILE[next(texts) % ROWS])
        done = run(tmp_path_factory.mktemp("attacked") / "run", "train.steps=1", "eval.size=16",
                   f"model.path={hopeless[1]}")
    assert done.status == 0 and done.metrics[1]["skipped"] == 1 and len(HOSTILE) == ROWS
    return done


def test_every_character_that_is_not_harmless_is_escaped():
    """One class of characters forgotten, and a model could learn to move the cursor of whoever watches it."""
    codes = (*range(0x20000), *range(0xE0000, 0xE0200), *range(0xF0000, 0xF0010), sys.maxunicode)
    characters = [chr(code) for code in codes]
    shown = printable("".join(characters))
    assert dangerous(shown) == set()
    harmless = [c for c in characters if not dangerous(c) and unicodedata.category(c) != "Zs"]
    assert printable("".join(harmless)) == "".join(harmless), "what people write stays as it is"
    assert printable("a b\n\x1b[31m\u202e\ud800\t") == "a b\n\\x1b[31m\\u202e\\ud800\\t"


def test_hostile_answers_reach_neither_the_terminal_nor_samples_txt(attacked):
    """`cat samples.txt` must not clear the screen, retitle the window or show text that is not there."""
    for text in (attacked.printed, *attacked.complaints, attacked.samples.decode()):
        assert dangerous(text) == set()
    assert len(attacked.printed) + sum(map(len, attacked.complaints)) < 5000
    samples = attacked.samples.decode()
    assert "red" not in attacked.printed and samples.count("--- step 1, ") == ROWS
    assert "<think>\\x1b]0;owned\\x07\\x1b[2J\\x1b[31mred" in samples and "\\ud800 and \\udfff" in samples
    assert "ordinary: 3*4=12, sí, 是, 😀" in samples and "x" * 200_000 in samples, "nothing is lost"


def test_hostile_answers_are_no_markup_in_tensorboard(attacked):
    """TensorBoard renders texts in the browser of whoever looks at the run: the only tags may be ours."""
    events = EventAccumulator(str(attacked.folder / "tensorboard"), size_guidance={TENSORS: 0}).Reload()
    tags = events.Tags()["tensors"]
    assert len(tags) == ROWS
    shown = [event.tensor_proto.string_val[0].decode() for tag in tags for event in events.Tensors(tag)]
    assert len(shown) == ROWS
    for text in shown:
        assert dangerous(text) == set()
        assert re.findall("<[^>]*>?", text) == ["<pre>", "</pre>"] and text.endswith("</pre>")
        assert not set("'\"") & set(text)
    texts = {html.unescape(text) for text in shown}
    for hostile in HOSTILE:
        assert any(printable("<think>" + hostile) in text for text in texts), hostile[:50]


def test_hostile_answers_are_kept_as_they_are_for_whoever_looks_into_a_skipped_batch(attacked):
    """Half a surrogate pair is no UTF-8: written as it is, it ended the run in the middle of saving the evidence."""
    path = attacked.folder / "skipped" / "step-000001.json"
    assert path.read_bytes().isascii() and dangerous(path.read_text()) == set()
    assert sorted(episode["text"] for episode in attacked.skipped(1)) == sorted(HOSTILE)


@pytest.mark.parametrize("arguments", [
    ["--config", "{}.yml"], ["--config", "config_tiny.yml", "model.path={}"],
    ["--config", "config_tiny.yml", "data.path={}"],
    ["--config", "config_tiny.yml", "--resume", "{}"], ["--config", "config_tiny.yml", "train.{}=1"],
    ["--config", "config_tiny.yml", "train.schedule={}"], ["--config", "config_tiny.yml", "{}"],
])
def test_a_hostile_name_gets_one_harmless_line(arguments, tmp_path, monkeypatch, capsys):
    """A downloaded config or data set may be named so as to hide the rest of the error, or to forge another."""
    monkeypatch.chdir(ROOT)
    name = "a\x1b[2J\x1b]0;owned\x07\u202e\r\n\u2028train.py: all is well"
    status = train.main([argument.replace("{}", name) for argument in arguments] + [f"output.folder={tmp_path}"])
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith("train.py: ") and captured.err.endswith("\n") and captured.err.count("\n") == 1
    assert dangerous(captured.err) == set()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ a full disk

class SmallDisk(io.FileIO):
    """A file on a disk with `room` bytes left: as a real one, it takes what still fits and then nothing."""

    room = math.inf

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(bytes(data)[: int(min(self.room, 2**20))])
        SmallDisk.room -= written
        return written


def test_wherever_the_disk_fills_up_no_line_of_the_metrics_is_lost_or_broken(config, calm, tmp_path, monkeypatch,
                                                                              capsys):
    """The disk is full in the middle of a line: skipped, the line is half there, and the next one sticks to it."""
    lines = (calm.folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    steps = {step: {**json.loads(lines[1 + step % 3]), "step": step} for step in range(1, 7)}
    expected = "".join(json.dumps(metrics) + "\n" for metrics in steps.values()).encode()

    def open_file(path: Path, mode: str, buffering: int) -> io.BufferedWriter:
        kind = SmallDisk if path.name == "metrics.jsonl" else io.FileIO
        return io.BufferedWriter(kind(path, mode), buffering)

    monkeypatch.setattr(logbook, "open", open_file, raising=False)
    for number, room in enumerate(range(0, len(expected) * 2 // 3, 97)):
        path = tmp_path / str(number) / "metrics.jsonl"
        monkeypatch.setattr(SmallDisk, "room", room)
        with Logbook(config, path.parent, {}, 0) as book:
            for step, metrics in steps.items():
                if step == 5:
                    assert path.read_bytes() == expected[:room]
                    SmallDisk.room = math.inf
                book.write_step(step, metrics)
        assert path.read_bytes() == expected
        printed = capsys.readouterr()
        assert printed.err == f"warning: {path.parent}: cannot be written: No space left on device; training goes on\n"
        assert printed.out.count("\n") == 6, "the terminal shows every step"


LIMITED = """
import functools, resource, sys
import logbook, train

write_step = logbook.Logbook.write_step
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def write_and_limit(self, step, metrics):
    write_step(self, step, metrics)
    room = {1: (self.folder / "metrics.jsonl").stat().st_size + 100}.get(step, most)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))

logbook.Logbook.write_step = write_and_limit
logbook.SummaryWriter = functools.partial(logbook.SummaryWriter, flush_secs=0)  # else it writes every two minutes
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_goes_on_while_its_disk_is_full_and_catches_up_after(calm, tmp_path):
    """Full during step 2, for all its files (a limit that the kernel keeps: it takes half a line, then none).

    TensorBoard's writer does not live through that: its errors kept the samples of all later steps from being written.
    """
    folder = tmp_path / "run"
    command = [sys.executable, "-c", LIMITED, "--config", "config_tiny.yml", "--name", "run",
               f"output.folder={tmp_path}", *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    left = Done(folder, done.returncode, done.stdout, done.stderr.splitlines())
    assert [line for line in left.complaints if line.startswith("warning")] == [
        f"warning: {folder}: cannot be written: File too large; training goes on"]
    assert left.metrics == calm.metrics
    assert same(load_file(folder / "final" / "model.safetensors"), calm.weights(3))
    assert left.samples == calm.samples
