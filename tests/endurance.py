"""Does a long run keep its memory and its file descriptors? 300 steps of the tiny config, a checkpoint every 5 steps.

    python tests/endurance.py [steps] [settings ...]     # a quarter of an hour; docs/log.md has its result

Looks at the training process from outside each time it prints a step, and compares the medians of the last third of the
steps with those of the middle third (in the first third the memory grows with the responses, which get longer).
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median


def main(steps: int = 300, *settings: str) -> int:
    memory, files = [], []
    with tempfile.TemporaryDirectory() as scratch:
        run = ["--config", "config_tiny.yml", "--name", "long", f"output.folder={scratch}"]
        command = [sys.executable, "train.py", *run, "checkpoint.every=5", f"train.steps={steps}", *settings]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step ") and "reward" in line:  # not an evaluation
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
                files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
    parts = slice(steps // 3, 2 * steps // 3), slice(2 * steps // 3, None)
    middle, last, before, after = (median(seen[part]) for seen in (memory, files) for part in parts)
    print(f"resident memory: {middle:.1f} MiB, then {last:.1f} ({last / middle - 1:+.2%})")
    print(f"open files: {before:g}, then {after:g}, at most {max(files)}")
    return process.wait() or int(abs(last / middle - 1) > 0.02 or after > before)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:]))
