"""Stopping, killing, filling the disk, damaging files: a run goes on as if nothing had been, or says what is wrong.

Most tests begin with a copy of one finished run that holds only its checkpoint of step 7 of 8: what a machine that
died just after step 8, but before its checkpoint, leaves behind. Resumed, it must become the finished run again, bit
for bit.

    python tests/test_resume.py FOLDER     # with faults.c preloaded: the write faults, as a process of their own
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
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
import torch
from crash import ROOT, SETTINGS, content

import checkpoint
import train
from checkpoint import Progress, load_optimizer, read_progress, save_best, save_checkpoint, saved
from data_types import UserError, load_config
from logbook import Logbook
from model_folder import load_model, read_model_config
from optimizer import AdamW
from qwen2_model import Qwen2

STEPS = 8
SMALL = [*SETTINGS, f"train.steps={STEPS}", "checkpoint.keep=9"]
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FILES = ["config.json", "generation_config.json", WEIGHTS, OPTIMIZER, "tokenizer.json", "tokenizer_config.json"]


# -------------------------------------------------------------------------------------------- starting and comparing

def start(folder: Path, *overrides: str) -> int:
    """A new run in this process; its exit status."""
    return train.main([*SMALL, "--name", folder.name, f"output.folder={folder.parent}", *overrides])


def resume(folder: Path, *overrides: str) -> int:
    """Go on with a run under the config that it wrote; the exit status."""
    return train.main(["--config", str(folder / "config.yml"), "--resume", str(folder), *overrides])


def differing(run: Path, alone: Path) -> list[str]:
    """What a finished run has otherwise than the run left alone; of its checkpoints, those that it has kept."""
    found, expected = content(run), content(alone)
    wanted = {name for name in expected if not name.startswith("checkpoints")}
    return sorted(name for name in found.keys() | wanted if found.get(name) != expected.get(name))


def tree(folder: Path) -> dict[str, str | None]:
    """Every file in a folder with a hash of what is in it, and every folder."""
    return {str(path.relative_to(folder)): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() or None
            for path in folder.rglob("*")}


def copied(run: Path, folder: Path, *steps: int) -> Path:
    """A copy of a run with the checkpoints of these steps and no final model; large files share their bytes."""
    def ignored(parent: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "final" or re.match("step-", name) and int(name[5:]) not in steps}

    def copy(old: str, new: str) -> None:
        (os.link if old.endswith(".safetensors") else shutil.copyfile)(old, new)

    shutil.copytree(run, folder, ignore=ignored, copy_function=copy)
    return folder


def replace(path: Path, data: bytes) -> None:
    """Other bytes in a new file, since other copies of the run may share the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def complaint(capsys, status: int) -> str:
    """What a refused resume says: one line on stderr, after exit code 2."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1, lines
    return lines[0].removeprefix("train.py: ")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run that nothing disturbed, with all its checkpoints; to copy, never to change."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert start(folder) == 0
    return folder


@pytest.fixture
def run(alone, tmp_path) -> Path:
    """The run as a machine that died late in step 8 leaves it; metrics and samples are ahead of its checkpoint."""
    return copied(alone, tmp_path / "run", STEPS - 1)


# --------------------------------------------------------------------------------------------------- kills and signals

def test_killed_at_random_moments_it_ends_as_if_left_alone():
    """A kill -9 may come between any two instructions; a hole in the order of writing shows only in some of them."""
    done = subprocess.run([sys.executable, "tests/crash.py", "10"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d+ kills, \d+ of them during a save; \d+ runs ended, each bit-identical to the run left "
                        r"alone \(\d+\.\d s\)\n", done.stdout), done.stdout
    assert int(done.stdout.split()[0]) >= 10


def process(*arguments: str) -> subprocess.Popen:
    """train.py as a person starts it."""
    return subprocess.Popen([sys.executable, "train.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(stream: TextIO, beginning: str) -> None:
    """Read lines up to the one that begins so."""
    for line in stream:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the process ended before it printed {beginning!r}")


@pytest.mark.parametrize(("number", "every"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_signal_stops_it_and_the_printed_command_goes_on(alone, tmp_path, number, every, capsys):
    """Ctrl-C, or a cluster that ends the job, lost every step since the last checkpoint, and all without one."""
    folder = tmp_path / "stopped"
    with process(*SMALL, "--name", "stopped", f"output.folder={tmp_path}", f"checkpoint.every={every}") as stopped:
        wait_for(stopped.stdout, "step 2/")
        stopped.send_signal(number)
        printed, warned = stopped.stdout.read(), stopped.stderr.read()
    assert stopped.returncode == 128 + number, warned
    assert warned == "\nstopping: finishing this phase, then saving; once more to stop at once\n"
    done = int(saved(folder)[-1].name[-6:])
    command = f"python train.py --config {folder}/config.yml --resume {folder}"
    assert printed.endswith(f"stopped after step {done}; to go on:\n{command}\n")
    assert len(saved(folder)) == (done if every else 1)

    arguments = shlex.split(printed.splitlines()[-1])[2:]
    if every:
        with process(*arguments) as resumed:
            printed, warned = resumed.stdout.read(), resumed.stderr.read()
        status = resumed.returncode
    else:  # the same in this process, which has imported torch already
        status = train.main(arguments)
        printed, warned = capsys.readouterr()
    assert status == 0 and not warned
    assert printed.startswith(f"resuming from {folder}/checkpoints/step-{done:06d}\n")
    assert differing(folder, alone) == []


def wait_until_caught(pid: int, number: signal.Signals) -> None:
    """Wait until a process has a handler of its own for a signal."""
    while not int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16) >> number - 1 & 1:
        time.sleep(0.001)


def wait_until_worked(pid: int, ticks: int) -> None:
    """Wait until a process has used so much more processor time, in hundredths of a second."""
    def used() -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))

    began = used()
    while used() < began + ticks:
        time.sleep(0.001)


def test_a_second_signal_ends_it_at_once(alone, run):
    """An answer that takes minutes to sample kept the person who pressed Ctrl-C waiting; what is saved must survive."""
    held = tree(run / "checkpoints")
    with process("--config", f"{run}/config.yml", "--resume", str(run), "rollout.group_size=128",
                 "rollout.max_new_tokens=256") as stopped:
        wait_until_caught(stopped.pid, signal.SIGTERM)
        wait_until_worked(stopped.pid, 50)  # a signal before the sampling, which takes seconds, would just end the run
        stopped.send_signal(signal.SIGINT)
        wait_for(stopped.stderr, "stopping:")
        stopped.send_signal(signal.SIGINT)
        assert stopped.stderr.read() == "train.py: stopped at once; what was saved before is there to --resume\n"
    assert stopped.returncode == 130
    assert tree(run / "checkpoints") == held and not list(run.glob("*.partial"))
    assert resume(run, "rollout.group_size=4", "rollout.max_new_tokens=48") == 0
    assert differing(run, alone) == []


def signal_during(monkeypatch, name: str, number: signal.Signals, call: int = 1) -> None:
    """Let the signal come when train.py calls this function of it, the first time or a later one."""
    original: Callable = getattr(train, name)
    calls = 0

    def signalled(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return original(*arguments)

    monkeypatch.setattr(train, name, signalled)


def test_a_signal_during_the_evaluation_before_training_keeps_that_evaluation(alone, tmp_path, monkeypatch, capsys):
    """Nothing is trained yet, but an evaluation of a large model took minutes: step 0 is worth a checkpoint."""
    signal_during(monkeypatch, "grade", signal.SIGTERM)
    assert start(tmp_path / "early", "checkpoint.every=0") == 128 + signal.SIGTERM
    assert "stopped after step 0" in capsys.readouterr().out
    assert [folder.name for folder in saved(tmp_path / "early")] == ["step-000000"]
    progress = read_progress(tmp_path / "early" / "checkpoints" / "step-000000")
    files = {"metrics.jsonl": (tmp_path / "early" / "metrics.jsonl").stat().st_size, "samples.txt": 0}
    before = read_progress(saved(alone)[0]).before
    assert progress == Progress(best=before["eval_success"], before=before, files=files)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_during_the_evaluation_before_training_samples_no_more(tmp_path, monkeypatch):
    """A phase was begun after the signal, and what it sampled thrown away: minutes that a person waits for nothing."""
    signal_during(monkeypatch, "grade", signal.SIGTERM)
    monkeypatch.setattr(train, "draw_problems", lambda *_: pytest.fail("a rollout began after the signal"))
    assert start(tmp_path / "early") == 128 + signal.SIGTERM


@pytest.mark.parametrize(("function", "done"), [("draw_problems", STEPS - 1), ("update_policy", STEPS)])
def test_a_step_is_done_or_leaves_no_trace(function, done, alone, tmp_path, monkeypatch, capsys):
    """Stopped while it samples, a step must draw the same problems again; in the last update, it must not be repeated.

    Nothing was saved of the step before either, so what is saved is as of the stop.
    """
    run = copied(alone, tmp_path / "run", STEPS - 2)
    signal_during(monkeypatch, function, signal.SIGINT, call=2)
    assert resume(run, "checkpoint.every=0") == 130
    assert f"stopped after step {done};" in capsys.readouterr().out and not (run / "final").exists()
    assert [int(folder.name[-6:]) for folder in saved(run)] == [STEPS - 2, done]
    assert resume(run) == 0
    assert f"done: {STEPS} steps" in capsys.readouterr().out
    assert differing(run, alone) == []


def test_the_printed_command_works_for_a_folder_with_a_space(alone, tmp_path, monkeypatch, capsys):
    """`--resume my runs/a` is two arguments: the shell ran something else than what was printed."""
    folder = copied(alone, tmp_path / "my runs" / "run", STEPS - 1)
    signal_during(monkeypatch, "update_policy", signal.SIGINT)
    assert resume(folder) == 130
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words == ["python", "train.py", "--config", f"{folder}/config.yml", "--resume", str(folder)]


# -------------------------------------------------------------------------------------------------- exact resume

@pytest.mark.parametrize("settings", [
    ["model.dtype=bfloat16", "train.optimizer=split", "rollout.most_draws=2"],
    ["model.dtype=bfloat16", "train.optimizer=offload", "train.updates_per_batch=2", "train.objective=clipped"],
], ids=["split, drawing twice", "offload, two updates"])
def test_every_optimizer_and_cursor_resumes_exactly(settings, tmp_path):
    """Bias correction, stochastic rounding and the data cursor follow from counts that a step number does not give.

    A cursor taken for questions x steps repeats problems after dynamic sampling drew twice; an optimizer step taken for
    the training step is wrong with two updates a batch.
    """
    whole = tmp_path / "whole"
    assert start(whole, "train.steps=3", "eval.size=4", *settings) == 0
    first = read_progress(saved(whole)[0])
    assert first.drawn == (8 if "rollout.most_draws=2" in settings else 4), "the case is about a second draw"
    assert first.optimizer_steps == (2 if "train.updates_per_batch=2" in settings else 1)
    killed = copied(whole, tmp_path / "killed", 1)
    assert resume(killed) == 0
    assert differing(killed, whole) == []


def test_latest_is_the_run_that_wrote_last(alone, tmp_path, capsys):
    """By name or by the age of the folder, `latest` went on with another run than the one just stopped."""
    older, newer = (copied(alone, tmp_path / name, STEPS - 1) for name in ("b", "a"))
    for folder, seconds in ((older, 1_000), (newer, 2_000)):
        os.utime(folder / "metrics.jsonl", (seconds, seconds))
    before = tree(older)
    assert train.main([*SMALL, f"output.folder={tmp_path}", "--resume", "latest"]) == 0
    assert f"resuming from {newer}/checkpoints/step-{STEPS - 1:06d}\n" in capsys.readouterr().out
    assert differing(newer, alone) == [] and tree(older) == before


@pytest.mark.parametrize(("which", "message"), [
    ("latest", "--resume latest: {folder} holds no run; check output.folder"),
    ("{folder}/none", "--resume {folder}/none: no run there (a run's folder holds config.yml)"),
])
def test_there_must_be_a_run_to_resume(which, message, tmp_path, capsys):
    """A typing error must not begin a new run under an old name."""
    arguments = [*SMALL, f"output.folder={tmp_path}", "--resume", which.format(folder=tmp_path)]
    assert complaint(capsys, train.main(arguments)) == message.format(folder=tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- changed settings

def test_allowed_changes_are_named_and_kept(run, capsys):
    """A changed setting that nobody is told of makes the second half of a run a riddle."""
    assert resume(run, "train.learning_rate=1e-4", "checkpoint.keep=1", "train.threads=1") == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "resuming with train.learning_rate 0.0001, which was 0.0003",
        "resuming with checkpoint.keep 1, which was 9",
        f"resuming from {run}/checkpoints/step-{STEPS - 1:06d}"]
    config = load_config(str(run / "config.yml"))
    assert config.train.learning_rate == 1e-4 and config.checkpoint.keep == 1
    assert [folder.name for folder in saved(run)] == [f"step-{STEPS:06d}"]


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.path={run}"], "model.path is {run} but was {root}/tiny"),
    (["model.revision=main"], "model.revision is main but was None"),
    (["model.dtype=bfloat16"], "model.dtype is bfloat16 but was float32"),
    (["train.learning_rate=1e-4", "data.held_out=256"], "data.held_out is 256 but was 512"),
    (["data.path={run}"], "data.path is {run} but was {root}/tiny/problems.parquet"),
    (["data.number_counts=[3]"], "data.number_counts is (3,) but was ()"),
    (["data.target_high=50"], "data.target_high is 50 but was None"),
    (["train.seed=2"], "train.seed is 2 but was 1"),
    (["train.optimizer=offload"], "train.optimizer is offload but was master"),
])
def test_settings_that_would_make_it_another_run_are_refused(overrides, message, run, capsys):
    """With other problems held out, the evaluation is on problems that the first half was trained on."""
    (run / "final.partial").mkdir()
    before = tree(run)
    names = {"run": run, "root": ROOT}
    line = complaint(capsys, resume(run, *(override.format(**names) for override in overrides)))
    assert line == (message.format(**names) + " when this run began; it cannot change within a run: set it back, or "
                    "start another run with --name")
    assert tree(run) == before


def test_a_finished_run_resumed_only_writes_its_final_model_again(alone, tmp_path, capsys):
    """A script that resumes whatever it finds must not train a finished run further, nor lose what it has."""
    finished = copied(alone, tmp_path / "run", STEPS)
    before = tree(finished)
    assert resume(finished) == 0
    after = {name: value for name, value in tree(finished).items() if "tfevents" not in name}
    final = {f"final/{path.name}" for path in (alone / "final").iterdir()} | {"final"}
    assert after == {name: value for name, value in before.items() if "tfevents" not in name} | {
        name: tree(alone)[name] for name in final}
    printed = capsys.readouterr().out
    assert "held-out success, greedy:" in printed and "step " not in printed.replace(f"{STEPS} steps", "")


def test_more_steps_go_on_after_a_finished_run(alone, tmp_path):
    """The usual wish after a good run: the same run, longer."""
    longer = copied(alone, tmp_path / "run", STEPS)
    assert resume(longer, f"train.steps={STEPS + 1}") == 0
    lines = (longer / "metrics.jsonl").read_bytes().splitlines()
    assert lines[:-1] == (alone / "metrics.jsonl").read_bytes().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == STEPS + 1 and last["eval_success"] == read_progress(saved(longer)[-1]).after["eval_success"]
    eighth, ninth, final = (load_model(folder, torch.device("cpu"), torch.float32).state_dict()
                            for folder in (*saved(longer), longer / "final"))
    assert all(torch.equal(ninth[name], final[name]) for name in final)
    assert any(not torch.equal(eighth[name], final[name]) for name in final)


def test_fewer_steps_than_are_done_are_refused(run, capsys):
    """Training cannot be undone; a model of 7 steps must not pass for one of 6."""
    before = tree(run)
    line = complaint(capsys, resume(run, f"train.steps={STEPS - 2}"))
    assert line == (f"{run}/checkpoints/step-{STEPS - 1:06d}: is {STEPS - 1} steps on, and train.steps is {STEPS - 2}; "
                    "raise it to go on")
    assert tree(run) == before


def test_as_many_steps_as_are_done_end_the_run_there(run, capsys):
    """A person who has seen enough stops the run and asks for the model of the steps that are done."""
    assert resume(run, f"train.steps={STEPS - 1}") == 0
    assert "held-out success, greedy:" in capsys.readouterr().out
    expected, found = (run / "checkpoints" / f"step-{STEPS - 1:06d}" / WEIGHTS, run / "final" / WEIGHTS)
    assert found.read_bytes() == expected.read_bytes()


def test_a_finished_run_without_checkpoints_is_not_started_anew(alone, tmp_path):
    """The default saves no checkpoint but on a stop: resumed by mistake, days of metrics were cut to nothing."""
    folder = copied(alone, tmp_path / "run")
    shutil.copytree(alone / "final", folder / "final")
    before = tree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", lambda *_: pytest.fail("it began to train again"))
        assert resume(folder) == 2
    assert tree(folder) == before


# ------------------------------------------------------------------------------------------------ half-written things

def test_what_a_killed_run_had_half_written_is_never_used_and_goes(alone, run, capsys):
    """Every file may be there and one of them short: only the name tells a checkpoint from an attempt at one."""
    for name in ("checkpoints/step-000009.partial", "checkpoints/best-000009.partial", "final.partial"):
        shutil.copytree(alone / "checkpoints" / f"step-{STEPS:06d}", run / name)
    (run / "config.yml.partial").write_text("rollout:\n  group_s")
    for name in ("metrics.jsonl", "samples.txt"):
        with open(run / name, "a") as file:
            file.write('{"step": 9, "reward": 0.')
    assert resume(run) == 0
    assert f"resuming from {run}/checkpoints/step-{STEPS - 1:06d}\n" in capsys.readouterr().out
    assert not list(run.glob("**/*.partial"))
    assert differing(run, alone) == []


def test_a_run_without_a_checkpoint_starts_anew(alone, tmp_path, capsys):
    """Killed in its first steps: their metrics, left in the file, would stand there twice."""
    folder = copied(alone, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    assert resume(folder) == 0
    assert capsys.readouterr().out.startswith(f"{folder} has no checkpoint yet: starting it anew\nstep 0/{STEPS}  ")
    assert differing(folder, alone) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_metrics_or_samples_that_were_cut_or_lost_are_refused(name, run, capsys):
    """A file shorter than at the checkpoint would be filled up with zero bytes, and read back as damaged."""
    size = read_progress(saved(run)[0]).files[name]
    for left in (size - 1, None):
        (run / name).unlink() if left is None else os.truncate(run / name, left)
        weights = tree(run / "checkpoints")
        line = complaint(capsys, resume(run))
        assert line == f"{run / name}: shorter than the {size} bytes it had at the checkpoint; put it back to resume"
        assert tree(run / "checkpoints") == weights and not (run / "final").exists()


# ------------------------------------------------------------------------------------------------ damaged checkpoints

def truncated(path: Path, other: Path) -> None:
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    replace(path, bytes(data))


def swapped(path: Path, other: Path) -> None:
    replace(path, other.read_bytes())


def missing(path: Path, other: Path) -> None:
    path.unlink()


def state(change: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    """Another state.json, its checksum right."""
    def damage(path: Path, other: Path) -> None:
        content = json.loads(path.read_text())
        del content["checksum"]
        change(content)
        replace(path, json.dumps({**content, "checksum": checkpoint.text_checksum(content)}).encode())

    return damage


def text(content: str) -> Callable[[Path, Path], None]:
    return lambda path, other: replace(path, content.encode())


CHANGED = "{folder}: not as it was saved: {names}; remove this folder to go on from the checkpoint before it"
VERSION = "{folder}/state.json: written by another version of this program; go on with that one"
DAMAGES = [
    *((damage, name, CHANGED.replace("{names}", name)) for damage in (truncated, flipped, missing) for name in FILES),
    *((swapped, name, CHANGED.replace("{names}", name)) for name in (WEIGHTS, OPTIMIZER)),
    (swapped, STATE, CHANGED.replace("{names}", f"{WEIGHTS}, {OPTIMIZER}")),
    (lambda path, other: replace(path, path.read_bytes().replace(b'"step": 8', b'"step": 9')), STATE,
     CHANGED.replace("{names}", STATE)),
    (text("{}"), STATE, CHANGED.replace("{names}", STATE)),
    *((damage, STATE, CHANGED.replace("{names}", STATE))
      for damage in (missing, text(""), text("step: 8"), text("[8]"))),
    (state(lambda content: content.pop("progress")), STATE, VERSION),
    (state(lambda content: content["progress"].update(epoch=1)), STATE, VERSION),
    (state(lambda content: content.update(progress=[8])), STATE, VERSION),
    (state(lambda content: content["progress"].pop("drawn")), STATE, VERSION),
    (state(lambda content: content.pop("files")), STATE, CHANGED.replace("{names}", STATE)),
    (state(lambda content: content["progress"].update(files={"metrics.jsonl": "10"})), STATE, VERSION),
    (state(lambda content: content["progress"].update(before="x")), STATE, VERSION),
    (state(lambda content: content["progress"].update(step=-3)), STATE, VERSION),
]


@pytest.mark.parametrize(("damage", "name", "message"), DAMAGES,
                         ids=[f"{name} {number}" for number, (_, name, _) in enumerate(DAMAGES)])
def test_a_damaged_checkpoint_is_named_and_nothing_is_changed(damage, name, message, alone, tmp_path, capsys):
    """safetensors takes any bytes for weights: a flipped bit, or the optimizer of another step, trains on unseen."""
    run = copied(alone, tmp_path / "run", STEPS - 1, STEPS)
    before, last = saved(run)
    damage(last / name, before / name)
    held = tree(run)
    line = complaint(capsys, resume(run, f"train.steps={STEPS + 1}"))
    assert line == message.format(folder=last)
    assert tree(run) == held


def test_without_the_damaged_folder_the_checkpoint_before_it_goes_on(alone, tmp_path, capsys):
    """The advice in the message must be worth following."""
    run = copied(alone, tmp_path / "run", STEPS - 1, STEPS)
    flipped(saved(run)[-1] / WEIGHTS, saved(run)[0])
    named = complaint(capsys, resume(run)).partition(":")[0]
    shutil.rmtree(named)
    assert resume(run) == 0
    assert differing(run, alone) == []


def test_no_flipped_bit_of_the_state_goes_unseen(run):
    """Half of state.json is digits, and any other digit there is good JSON: a cursor elsewhere, another best score."""
    folder = saved(run)[0]
    with open(folder / STATE, "r+b", buffering=0) as file:
        for place, byte in enumerate(file.read()):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), place)
                with pytest.raises(UserError):
                    read_progress(folder)
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert read_progress(folder).step == STEPS - 1


# ------------------------------------------------------------------------------------------------- what is kept

def scored(folder: Path, scores: list[float], keep: int) -> dict[int, dict[str, torch.Tensor]]:
    """Steps that end as train.py ends them, with these scores on the held-out problems; the weights of each step."""
    config = load_config(SMALL[1], [*SMALL[2:], f"checkpoint.keep={keep}", f"output.folder={folder.parent}"])
    run, weights = train.set_up(config), {}
    with Logbook(config, folder, {}, 0) as logbook:
        for step, score in enumerate(scores, 1):
            with torch.no_grad():
                run.policy.hf_tensors()["model.norm.weight"].add_(1.0)
            weights[step] = {name: tensor.clone() for name, tensor in run.policy.hf_tensors().items()}
            train.finish_step(run, logbook, step, 4, [], {"skipped": 0, "eval_success": score})
    return weights


def test_the_newest_checkpoints_and_the_best_weights_are_kept(tmp_path):
    """A run that collapses overnight kept only its last checkpoints, all of them after the collapse."""
    folder = tmp_path / "run"
    weights = scored(folder, [0.5, 0.75, 0.75, 0.25], keep=2)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best-000002", "step-000003", "step-000004"]
    for name in names:
        opened = load_model(folder / "checkpoints" / name, torch.device("cpu"), torch.float32).hf_tensors()
        expected = weights[int(name[-6:])]
        assert opened.keys() == expected.keys() and all(torch.equal(opened[key], expected[key]) for key in expected)
    assert read_progress(folder / "checkpoints" / "step-000004").best == 0.75


def test_the_best_score_goes_through_a_resume(alone):
    """A run that forgot its best would call the first evaluation after a resume the best, and drop the weights."""
    scores = {m["step"]: m.get("eval_success", 0.0) for m in map(json.loads, open(alone / "metrics.jsonl"))}
    for folder in saved(alone):
        progress = read_progress(folder)
        assert progress.best == max(score for step, score in scores.items() if step <= progress.step)
    kept = [int(path.name[-6:]) for path in saved(alone, "best")]
    assert kept == [step for step in (max(scores, key=scores.get),) if step]  # none where training never helped


def test_a_best_of_steps_that_were_lost_gives_way(tmp_path):
    """Resumed from step 1 with another learning rate, a run kept the best-000003 of before and removed its own best."""
    folder = tmp_path / "run"
    scored(folder, [0.5, 0.5, 0.75], keep=2)
    policy = load_model(ROOT / "tiny", torch.device("cpu"), torch.float32)
    save_best(folder, policy, ROOT / "tiny", 2)
    assert [path.name for path in saved(folder, "best")] == ["best-000002"]


def test_a_run_that_stopped_for_its_skips_stops_again(tmp_path):
    """Resumed with nothing changed, it went on skipping for ever, since the count was past the bound already."""
    run = train.set_up(load_config(SMALL[1], [*SMALL[2:], f"output.folder={tmp_path}"]))
    run.progress.step = run.progress.skipped_in_a_row = run.config.train.most_skips
    with Logbook(run.config, tmp_path / "run", {}, run.progress.step) as logbook, pytest.raises(UserError):
        train.finish_step(run, logbook, run.progress.step + 1, 4, [], {"skipped": 1})


# ------------------------------------------------------------------------------------------------- disks that fail

def test_too_little_space_is_told_before_anything_is_written(alone, run, monkeypatch, capsys):
    """To fill the last gigabyte with half a checkpoint takes the room that metrics and the final model need."""
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=9 * 2**20))
    asked: list[Path] = []
    monkeypatch.setattr(checkpoint, "appearing", lambda folder: asked.append(folder) or checkpoint.writing(folder))
    assert resume(run) == 0
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    assert capsys.readouterr().err == (
        f"warning: a checkpoint of step {STEPS} could not be saved: {last}: needs 0.01 GiB and the disk has 0.01 GiB "
        "left: free some, or set output.folder to another disk; training goes on\n")
    assert last not in asked and not last.exists()
    assert differing(run, alone) == []


@contextmanager
def largest_file(size: int):
    """No file can grow beyond so many bytes: what a full disk is for the large ones, while small ones still fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_goes_on_where_a_save_fails(alone, tmp_path, capsys):
    """A disk full at night ended the run, or left a checkpoint that is no good as the only one."""
    run = copied(alone, tmp_path / "run", STEPS - 2)
    held = tree(saved(run)[0])
    with largest_file(5 * 2**20):  # room for the weights, not for the optimizer's state
        assert resume(run, "checkpoint.keep=1") == 0
    warned = capsys.readouterr().err.splitlines()
    for line, step in zip(warned, (STEPS - 1, STEPS), strict=True):
        folder = f"{run}/checkpoints/step-{step:06d}"
        assert re.fullmatch(f"warning: a checkpoint of step {step} could not be saved: {folder}.partial: cannot be "
                            "written: .*File too large.*; training goes on", line), line
    assert [folder.name for folder in saved(run)] == [f"step-{STEPS - 2:06d}"] and tree(saved(run)[0]) == held
    assert not list(run.glob("**/*.partial"))
    assert differing(run, alone) == []


REMOVALS = {"unlink", "unlinkat", "rmdir"}
FAULTS = (errno.ENOSPC, errno.EIO)


def test_the_last_good_checkpoint_loads_whichever_write_fails(tmp_path):
    """Every call of a save may fail. One error that is overlooked, and what is left is a checkpoint that is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build faults.c with")
    library = tmp_path / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, ROOT / "tests" / "faults.c", "-ldl"], check=True)
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True,
                          env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout)
    for code in map(str, FAULTS):
        print(f"errno {code}: {len(tried[code])} calls failed, one at a time")
        assert len(tried[code]) > 20
        # Weights, optimizer state, config.json and state.json are written; every file and three folders flushed.
        assert tried[code].count("write") == 4 and tried[code].count("fsync") == 10
        assert {"mkdir", "rename", "open", "sendfile", "ftruncate", "unlinkat"} <= set(tried[code])


def tiny_policy(folder: Path) -> tuple[Path, Qwen2]:
    """A model of a few thousand weights, and a model folder with its config and the tokenizer of tiny/."""
    source = folder / "source"
    source.mkdir()
    for path in (ROOT / "tiny").glob("*.json"):
        shutil.copy(path, source)
    shape = json.loads((source / "config.json").read_text())
    shape |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 8}
    (source / "config.json").write_text(json.dumps(shape))
    return source, Qwen2(read_model_config(source))


def save_with_faults(scratch: Path) -> None:
    """Let each call of a save fail in turn, with each error; prints their names as JSON. Runs with faults.c preloaded.

    Steps 0 and 1 are saved undisturbed, then step 2 with a fault; keep=2, so that the oldest one is removed too.
    """
    disk = ctypes.CDLL(None)
    disk.disarm.restype = ctypes.c_char_p
    source, policy = tiny_policy(scratch)
    settings = load_config(str(ROOT / "config_tiny.yml")).train
    optimizer = AdamW(policy.parameters(), settings)
    versions: list[dict[str, torch.Tensor]] = []

    def save(run: Path, step: int) -> None:
        tensors = {**policy.hf_tensors(), **optimizer.tensors()}
        if len(versions) == step:
            generator = torch.Generator().manual_seed(step)
            versions.append({name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()})
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(versions[step][name])
        save_checkpoint(run, policy, source, optimizer, Progress(step=step, optimizer_steps=step), 2)

    def newest_loads(run: Path) -> int:
        folder = saved(run)[-1]
        model = load_model(folder, torch.device("cpu"), torch.float32)
        state = AdamW(model.parameters(), settings)
        progress = read_progress(folder)
        load_optimizer(folder, state, progress)
        step = progress.step
        loaded = {**model.hf_tensors(), **state.tensors()}
        assert folder.name == f"step-{step:06d}" and state.steps == step and loaded.keys() == versions[step].keys()
        assert all(torch.equal(loaded[name], versions[step][name]) for name in loaded)
        assert [read_progress(folder).step for folder in saved(run)][-2:] == [step - 1, step], "one is half removed"
        return step

    (scratch / "before").mkdir()
    save(scratch / "before", 0)
    save(scratch / "before", 1)
    tried: dict[int, list[str]] = {code: [] for code in FAULTS}
    for code in FAULTS:
        while True:
            run = Path(shutil.copytree(scratch / "before", scratch / "run"))
            told = False
            disk.arm(len(tried[code]) + 1, code)
            try:
                save(run, 2)
            except UserError as error:
                told = os.strerror(code) in str(error)
                assert told, error
            failed = disk.disarm().decode().removesuffix("64")
            step = newest_loads(run)
            if not failed:
                assert step == 2 and not told
                shutil.rmtree(run)
                break
            # Python makes two good by itself: mkdir of a folder that is there, and sendfile, by read and write.
            assert told or (step == 2 and failed in ("mkdir", "sendfile")), f"nobody was told that {failed} failed"
            assert failed in REMOVALS or not list(run.glob("**/*.partial")), f"{failed} left something half-written"
            save(run, 2)
            assert newest_loads(run) == 2, "the disk is well again, and so is the save"
            shutil.rmtree(run)
            tried[code].append(failed)
    print(json.dumps(tried))


if __name__ == "__main__":
    save_with_faults(Path(sys.argv[1]))
