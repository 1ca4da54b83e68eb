"""Stops, kills, full disks, damaged files: a resumed run is the run left alone, bit for bit, or says what is wrong.

Most tests begin with a copy of one finished run of 8 steps that has only some of its checkpoints left, as a machine
that died leaves it. Resumed, it must become the finished run again.

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
from signal import SIG_IGN, SIGINT, SIGTERM, raise_signal, signal

import pytest
from crash import SETTINGS, STEPS, differing
from short_run import ROOT, resume, run as start, set_scores

import train
from checkpoint import read_progress, save_checkpoint
from config import load_config
from data_types import Progress, UserError
from optimizer import AdamW
from qwen2_model import Qwen2, Qwen2Config
from rollout import Sampler

WEIGHTS, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES = [*SMALL, WEIGHTS, OPTIMIZER, STATE, SUMS]


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number:06d}"


def saved(folder: Path, kind: str = "step") -> list[int]:
    """The steps of a run's checkpoints, or of its best weights."""
    return sorted(int(path.name[-6:]) for path in folder.glob(f"checkpoints/{kind}-??????"))


def tree(folder: Path) -> dict[str, str]:
    """A hash of every file in a folder, but for TensorBoard's; an empty one of every folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if "tfevents" not in path.name}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for name, p in paths.items()}


def killed(run: Path, folder: Path, *steps: int) -> Path:
    """A copy of a run with the checkpoints of these steps, and the rest half-written, which only its name may tell."""
    others = [step(run, number).name for number in range(STEPS + 1) if number not in steps]

    def copy(old: str, new: str) -> None:  # large files share their bytes
        (os.link if old.endswith(".safetensors") else shutil.copyfile)(old, new)

    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("final", *others), copy_function=copy)
    for name in ("checkpoints/step-000009.partial", "checkpoints/best-000009.partial", "final.partial"):
        shutil.copytree(run / "final", folder / name, copy_function=copy)
    for name in ("config.yml.partial", "metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 9, "reward": 0.')
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run that nothing disturbed, with all its checkpoints; to copy, never to change."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert start(folder, *SETTINGS).status == 0
    return folder


def test_stopped_at_random_moments_a_run_ends_as_if_left_alone():
    """A kill -9 may come between any two instructions; a hole in the order of writing shows only in some of them.
    Resumed with the --config FILE that it was started with, a run forgot its overrides: steps, group size, schedule.
    """
    done = subprocess.run([sys.executable, "tests/crash.py", "10"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stops, half_written, runs = map(int, re.findall(r"\d+", done.stdout))
    assert min(stops // 10, half_written, runs) >= 1


STOPS = {  # (what is called, for the n-th time, when the signals come; checkpoint.every; the step that is saved)
    "first evaluation": (train, "grade", 1, [SIGTERM], 0, 0),
    "before a rollout": (train, "next_problems", 2, [SIGINT], 0, 6),
    "rollout": (Sampler, "generate", 1, [SIGTERM], 0, 5),  # what is only sampled leaves no trace
    "update": (train, "update", 2, [SIGTERM], 0, 7),  # a step that is updated is finished, not done twice
    "evaluation": (train, "evaluate", 1, [SIGINT], 0, 6),  # and evaluated
    "saving": (os, "rename", 1, [SIGTERM], 2, 6),
    "last step": (train, "update", 3, [SIGINT], 0, STEPS),  # nothing is left to stop
    "rollout, twice": (train, "grade", 1, [SIGINT, SIGINT], 0, 5),
    "evaluation, twice": (train, "evaluate", 1, [SIGTERM, SIGINT], 0, 5),
    "evaluation, an error": (train, "evaluate", 2, [], 0, 5),  # the weights are ahead of step 7
    "saving, twice": (os, "rename", 1, [SIGINT, SIGTERM], 2, 5),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_loses_no_step_and_repeats_none(stop, alone, tmp_path, monkeypatch):
    """A cluster that ends a job sends SIGTERM at any moment: what is saved is as of then, whatever checkpoint.every.
    A second signal ends the run at once, and what was saved survives: a rollout may take minutes. A shell starts
    background jobs with Ctrl-C ignored; put back after the first signal, that ignored the second.
    """
    owner, name, call, signals, every, done = STOPS[stop]
    run = killed(alone, tmp_path / "my run", *([5] if done else []))
    held, original, calls = tree(run / "checkpoints"), getattr(owner, name), count(1)

    def signalled(*arguments, **options):
        if next(calls) == call:
            for number in signals:
                raise_signal(number)
            if not signals:
                raise UserError("out of GPU memory")
        return original(*arguments, **options)

    before = signal(SIGINT, SIG_IGN)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        ended = resume(run, f"checkpoint.every={every}")
    assert signal(SIGINT, before) == SIG_IGN
    if done < STEPS:
        assert (ended.status, (run / "final").exists()) == ([2, 128 + sum(signals), 130][len(signals)], False)
        assert saved(run) == sorted({5, done} if done else {0})
        assert all(tree(run / "checkpoints")[name] == held[name] for name in held if "partial" not in name)
        if len(signals) == 1:  # the folder's space made two arguments of the printed one
            assert shlex.split(ended.printed[-1])[-2:] == ["--resume", str(run)]
        ended = resume(run, "checkpoint.every=1", "checkpoint.keep=3")
    assert (ended.status, differing(run, alone), list(run.glob("**/*.partial"))) == (0, [], [])


@pytest.mark.parametrize("arguments", ["night", "latest", "X/night", "night output.folder=X", "latest output.folder=X"])
def test_a_run_is_found_by_its_name_its_folder_or_as_the_latest(arguments, alone, tmp_path, monkeypatch):
    """By name or by the age of the folder, `latest` was another run than the one that was just stopped."""
    parent = tmp_path / ("X" if "X" in arguments else "runs")
    night, older = (killed(alone, parent / name, STEPS) for name in ("night", "older"))
    os.utime(older / "metrics.jsonl", (1_000, 1_000))
    before = tree(older)
    monkeypatch.chdir(tmp_path)
    assert (train.main(["--resume", *arguments.split()]), differing(night, alone)) == (0, [])
    assert tree(older) == before


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS, STEPS + 1])
def test_a_run_may_end_sooner_or_later_than_was_planned(steps, alone, tmp_path):
    """A person who has seen enough asks for the model of the steps that are done; after a good run, for more steps.
    What is changed must be said, or the second half is a riddle; what is finished must neither train on nor be lost.
    """
    run = killed(alone, tmp_path / "run", min(steps, STEPS))
    done = resume(run, f"train.steps={steps}")
    told = [re.findall(r"\d+", line) for line in done.printed if "train.steps" in line]
    assert (done.status, told) == (0, [[str(steps), str(STEPS)]] * (steps != STEPS))
    lines, whole = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (run, alone))
    assert (load_config(run / "config.yml").train.steps, len(lines)) == (steps, steps + 1)
    assert lines[: STEPS + 1] == whole[: steps + 1]
    files = tree(run)
    assert files[f"final/{WEIGHTS}"] == files[f"checkpoints/step-{steps:06d}/{WEIGHTS}"]
    assert (files.items() <= tree(alone).items()) == (steps == STEPS)


@pytest.mark.parametrize("mode", ["split rollout.max_draws=2", "offload train.updates_per_batch=2"])
def test_every_optimizer_and_cursor_resumes_exactly(mode, tmp_path):
    """A cursor taken for questions x steps repeats problems once a step drew twice; and with two updates per batch,
    bias correction and stochastic rounding follow from the optimizer's steps, which are not the training steps.
    """
    whole, recipe = tmp_path / "whole", f"train.objective=clipped model.dtype=bfloat16 train.optimizer={mode}"
    assert start(whole, *SETTINGS, "train.steps=3", *recipe.split()).status == 0
    first = read_progress(step(whole, 1))
    assert (first.drawn, first.optimizer_steps) == ((6, 1) if "draws" in mode else (3, 2)), "not the case it is about"
    run = killed(whole, tmp_path / "run", 1)
    assert (resume(run).status, differing(run, whole)) == (0, [])


def rewrite(path: Path, data: bytes) -> None:
    """As a new file: copies of the run share the bytes of the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


DAMAGES = {
    "": lambda path: None,
    "missing": lambda path: path.rename(path.parent.with_suffix(".elsewhere")),
    "cut": lambda path: rewrite(path, path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: rewrite(path, bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "of another step": lambda path: rewrite(path, (step(path.parents[2], STEPS - 1) / path.name).read_bytes()),
    "added": lambda path: rewrite(path, (path.parent / OPTIMIZER).read_bytes()),
}
LAST = f"checkpoints/step-{STEPS:06d}/"
FIXED = f"""model.path=. model.revision=dev model.dtype=bfloat16 data.path=. data.held_out=256 data.most_numbers=3
        data.target_high=50 train.seed=2 train.optimizer=offload train.steps={STEPS - 1}""".split()
REFUSALS = [  # (damaged file, how, arguments, what the message names)
    *((LAST + name, how, "", name) for how in ("cut", "flipped", "missing") for name in FILES),
    *((LAST + name, "of another step", "", name) for name in (WEIGHTS, OPTIMIZER)),
    (LAST + SUMS, "of another step", "", f"{WEIGHTS}, {OPTIMIZER}, {STATE}"),
    # the optimizer's state is read from all the files with such a name
    (f"{LAST}optimizer-00002.safetensors", "added", "", "optimizer-00002"),
    # by default only a stop saves a checkpoint: a finished run was started anew, its metrics cut to nothing
    ("checkpoints", "missing", "", "final"),
    # with other problems held out, the evaluation is on problems that the first half was trained on
    *(("", "", f"--resume night train.threads=2 {setting}", setting.partition("=")[0]) for setting in FIXED),
    # a typing error must not continue another run, nor begin a new one under an old name
    ("", "", "--resume night output.folder=X", "X"),
    ("", "", "--config runs/night/config.yml --name night output.folder=runs", "--resume"),
    # killed before its first line, a run is started again under its name: it is only the model that is not found
    ("", "", "--config runs/night/config.yml --name begun output.folder=runs model.path=none", "none"),
]


@pytest.mark.parametrize(("file", "how", "arguments", "named"), REFUSALS)
def test_what_would_not_be_the_same_run_is_refused(file, how, arguments, named, alone, tmp_path, monkeypatch, capsys):
    """safetensors takes any bytes for weights: a flipped bit, or the optimizer of another step, trains on unseen."""
    run = killed(alone, tmp_path / "runs" / "night", STEPS - 1, STEPS)
    for folder in (run / "final", run.parent / "begun"):
        folder.mkdir()
    for name in ("config.yml", "lock"):
        (run.parent / "begun" / name).touch()
    DAMAGES[how](run / file)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert (train.main((arguments or f"--resume night train.steps={STEPS + 1}").split()), tree(tmp_path)) == (2, before)
    assert [named in line for line in capsys.readouterr().err.splitlines()] == [True]


def test_a_checkpoint_of_another_version_is_refused(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.VERSION", 99)
    assert ["version" in line for line in resume(killed(alone, tmp_path / "run", STEPS)).complaints] == [True]


def test_the_best_weights_are_kept_and_the_best_score_goes_through_a_resume(tmp_path, monkeypatch):
    """A run that collapsed overnight kept only its last checkpoints, all of them after the collapse. Resumed, it took
    the first evaluation for its best, or kept the best-000004 of lost steps and removed its own new best-000003.
    """
    scores = [0.25, 0.5, 0.25, 0.25, 0.75, 0.0]  # after step 0, 1, ...
    set_scores(monkeypatch, scores)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert start(whole, *SETTINGS, "train.steps=5", "eval.every=1").status == 0
    assert (saved(whole), saved(whole, "best")) == ([1, 2, 3, 4, 5], [4])
    scores[3] = 0.75
    assert resume(killed(whole, resumed, 1), "train.learning_rate=1e-4", "checkpoint.keep=4").status == 0
    assert (saved(resumed), saved(resumed, "best")) == ([2, 3, 4, 5], [3])
    assert [read_progress(step(resumed, number)).best for number in (2, 3, 4, 5)] == [0.5, 0.75, 0.75, 0.75]
    best, *steps = (tree(path) for path in sorted((resumed / "checkpoints").iterdir()))
    assert best == {name: steps[1][name] for name in steps[1] if name in [*SMALL, WEIGHTS]}
    assert [files[WEIGHTS] == best[WEIGHTS] for files in steps] == [False, True, False, False]


def test_training_continues_where_a_save_fails(alone, tmp_path, monkeypatch):
    """A disk full at night ended the run. And half a checkpoint in the last gigabyte takes the room of metrics and the
    final model: where there is plainly no room, none is begun.
    """
    run, mkdir, made = killed(alone, tmp_path / "run", 6), os.mkdir, []
    held, usage = tree(step(run, 6)), shutil.disk_usage(run)._replace(free=9 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: made.append(str(path)) or mkdir(path, *mode))
    done = resume(run, "checkpoint.keep=1")
    warned = [line for line in done.complaints if "could not be saved" in line]
    assert [str(step(run, number)) in line for line, number in zip(warned, (7, 8), strict=True)] == [True, True]
    assert (saved(run), tree(step(run, 6)), [path for path in made if "step-" in path]) == ([6], held, [])
    assert (done.status, differing(run, alone)) == (0, [])


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, for faults.c")
def test_the_last_good_checkpoint_survives_whichever_write_fails(tmp_path):
    """Every call of a save may fail. One error that is overlooked, and what is left is a checkpoint that is none."""
    library = tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "faults.c", "-ldl"], check=True)
    disk = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, env=disk)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout)
    assert failed.count("fsync") == len(FILES) + 3  # every file and three folders
    assert {"mkdir", "rename", "open", "ftruncate", "unlinkat", "write"} <= set(failed)


def save_with_faults(run: Path) -> None:
    """Lets each call of a save fail in turn and prints their names as JSON: see faults.c."""
    disk = ctypes.CDLL(None)
    disk.disarm.restype = ctypes.c_char_p
    config = load_config(ROOT / "config_tiny.yml", ["checkpoint.keep=2"])  # an older one is removed in each save
    policy = Qwen2(Qwen2Config(512, 16, 32, 1, 2, 1, 8, 1e-6, 1e4, True, 64))
    optimizer = AdamW(policy.parameters(), config.train)

    def save(number: int) -> None:
        state, progress = optimizer.tensors(), Progress(step=number)
        save_checkpoint(run, policy, dict.fromkeys(SMALL, b"{}"), state, progress, config.checkpoint.keep)

    def files(number: int) -> dict[str, str]:
        assert read_progress(step(run, number)).step == number
        found, sums = tree(step(run, number)), json.loads((step(run, number) / SUMS).read_bytes())
        assert sums == {name: found[name] for name in FILES if name != SUMS}  # SHA-256, as `sha256sum` prints them
        return {name: found[name] for name in found if name not in (STATE, SUMS)}

    save(0)
    good, tried = files(0), []
    for number in count(1):
        code, told = (errno.ENOSPC, errno.EIO)[number % 2], ""
        disk.arm(len(tried) + 1, code)
        try:
            save(number)
        except UserError as error:
            told = str(error)
        failed = disk.disarm().decode().removesuffix("64")
        # Python makes good by itself: mkdir of a folder that is there
        assert os.strerror(code) in told or (not told and failed in ("", "mkdir")), f"{failed} failed: {told}"
        assert {number - 1, number} - {*saved(run)} <= ({number} if told else set())
        for left in run.glob("**/*.partial"):
            assert failed in ("unlink", "unlinkat", "rmdir"), failed
            shutil.rmtree(left)
        save(number)  # the disk is well again, and so is the save
        assert [files(number) for number in saved(run)] == [good] * len(saved(run))
        if not failed:
            return print(json.dumps(tried))
        tried.append(failed)


if __name__ == "__main__":
    save_with_faults(Path(sys.argv[1]))
