"""Ends training with signals at random moments, resumes it, and compares with a run left alone.

    python tests/crash.py 100        # a few minutes; docs/log.md has its result. The suite (test_resume.py) runs 12

SIGKILL is sudden, half of the time in a save; Ctrl-C and SIGTERM let a run save first. A run that gets to its end must
be the run left alone (weights, optimizer state, metrics except times, samples, progress), bit for bit. One that was
killed before its first checkpoint cannot be resumed and is started again in a fresh folder.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from signal import SIG_DFL, SIGINT, SIGKILL, SIGTERM, signal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch._dynamo  # noqa: F401 (the first meta tensor imports it: once here, not in each child)

import train
from plumbing.checkpoint import saved
from short_run import arguments, byte_rewards, small_world

STEPS = 8
SETTINGS = ["rollout.questions_per_step=3", "eval.every=3", f"train.steps={STEPS}"]


def attempt(folder: Path, settings: list[str], log: Path, seconds: float, in_save: bool = False) -> int:
    """Start or resume the run in `folder`, send a signal after so many seconds (in a save); the exit status."""
    if not saved(folder):
        shutil.rmtree(folder, ignore_errors=True)
    typed = ["--resume", str(folder)] if saved(folder) else arguments(folder, *settings)

    def work() -> None:
        signal(SIGINT, SIG_DFL)  # before the run listens, it just ends, as for SIGTERM
        os.dup2(os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), 2)
        sys.exit(train.main(typed))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    deadline, saving = time.monotonic() + seconds, folder / "checkpoints"
    while child.is_alive() and (time.monotonic() < deadline or (in_save and not any(saving.glob("*.partial")))):
        time.sleep(0.001)
    time.sleep(in_save * random.choice((0.0, 0.002, 0.01, 0.05)))
    if child.is_alive():
        os.kill(child.pid, SIGKILL if in_save else random.choice((SIGKILL, SIGINT, SIGTERM)))
    child.join()
    return child.exitcode


def content(folder: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was stopped: no times, and nothing that has them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept: dict[str, object] = {"metrics": [{k: v for k, v in line.items() if "second" not in k} for line in lines]}
    for path in (folder / "samples.jsonl", *folder.glob("final/*"), *folder.glob("checkpoints/*/*")):
        kept[str(path.relative_to(folder))] = path.read_bytes() if path.name != "checksums.json" else b""
        if path.name == "state.json":
            progress = json.loads(path.read_bytes())["progress"]
            kept[str(path.relative_to(folder))] = progress | {"seconds": 0, "files": progress["files"]["samples.jsonl"]}
    return kept


def differing(run: Path, alone: Path) -> list[str]:
    """What differs between a finished run and the one left alone; of the checkpoints, only those that it has kept."""
    found, expected = content(run), content(alone)
    wanted = {name for name in expected if not name.startswith("checkpoints")}
    return sorted(name for name in found.keys() | wanted if found.get(name) != expected.get(name))


def main(stops: int) -> None:
    random.seed(0)
    train.grade = byte_rewards
    stopped = half_written = runs = 0
    with tempfile.TemporaryDirectory() as scratch:
        log, alone = Path(scratch, "log"), Path(scratch, "alone")
        settings = [*small_world(Path(scratch, "small")), *SETTINGS, "checkpoint.keep=2"]
        began = time.monotonic()
        assert attempt(alone, settings, log, 600) == 0, log.read_text()
        whole = time.monotonic() - began
        while stopped < stops:
            run, before = Path(scratch, f"run-{runs}"), []
            while True:
                seconds = random.uniform(0.0, whole / 2) if stopped < stops else 6000  # at last it may end
                status = attempt(run, settings, log, seconds, in_save=stopped < stops and stopped % 2 == 0)
                if status == 0:
                    break
                assert status in (-2, -9, -15, 130, 143), log.read_text()[-3000:]
                assert saved(run)[-1:] >= before, f"{before} is lost, and there is nothing newer"
                before = saved(run)[-1:]
                stopped += 1
                half_written += any(run.glob("**/*.partial"))
            assert content(run) == content(alone), differing(run, alone)
            runs += 1
    print(f"{stopped} stops, {half_written} left a save half-written; {runs} runs ended, all as the one left alone")


if __name__ == "__main__":
    main(int(sys.argv[1]))
