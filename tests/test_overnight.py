"""A run that nobody watches: a second run in its folder, a terminal that closes, lost output, errors, the hub."""

import multiprocessing
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGHUP, SIGINT, signal
from types import SimpleNamespace

import pytest
import torch

import train
from plumbing import model_folder
from qwen2_model import Qwen2
from rollout import Sampler
from short_run import ROOT, Done, arguments, resume, run, set_scores, small_world
from small_hub import small_hub


def left(folder: Path) -> tuple[list[int], list[str]]:
    """The steps that a run has metrics of, and its checkpoints."""
    steps = [metrics["step"] for metrics in Done(folder, 0, [], []).metrics()]
    return steps, sorted(path.name for path in folder.glob("checkpoints/*"))


@pytest.mark.parametrize("which", ["one name", "one second", "resumed"])
def test_of_two_runs_at_the_same_time_one_is_refused(which, small, tmp_path, monkeypatch):
    """The one that runs waits in its first reward until the other is refused."""
    context, folder = multiprocessing.get_context("fork"), tmp_path / "night"
    refused, typed = context.Event(), arguments(folder, *small)
    if which == "one second":
        typed = [*typed[:2], *typed[4:]]  # without a name
    if which == "resumed":
        assert run(folder, *small).status == 0
        typed = ["--resume", str(folder), "train.steps=5"]

    def child(number: int) -> None:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(tmp_path / f"{number}", "w")  # noqa: SIM115
        status = train.main(typed)
        refused.set()
        sys.exit(status)

    monkeypatch.setattr(time, "strftime", lambda *_: "night")
    monkeypatch.setattr(train, "grade", lambda *_: {"correct": float(refused.wait(600) or bool(refused.set()))})
    both = [context.Process(target=child, args=(number,)) for number in range(2)]
    for process in both:
        process.start()
    status = [process.join() or process.exitcode for process in both]
    assert (sorted(status), left(folder)[0]) == ([0, 2], [*range(6 if which == "resumed" else 4)])
    assert re.fullmatch(f".*{folder}.*\n", (tmp_path / f"{status.index(2)}").read_text())


def program(*typed: str, hangup: object = SIG_DFL, begin=int, **options: object) -> subprocess.Popen:
    """train.py in a process of its own, with the signals' default actions, which nohup may have changed."""
    begins = lambda: (signal(SIGINT, SIG_DFL), signal(SIGHUP, hangup), begin())  # noqa: E731
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # or nothing is left to write at the end
    return subprocess.Popen([sys.executable, ROOT / "train.py", *typed], preexec_fn=begins, env=env, **options)


def test_neither_lost_output_nor_a_hangup_under_nohup_stops_a_run(small, tmp_path):
    with open("/dev/full", "w") as full:
        typed = arguments(tmp_path / "run", *small, "train.steps=9")
        process = program(*typed, hangup=SIG_IGN, stdout=subprocess.PIPE, stderr=full)
        assert any(b"reward" in line for line in process.stdout), "no step is done"
        process.stdout.close()
        process.send_signal(SIGHUP)
        assert (process.wait(600), left(tmp_path / "run")[0]) == (0, [*range(10)])


def test_a_terminal_that_closes_stops_a_run_once_it_is_saved(small, tmp_path):
    """The kernel sends SIGHUP, and the shell another; nothing can be printed any more."""
    (terminal, other), shown, ignored = pty.openpty(), b"", 0
    name, slow = os.ttyname(other), ("train.steps=99999", "rollout.max_new_tokens=300", "checkpoint.every=0")
    termios.tcsetwinsize(terminal, (24, 99))  # without a size there are no progress bars
    own = {"start_new_session": True, "begin": lambda: os.close(os.open(name, os.O_RDWR))}  # it is now in control
    process = program(*arguments(tmp_path / "run", *small, *slow), stdin=other, stdout=other, stderr=other, **own)
    os.close(other)
    while not re.search(rb"step +2/", shown):
        shown += os.read(terminal, 4096)
    os.close(terminal)
    while process.poll() is None and not ignored & 1 << SIGHUP - 1:  # from when the first has come
        time.sleep(0.001)
        status = Path(f"/proc/{process.pid}/status").read_text()
        ignored = int(re.search(r"SigIgn:\s*(\w+)|$", status)[1] or "0", 16)
    process.send_signal(SIGHUP)
    assert process.wait(600) in (128 + SIGHUP, -SIGHUP)  # the latter where all is done but the exit
    steps, checkpoints = left(tmp_path / "run")
    assert checkpoints == [f"step-{steps[-1]:06d}"] > ["step-000001"]


@pytest.mark.parametrize("more", ["rollout.max_draws=1", "rollout.max_draws=2", "train.truncated=mask"])
def test_a_step_without_variance_is_measured_and_moves_nothing(more, small, tmp_path, monkeypatch):
    flat, update = lambda *_: {"format": 0.1, "correct": 0.0}, train.update
    monkeypatch.setattr(train, "update", lambda *of: monkeypatch.setattr(train, "grade", flat) or update(*of))
    done = run(tmp_path / "run", *small, "train.weight_decay=0.1", more)  # the first step has variance
    assert done.tensors(Path(small[0].partition("=")[2])) != done.tensors(1) == done.tensors(2) == done.tensors("final")
    for m in done.metrics()[2:]:
        assert (m["zero_variance"] == m["groups"], m["entropy"] > 1 > 1e5 * m["logprob_gap"]) == (True, True)


@torch.inference_mode()
def test_on_a_cpu_a_bf16_head_is_widened_once_per_wave(monkeypatch):
    policy, heads = model_folder.load_model(ROOT / "tiny", torch.device("cpu"), torch.bfloat16), []
    logits, sampler = Qwen2.logits, Sampler(policy, SimpleNamespace(end_ids=[0]), None, 9, None)
    monkeypatch.setattr(Qwen2, "logits", lambda self, x, head: heads.append(head) or logits(self, x, head))
    sampler.generate(policy, [[1, 2, 3], [4, 5]], torch.full((4, 9), 0.5), 1.0, 4)
    assert ({head.dtype for head in heads}, len({*map(id, heads)}), len(heads)) == ({torch.float32}, 1, 9)


def test_a_run_keeps_what_it_needs(small, tmp_path, monkeypatch):
    """The model that it began with may go, and all of a tokenizer's files stay with the weights; ~ is the home."""
    own, world, asked, get = small_world(tmp_path), tmp_path / "model", [], model_folder.snapshot_download
    files = {path.name: path.read_bytes() for path in (*world.iterdir(), tmp_path / "problems.parquet")}
    kept = model_folder.read_small_files(world).keys() - {"config.json", "generation_config.json"}  # written anew
    set_scores(monkeypatch, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(tmp_path / "run", *own, "output.folder=~/").status == 0
    shutil.rmtree(world)
    assert resume(tmp_path / "run", "train.steps=5").status == 0
    assert left(tmp_path / "run")[1] == ["best-000005", *(f"step-00000{step}" for step in range(1, 6))]
    for folder in (*tmp_path.glob("run/checkpoints/*"), tmp_path / "run/final"):
        assert {name: (folder / name).read_bytes() for name in kept} == {name: files[name] for name in kept}
    to = {"cache_dir": tmp_path / "cache", "token": False}
    patched = lambda *of, **by: asked.append(of[0]) or get(*of, **by, **to)  # noqa: E731
    monkeypatch.setattr(model_folder, "snapshot_download", patched)
    with small_hub(files) as to["endpoint"]:
        assert run(tmp_path / "hub", *own, "model.path=lab/model", "data.path=lab/countdown").status == 0
        assert resume(tmp_path / "hub", "train.steps=4").status == 0
    assert asked == ["lab/model"] * 2 + ["lab/countdown"] * 2  # its index, then what the index names
