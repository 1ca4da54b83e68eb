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
import resource
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from itertools import count, product
from pathlib import Path
from signal import SIG_IGN, SIGINT, SIGTERM, raise_signal, signal

import pytest
from crash import ROOT, SETTINGS, STEPS, differing

import train
from checkpoint import read_progress, save_checkpoint
from config import load_config
from data_types import Progress, UserError
from optimizer import AdamW
from qwen2_model import Qwen2, Qwen2Config

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = ["config.json", "generation_config.json", WEIGHTS, OPTIMIZER, "tokenizer.json", "tokenizer_config.json", STATE]


def start(folder: Path, *more: str) -> int:
    """A new run in this process; its exit status."""
    place = ["--name", folder.name, f"output.folder={folder.parent}"]
    return train.main([*SETTINGS, *place, "checkpoint.keep=9", *more])


def resume(folder: Path, *overrides: str) -> int:
    return train.main(["--resume", str(folder), *overrides])


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
    for name in ("config.yml.partial", "metrics.jsonl", "samples.txt"):
        with open(folder / name, "a") as file:
            file.write('{"step": 9, "reward": 0.')
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run that nothing disturbed, with all its checkpoints; to copy, never to change."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert start(folder) == 0
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
    "rollout": (train, "next_problems", 2, [SIGINT], 0, 6),  # what is only sampled leaves no trace
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
def test_a_stop_loses_no_step_and_repeats_none(stop, alone, tmp_path, monkeypatch, capsys):
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
        status = resume(run, f"checkpoint.every={every}")
    assert signal(SIGINT, before) == SIG_IGN
    if done < STEPS:
        assert (status, (run / "final").exists()) == ([2, 128 + sum(signals), 130][len(signals)], False)
        assert saved(run) == sorted({5, done} if done else {0})
        assert all(tree(run / "checkpoints")[name] == held[name] for name in held if "partial" not in name)
        if len(signals) == 1:  # the folder's space made two arguments of the printed one
            assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:] == ["--resume", str(run)]
        status = resume(run, "checkpoint.every=1", "checkpoint.keep=3")
    assert (status, differing(run, alone), list(run.glob("**/*.partial"))) == (0, [], [])


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
def test_a_run_may_end_sooner_or_later_than_was_planned(steps, alone, tmp_path, capsys):
    """A person who has seen enough asks for the model of the steps that are done; after a good run, for more steps.
    What is changed must be said, or the second half is a riddle; what is finished must neither train on nor be lost.
    """
    run = killed(alone, tmp_path / "run", min(steps, STEPS))
    assert resume(run, f"train.steps={steps}") == 0
    told = re.findall(r"^resuming with (\S+) (\d+), which was (\d+)$", capsys.readouterr().out, re.MULTILINE)
    assert told == [("train.steps", str(steps), str(STEPS))] * (steps != STEPS)
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
    whole, clipped = tmp_path / "whole", "train.objective=clipped"
    assert start(whole, *f"{clipped} model.dtype=bfloat16 train.steps=3 train.optimizer={mode}".split()) == 0
    first = read_progress(step(whole, 1))
    assert (first.drawn, first.optimizer_steps) == ((6, 1) if "draws" in mode else (3, 2)), "not the case it is about"
    run = killed(whole, tmp_path / "run", 1)
    assert (resume(run), differing(run, whole)) == (0, [])


def of_another_version(data: bytes, other: bytes) -> bytes:
    """state.json with another version, and a checksum that is right."""
    state = {**json.loads(data), "version": 99}
    del state["checksum"]
    right = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "checksum": right}).encode()


DAMAGES = {
    "cut": lambda data, other: data[: len(data) // 2],
    "flipped": lambda data, other: bytes([data[0] ^ 1]) + data[1:],
    "of another step": lambda data, other: other,
    "another number": lambda data, other: data.replace(b'"drawn": 2', b'"drawn": 3'),
    "no keys": lambda data, other: b"{}",
    "no object": lambda data, other: b"[8]",
    "of another version": of_another_version,
}
LAST = f"checkpoints/step-{STEPS:06d}/"
FIXED = f"""model.path=. model.revision=main model.dtype=bfloat16 data.path=. data.held_out=256 data.number_counts=[3]
        data.target_high=50 train.seed=2 train.optimizer=offload train.steps={STEPS - 1}""".split()
REFUSALS = [  # (damaged file, how, arguments, what the message names)
    *((LAST + name, how, "", name) for how in ("cut", "flipped", "missing") for name in FILES),
    *((LAST + name, "of another step", "", name) for name in (WEIGHTS, OPTIMIZER)),
    (LAST + STATE, "of another step", "", f"{WEIGHTS}, {OPTIMIZER}"),
    *((LAST + STATE, how, "", STATE) for how in ("another number", "no keys", "no object")),
    (LAST + STATE, "of another version", "", "version"),
    # a file that is shorter than at the checkpoint would be filled up with zero bytes
    *((name, how, "", name) for how in ("cut", "missing") for name in ("metrics.jsonl", "samples.txt")),
    # by default only a stop saves a checkpoint: a finished run was started anew, its metrics cut to nothing
    ("checkpoints", "missing", "", "final"),
    # with other problems held out, the evaluation is on problems that the first half was trained on
    *(("", "", f"--resume night train.threads=2 {setting}", setting.partition("=")[0]) for setting in FIXED),
    # a typing error must not begin a new run under an old name, nor continue another run
    ("", "", "--resume nigth", "nigth"),
    ("", "", "--resume night output.folder=X", "X"),
    ("", "", "--resume latest output.folder=X", "X"),
    ("", "", "--resume night --config runs/night/config.yml", "--config"),
    ("", "", "--resume night --name day", "--name"),
    ("", "", "train.steps=9", "--resume"),
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
    (run.parent / "begun" / "config.yml").write_text("rollout:\n")
    if how == "missing":
        (shutil.rmtree if (run / file).is_dir() else os.unlink)(run / file)
    elif how:
        data, other = (run / file).read_bytes(), step(run, STEPS - 1) / Path(file).name
        (run / file).unlink()  # other copies of the run may share its bytes
        (run / file).write_bytes(DAMAGES[how](data, other.exists() and other.read_bytes()))
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        status = train.main((arguments or f"--resume night train.steps={STEPS + 1}").split())
    except SystemExit as stop:  # from argparse, which shows the usage as well
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert (status, tree(tmp_path)) == (2, before)
    assert len(lines) == 1 or lines[0].startswith("usage"), lines
    assert named in lines[-1]


def test_no_flipped_bit_of_the_state_goes_unseen(alone, tmp_path):
    """Half of state.json is digits, and any other digit there is good JSON: a cursor elsewhere, another best score."""
    folder = step(killed(alone, tmp_path / "run", STEPS), STEPS)
    right, data = read_progress(folder), (folder / STATE).read_bytes()
    sums = json.loads(data)["files"]  # SHA-256, as `sha256sum` prints them
    assert tree(folder) == {**sums, STATE: hashlib.sha256(data).hexdigest()}
    with open(folder / STATE, "r+b", buffering=0) as file:
        for place, bit in product(range(len(data)), range(8)):
            os.pwrite(file.fileno(), data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :], 0)
            with suppress(UserError):
                assert read_progress(folder) == right  # the last digit of a float may make no difference


def test_the_best_weights_are_kept_and_the_best_score_goes_through_a_resume(tmp_path, monkeypatch):
    """A run that collapsed overnight kept only its last checkpoints, all of them after the collapse. Resumed, it took
    the first evaluation for its best, or kept the best-000004 of lost steps and removed its own new best-000003.
    """
    scores = [0.25, 0.5, 0.25, 0.25, 0.75, 0.0]  # after step 0, 1, ...
    score = lambda run, _: {"eval_success": scores[run.optimizer.steps], "eval_success_se": 0.01}  # noqa: E731
    monkeypatch.setattr(train, "evaluate", score)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert start(whole, "train.steps=5", "eval.every=1") == 0
    assert (saved(whole), saved(whole, "best")) == ([1, 2, 3, 4, 5], [4])
    scores[3] = 0.75
    assert resume(killed(whole, resumed, 1), "train.learning_rate=1e-4", "checkpoint.keep=4") == 0
    assert (saved(resumed), saved(resumed, "best")) == ([2, 3, 4, 5], [3])
    assert [read_progress(step(resumed, number)).best for number in (2, 3, 4, 5)] == [0.5, 0.75, 0.75, 0.75]
    best, *steps = (tree(path) for path in sorted((resumed / "checkpoints").iterdir()))
    assert best == {name: steps[1][name] for name in steps[1] if name not in (OPTIMIZER, STATE)}
    assert [files[WEIGHTS] == best[WEIGHTS] for files in steps] == [False, True, False, False]


@pytest.mark.parametrize("fits", ["nothing", "the weights"])
def test_training_continues_where_a_save_fails(fits, alone, tmp_path, monkeypatch, capsys):
    """A disk full at night ended the run, or left a checkpoint that is no good as the only one. And half a checkpoint
    in the last gigabyte takes the room of metrics and the final model: where there is plainly no room, none is begun.
    """
    run = killed(alone, tmp_path / "run", 6)
    held, limits, mkdir, made = tree(step(run, 6)), resource.getrlimit(resource.RLIMIT_FSIZE), os.mkdir, []
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: made.append(str(path)) or mkdir(path, *mode))
    if fits == "nothing":
        usage = shutil.disk_usage(run)._replace(free=9 * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:  # no file can grow beyond 5 MiB; Python ignores the signal SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20, limits[1]))
    try:
        status = resume(run, "checkpoint.keep=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    warned = [line for line in capsys.readouterr().err.splitlines() if "could not be saved" in line]
    assert [str(step(run, number)) in line for line, number in zip(warned, (7, 8), strict=True)] == [True, True]
    assert any("step-" in path for path in made) == (fits == "the weights")
    assert (saved(run), tree(step(run, 6)), list(run.glob("**/*.partial"))) == ([6], held, [])
    assert (status, differing(run, alone)) == (0, [])


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, for faults.c")
def test_the_last_good_checkpoint_survives_whichever_write_fails(tmp_path):
    """Every call of a save may fail. One error that is overlooked, and what is left is a checkpoint that is none."""
    library = tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "faults.c", "-ldl"], check=True)
    disk = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True, env=disk)
    assert done.returncode == 0, done.stderr
    for failed in json.loads(done.stdout):
        print(f"{len(failed)} calls failed, one at a time: {sorted(set(failed))}")
        assert failed.count("fsync") == len(FILES) + 3  # every file and three folders
        assert {"mkdir", "rename", "open", "ftruncate", "unlinkat", "write"} <= set(failed)


def save_with_faults(run: Path) -> None:
    """Lets each call of a save fail in turn, with each error, and prints their names as JSON: see faults.c."""
    disk = ctypes.CDLL(None)
    disk.disarm.restype = ctypes.c_char_p
    config = load_config(SETTINGS[1], ["checkpoint.keep=2"])  # an older checkpoint is removed in each save
    policy = Qwen2(Qwen2Config(512, 16, 32, 1, 2, 1, 8, 1e-6, 1e4, True, 64))
    optimizer = AdamW(policy.parameters(), config.train)
    small_files = {name: b"{}" for name in FILES[:-1] if name.endswith(".json")}

    def save(number: int) -> None:
        save_checkpoint(run, policy, small_files, optimizer, Progress(step=number), config)

    def files(number: int) -> dict[str, str]:
        assert read_progress(step(run, number)).step == number
        return {name: value for name, value in tree(step(run, number)).items() if name != STATE}

    steps, tried = count(), []
    save(next(steps))
    good = files(0)
    for code in (errno.ENOSPC, errno.EIO):
        tried.append([])
        failed = "none yet"
        while failed:
            number, told = next(steps), ""
            disk.arm(len(tried[-1]) + 1, code)
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
            tried[-1] += [failed] if failed else []
    print(json.dumps(tried))


if __name__ == "__main__":
    save_with_faults(Path(sys.argv[1]))
