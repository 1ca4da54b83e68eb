"""Ends training with signals at random moments, resumes it by name, and compares with a run left alone.

    python tests/crash.py 100        # some minutes; LOG.md has its result. The suite (test_resume.py) runs 10

SIGKILL is sudden, half of the time in a save; Ctrl-C and SIGTERM let a run save first. A run that gets to its end must
be the run left alone (weights, optimizer state, metrics except times, samples, progress), bit for bit.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch._dynamo  # noqa: F401 (the first meta tensor imports it: once here, not in each child)
from short_run import arguments

import train

STEPS = 8
SETTINGS = ["rollout.questions_per_step=3", "rollout.max_new_tokens=32", "eval.every=3", f"train.steps={STEPS}"]


def attempt(folder: Path, log: Path, seconds: float, in_save: bool = False) -> int:
    """Start or resume the run in `folder`, send a signal after so many seconds (in a save); the exit status."""
    resumed = ["--resume", folder.name, f"output.folder={folder.parent}"]
    typed = resumed if (folder / "metrics.jsonl").exists() else arguments(folder, *SETTINGS, "checkpoint.keep=2")
    child = os.fork()
    if child == 0:
        status = 70  # a traceback
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the run listens, it just ends, as for SIGTERM
            os.dup2(os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1), 2)
            status = train.main(typed)
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline, done = time.monotonic() + seconds, 0
    while not done and (time.monotonic() < deadline or (in_save and not any(folder.glob("checkpoints/*.partial")))):
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
    time.sleep(in_save * random.uniform(0.0, 0.05))
    if not done:
        os.kill(child, signal.SIGKILL if in_save else random.choice((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)))
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def content(folder: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was stopped."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept: dict[str, object] = {"samples": (folder / "samples.jsonl").read_bytes()}
    kept["metrics"] = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]
    for path in sorted([*folder.glob("final/*"), *folder.glob("checkpoints/*/*")]):
        name = str(path.relative_to(folder))
        if path.name == "state.json":  # the length of metrics.jsonl depends on the times in it
            kept[name] = state = json.loads(path.read_bytes())
            del state["progress"]["files"]["metrics.jsonl"], state["progress"]["seconds"]
        elif path.name != "checksums.json":  # so does the checksum of state.json
            kept[name] = path.read_bytes()
    return kept


def differing(run: Path, alone: Path) -> list[str]:
    """What differs between a finished run and the one left alone; of the checkpoints, only those that it has kept."""
    found, expected = content(run), content(alone)
    wanted = {name for name in expected if not name.startswith("checkpoints")}
    return sorted(name for name in found.keys() | wanted if found.get(name) != expected.get(name))


def main(stops: int) -> None:
    random.seed(0)
    stopped = half_written = runs = 0
    with tempfile.TemporaryDirectory() as scratch:
        log, alone = Path(scratch) / "log", Path(scratch) / "alone"
        began = time.monotonic()
        assert attempt(alone, log, 600) == 0, log.read_text()
        whole = time.monotonic() - began
        while stopped < stops:
            run = Path(scratch) / f"run-{runs}"
            while status := attempt(run, log, random.uniform(0.0, whole / 2), stopped % 2 == 0):
                assert status in (-2, -9, -15, 130, 143), log.read_text()[-3000:]
                stopped += 1
                half_written += any(run.glob("**/*.partial"))
            assert differing(run, alone) + differing(alone, run) == [], differing(run, alone)
            runs += 1
    print(f"{stopped} stops, {half_written} left a save half-written; {runs} runs ended, all as the one left alone")


if __name__ == "__main__":
    main(int(sys.argv[1]))
