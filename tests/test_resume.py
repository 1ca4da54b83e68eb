"""Stops, kills, full disks, damaged files: a resumed run is the run left alone, bit for bit, or says what is wrong.

Most tests begin with a copy of a finished run that has only some of its checkpoints left, as a machine that died
leaves it. Resumed, it must become the finished run again.

    python tests/test_resume.py FOLDER     # with faults.c preloaded: the write faults, in a process of their own
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, default_int_handler, raise_signal, signal
from unittest.mock import Mock

import pytest
from safetensors import SafetensorError

import train
from crash import SETTINGS, STEPS, differing
from data_types import Progress
from optimizer import AdamW
from plumbing import checkpoint, terminal
from plumbing.checkpoint import read_progress
from plumbing.config import load_config
from plumbing.run import Run
from qwen2_model import Qwen2, Qwen2Config
from rollout import Sampler
from short_run import ROOT, resume, run as start, set_scores

WEIGHTS, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES = [*SMALL, WEIGHTS, OPTIMIZER, STATE, SUMS]


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number:06d}"


def saved(folder: Path, kind: str = "step") -> list[int]:
    return [int(path.name[-6:]) for path in checkpoint.saved(folder, kind)]


def tree(folder: Path) -> dict[str, str]:
    """A hash of every file in a folder, but for TensorBoard's; an empty one of every folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if "tfevents" not in path.name}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for name, p in paths.items()}


def killed(run: Path, folder: Path, *steps: int) -> Path:
    """A copy of a run with the checkpoints of these steps, and the rest half-written, which only its name may tell."""
    others = [step(run, number).name for number in range(STEPS + 1) if number not in steps]
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("final", *others))
    for name in ("checkpoints/step-000009.partial", "checkpoints/best-000009.partial", "final.partial"):
        shutil.copytree(run / "final", folder / name)
    for name in ("config.yml.partial", "metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 9, "reward": 0.')
    return folder


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    """A run that nothing disturbed, with all its checkpoints; to copy, never to change."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert start(folder, *small, *SETTINGS).status == 0
    return folder


def test_stopped_at_random_moments_a_run_ends_as_if_left_alone():
    done = subprocess.run([sys.executable, "tests/crash.py", "12"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stops, _, runs = map(int, re.findall(r"\d+", done.stdout))
    assert (stops, runs >= 1) == (12, True)


GRADE, UPDATE, EVALUATE = ((train, name) for name in ("grade", "update", "evaluate"))
GENERATE, RENAME = (Sampler, "generate"), (os, "rename")  # first of the best weights, then of a checkpoint
STOPS = {  # (what is called, for the n-th time, signals that come then), ...; checkpoint.every; status; what is saved
    "first evaluation": ([(GRADE, 1, [SIGTERM])], 0, 143, [0]),
    "first rollout": ([(GENERATE, 3, [SIGINT])], 0, 130, [0]),
    "rollout": ([(GENERATE, 1, [SIGTERM])], 0, 143, [5]),  # what is only sampled leaves no trace
    "second rollout": ([(GENERATE, 3, [SIGINT])], 0, 130, [5, 6]),
    "update": ([(UPDATE, 2, [SIGTERM])], 0, 143, [5, 7]),  # a step that is updated is finished, not done twice
    "evaluation": ([(EVALUATE, 1, [SIGHUP])], 0, 129, [5, 6]),  # and evaluated
    "saving": ([(RENAME, 2, [SIGTERM])], 2, 143, [5, 6]),
    "last step": ([(UPDATE, 3, [SIGINT])], 0, 0, [5]),  # nothing is left to stop
    "rollout, twice": ([(GRADE, 1, [SIGINT, SIGINT])], 0, 130, [5]),
    "evaluation, twice": ([(EVALUATE, 1, [SIGTERM, SIGINT])], 0, 130, [5]),
    "rollout, an error": ([(GRADE, 20, [])], 0, 2, [5, 6]),
    "evaluation, an error": ([(EVALUATE, 2, [])], 0, 2, [5]),  # the weights are ahead of step 6
    "saving, twice": ([(RENAME, 2, [SIGINT, SIGTERM])], 2, 130, [5]),
    "rollout, then saving": ([(GENERATE, 3, [SIGTERM]), (RENAME, 2, [SIGTERM])], 0, 130, [5]),
    "hangup, then saving": ([(GENERATE, 3, [SIGHUP]), (RENAME, 2, [SIGHUP])], 0, 129, [5, 6]),  # one more is ignored
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_loses_no_step_and_repeats_none(stop, small, alone, tmp_path, monkeypatch):
    """What is saved is as of then, whatever checkpoint.every; a second signal ends the run at once."""
    places, every, status, left = STOPS[stop]
    run, more = tmp_path / "my run", f"checkpoint.every={every}"
    held = tree(step(killed(alone, run, 5), 5)) if 5 in left else {}
    handlers = {SIGINT: SIG_IGN, SIGTERM: default_int_handler, SIGHUP: default_int_handler}  # as a shell begins `run &`
    before = {number: signal(number, handler) for number, handler in handlers.items()}
    with monkeypatch.context() as patch:
        for (owner, name), call, signals in places:

            def disturbed(*of, original=getattr(owner, name), calls=count(1), call=call, signals=signals, **options):  # noqa: B008
                if next(calls) == call:
                    for number in signals:
                        raise_signal(number)
                    if not signals:
                        raise terminal.UserError("out of GPU memory")
                return original(*of, **options)

            patch.setattr(owner, name, disturbed)
        ended = resume(run, more) if held else start(run, *small, *SETTINGS, more)
    assert {number: signal(number, handler) for number, handler in before.items()} == handlers
    assert (ended.status, saved(run), (run / "final").exists()) == (status, left, status == 0)
    assert not held or tree(step(run, 5)) == held
    if status == 143:  # the folder's space made two arguments of the printed one
        assert shlex.split(ended.printed[-1])[-2:] == ["--resume", str(run)]
    if status:
        ended = resume(run, "checkpoint.every=1", "checkpoint.keep=3")
    assert (ended.status, differing(run, alone), list(run.glob("**/*.partial"))) == (0, [], [])


@pytest.mark.parametrize("name", ["night", "latest", "X/night"])
def test_a_run_is_found_by_its_name_its_folder_or_as_the_latest(name, alone, tmp_path, monkeypatch):
    parent = tmp_path / ("X" if "X" in name else "runs")
    night, older = (killed(alone, parent / name, STEPS) for name in ("night", "older"))
    os.utime(older / "metrics.jsonl", (1_000, 1_000))
    before = tree(older)
    monkeypatch.chdir(tmp_path)
    assert (train.main(["--resume", name]), differing(night, alone), tree(older)) == (0, [], before)
    monkeypatch.chdir(night)
    assert train.main(["--resume", ""]) == 2, "a variable that is not set"


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS, STEPS + 1])
def test_a_run_may_end_sooner_or_later_than_was_planned(steps, alone, tmp_path):
    """What is changed must be said, or the second half is a riddle; what is finished is neither trained nor lost."""
    run = killed(alone, tmp_path / "run", min(steps, STEPS))
    done = resume(run, f"train.steps={steps}")
    told = [re.findall(r"\d+", line) for line in done.printed if "train.steps" in line]
    assert (done.status, told) == (0, [[str(steps), str(STEPS)]] * (steps != STEPS))
    lines, whole = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (run, alone))
    assert (load_config(run / "config.yml").train.steps, len(lines)) == (max(steps, STEPS), steps + 1)
    assert lines[: STEPS + 1] == whole[: steps + 1]
    assert tree(run / "final")[WEIGHTS] == tree(step(run, steps))[WEIGHTS]
    assert (tree(run).items() <= tree(alone).items()) == (steps == STEPS)


def test_what_moved_is_found_by_its_content_and_the_config_is_that_of_the_last_step(alone, small, tmp_path):
    """The data's folder had another name: "set it back". And to look at a finished run again rewrote its settings."""
    run, config, data = tmp_path / "run", (alone / "config.yml").read_text(), Path(small[1].partition("=")[2])
    killed(alone, run, STEPS)
    assert resume(run, "rollout.group_size=2", "train.learning_rate=1").status == 0
    assert (run / "config.yml").read_text() == config, "no step was trained with them"
    shutil.copy(data, moved := tmp_path / "moved.parquet")
    run = killed(alone, tmp_path / "again", STEPS - 1)
    assert (resume(run, f"data.path={moved}").status, differing(run, alone)) == (0, [])
    assert load_config(run / "config.yml").data.path == str(moved)
    assert ["runs" in line and "again" not in line for line in resume(tmp_path / "nothing").complaints] == [True]


@pytest.mark.parametrize("mode", ["master", "split rollout.max_draws=2", "offload train.updates_per_batch=2"])
def test_every_optimizer_and_cursor_resumes_exactly(mode, small, tmp_path):
    """The optimizer's steps are not the training steps, nor are the problems questions x steps."""
    whole, recipe = tmp_path / "whole", f"train.objective=clipped model.dtype=bfloat16 train.optimizer={mode}"
    assert start(whole, *small, *SETTINGS, "train.steps=3", "rollout.group_size=2", *recipe.split()).status == 0
    first = read_progress(step(whole, 1))
    assert ((first.problems_used > 3), first.optimizer_steps) == ("draws" in mode, 1 + ("updates" in mode))
    run = killed(whole, tmp_path / "run", 1)
    assert (resume(run).status, differing(run, whole)) == (0, [])


DAMAGES = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "of another step": lambda path: shutil.copy(step(path.parents[2], STEPS - 1) / path.name, path),
    "added": lambda path: shutil.copy(path.parent / OPTIMIZER, path),
}
REFUSALS = [  # (file, how it is damaged, what the message names); test_bad_input.py has more
    *((name, "flipped", name) for name in FILES),
    *((name, "of another step", name) for name in (WEIGHTS, OPTIMIZER)),
    (SUMS, "of another step", f"{WEIGHTS}, {OPTIMIZER}, {STATE}"),
    # the optimizer's state is read from all the files with such a name
    ("optimizer-00002.safetensors", "added", "optimizer-00002"),
]


@pytest.mark.parametrize(("file", "how", "named"), REFUSALS)
def test_what_would_not_be_the_same_run_is_refused(file, how, named, alone, tmp_path):
    """safetensors takes any bytes for weights: a flipped bit, or the optimizer of another step, trains on unseen."""
    run = killed(alone, tmp_path / "run", STEPS - 1, STEPS)
    DAMAGES[how](step(run, STEPS) / file)
    before = tree(run)
    done = resume(run, f"train.steps={STEPS + 1}")
    assert (done.status, [named in line for line in done.complaints], tree(run)) == (2, [True], before)
    assert file == SUMS or "remove" in done.complaints[0]


def test_a_checkpoint_of_another_version_is_refused(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    assert ["version" in line for line in resume(killed(alone, tmp_path / "run", STEPS)).complaints] == [True]


def test_the_best_weights_are_kept_and_the_best_score_goes_through_a_resume(small, tmp_path, monkeypatch):
    """Resumed, a run took the first evaluation for its best, kept the best of lost steps, or removed its new one."""
    scores = [0.25, 0.5, 0.25, 0.25, 0.75, 0.0]  # after step 0, 1, ...
    set_scores(monkeypatch, scores)
    whole = tmp_path / "whole"
    assert start(whole, *small, *SETTINGS, "train.steps=5").status == 0
    assert (saved(whole), saved(whole, "best")) == ([1, 2, 3, 4, 5], [4])
    for scores[3], best in ((0.25, 4), (0.75, 3)):
        run = killed(whole, tmp_path / f"best {best}", 1)
        assert resume(run, "checkpoint.keep=4").status == 0
        assert (saved(run), saved(run, "best")) == ([2, 3, 4, 5], [best])
        assert [read_progress(step(run, n)).best for n in (2, 3, 4, 5)] == [0.5, max(0.5, scores[3]), 0.75, 0.75]
        files, of_step = tree(run / f"checkpoints/best-{best:06d}"), tree(step(run, best))
        assert files == {name: of_step[name] for name in [*SMALL, WEIGHTS]}


FAILURES = {  # of the parts of a save, which may come from any library
    "plumbing.checkpoint.save_tensors": SafetensorError("too large"),
    "plumbing.logbook.Logbook.flush": RuntimeError("CUDA error"),
}
SAVES = [(1, "", [8]), (2, "", [7, 8]), (3, "", [6, 7, 8]), *((1, part, [6]) for part in FAILURES)]


@pytest.mark.parametrize(("keep", "failing", "kept"), SAVES)
def test_a_save_keeps_enough_and_where_it_fails_training_continues(keep, failing, kept, alone, tmp_path, monkeypatch):
    """A disk full at night ended the run; or the last checkpoint made room for the next. A failure is reported once."""
    run, met, save_model = killed(alone, tmp_path / "run", 6), [], checkpoint.save_model
    held = tree(step(run, 6))
    monkeypatch.setattr(checkpoint, "save_model", lambda *of: met.append(len(saved(run))) or save_model(*of))
    if failing:
        monkeypatch.setattr(failing, Mock(side_effect=FAILURES[failing]))
    done = resume(run, f"checkpoint.keep={keep}")
    assert (done.status, differing(run, alone), saved(run)) == (0, [], kept)
    told = ["step 7 ", "step 8 "] if failing else []
    assert [words in line for words, line in zip(told, done.complaints, strict=True)] == [True] * len(told)
    assert failing or met == [1, max(1, keep - 1)], "how many a new one meets when it is written"
    assert 6 not in kept or tree(step(run, 6)) == held


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, for faults.c")
def test_the_last_good_checkpoint_survives_whichever_write_fails(tmp_path):
    """Every call of a save may fail. One error that is overlooked, and what is left is a checkpoint that is none."""
    library = tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "faults.c", "-ldl"], check=True)
    disk = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, env=disk)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout)
    synced = [calls.count("fsync") for calls in (failed[: failed.index("rename")], failed)]
    assert synced == [len(FILES) + 1, len(FILES) + 3]  # all of the folder before it gets its name, then two above it
    assert {"mkdir", "rename", "open", "ftruncate", "unlinkat", "write"} <= set(failed)


def save_with_faults(folder: Path) -> None:
    """At each call of a save in turn the process dies, or the call fails; prints their names as JSON: see faults.c."""
    disk = ctypes.CDLL(None)
    disk.disarm.restype = ctypes.c_char_p
    config = load_config(ROOT / "config_tiny.yml")  # checkpoint.keep is 2: an older one is removed in each save
    policy = Qwen2(Qwen2Config(512, 16, 32, 1, 2, 1, 8, 1e-6, 1e4, True, 64))
    run = Mock(folder=folder, config=config, policy=policy, optimizer=AdamW(policy.parameters(), config.train))
    run.logbook.flush, run.agent.small_files = dict, dict.fromkeys(SMALL, b"{}")

    def save(number: int, call: int = 0, code: int = 0) -> tuple[str, str]:
        """The call that failed, and what was said."""
        run.progress, told = Progress(step=number), []
        terminal.warn_once = told.append
        disk.arm(call, code)
        Run.save(run)
        return disk.disarm().decode().removesuffix("64"), "".join(told)

    def files(number: int) -> dict[str, str]:
        assert read_progress(step(folder, number)).step == number
        found = tree(step(folder, number))
        return {name: found[name] for name in found if name not in (STATE, SUMS)}

    save(0)
    good, tried, failed = files(0), [], "none yet"
    for number in count(1, 2):
        if not os.fork():
            os._exit(save(number, len(tried) + 1) is None)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        assert files(saved(folder)[-1]) == good, "after a kill"
        assert (save(number), files(number)) == (("", ""), good), "half of a save hinders the next"
        code = (errno.ENOSPC, errno.EIO)[len(tried) % 2]
        failed, told = save(number + 1, len(tried) + 1, code)
        assert (status, os.strerror(code) in told) == ((9, True) if failed else (0, False)), f"{failed} failed: {told}"
        assert files(saved(folder)[-1]) == good, f"after an error of {failed}"
        assert save(number + 1) == ("", ""), "the disk is well again, and so is the save"
        assert [files(each) for each in saved(folder)] == [good, good]
        if not failed:
            return print(json.dumps(tried))
        tried.append(failed)


if __name__ == "__main__":
    save_with_faults(Path(sys.argv[1]))
