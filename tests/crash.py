"""Kills the training process with SIGKILL at random moments, resumes it each time, and compares with a run left alone.

    python tests/crash.py 100        # the long form, some minutes; LOG.md has its result
    python tests/crash.py 10         # what the suite runs (test_resume.py)

Each attempt is a process of its own, forked from one that has only imported train.py, and so starts in a fraction of a
second. Most attempts make some progress before they are killed; when a run gets to its end, its weights, optimizer state,
metrics (times aside), samples and progress must be those of the run left alone, bit for bit; then the next one begins.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

SETTINGS = ["--config", str(ROOT / "config_tiny.yml"), f"model.path={ROOT / 'tiny'}",
            f"data.path={ROOT / 'tiny' / 'problems.parquet'}", "rollout.group_size=4", "rollout.questions_per_step=4",
            "rollout.max_new_tokens=48", "train.steps=12", "train.threads=1", "eval.size=16", "eval.every=3",
            "checkpoint.every=1", "checkpoint.keep=2", "output.samples=2"]


def attempt(folder: Path, log: Path, seconds: float) -> int | None:
    """Start or resume the run in `folder`; its exit status, or None if it had to be killed after so many seconds."""
    there = (folder / "config.yml").exists()
    which = ["--resume", str(folder)] if there else ["--name", folder.name]
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 70  # a traceback
        try:
            status = train.main([*SETTINGS, *which, f"output.folder={folder.parent}"])
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def content(folder: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was killed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept: dict[str, object] = {
        "metrics": [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines],
        "samples": (folder / "samples.txt").read_bytes()}
    for path in sorted([*folder.glob("final/*"), *folder.glob("checkpoints/*/*")]):
        name = str(path.relative_to(folder))
        kept[name] = path.read_bytes()
        if path.name == "state.json":  # the length of metrics.jsonl depends on the times in it
            state = json.loads(kept[name])
            state["progress"]["files"].pop("metrics.jsonl")
            kept[name] = {key: state[key] for key in ("progress", "files")}
    return kept


def main(kills: int) -> int:
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        began = time.monotonic()
        assert attempt(Path(scratch) / "alone", log, 600) == 0, log.read_text()
        whole = time.monotonic() - began
        expected = content(Path(scratch) / "alone")
        killed = during_save = runs = 0
        while killed < kills:
            folder = Path(scratch) / f"run-{runs}"
            while (status := attempt(folder, log, generator.uniform(0.0, whole))) is None:
                killed += 1
                during_save += bool(list(folder.glob("**/*.partial")))
            if status != 0:
                print(log.read_text()[-3000:])
                return 1
            found = content(folder)
            differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            if differing:
                print(f"run {runs} differs from the run left alone in: {sorted(differing)}")
                return 1
            runs += 1
        print(f"{killed} kills, {during_save} of them during a save; {runs} runs ended, each bit-identical to the run "
              f"left alone ({whole:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
