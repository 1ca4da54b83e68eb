"""Does a long run keep its memory and its file descriptors? 300 steps of the tiny config, a checkpoint every 5 steps.

    python tests/endurance.py [steps] [settings ...]     # a quarter of an hour; LOG.md has its result

Looks at the training process from outside each time it prints a step, and compares the median resident memory of the
last third of the steps with that of the middle third (the first third grows with the responses, which get longer).
"""

import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(steps: int, settings: list[str]) -> int:
    memory, files = [], []
    with tempfile.TemporaryDirectory() as scratch:
        run = ["--config", "config_tiny.yml", "--name", "long", f"output.folder={scratch}"]
        command = [sys.executable, "train.py", *run, "checkpoint.every=5", f"train.steps={steps}", *settings]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if re.match(r"step +\d+/\d+  reward", line):  # not an evaluation
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
                files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
                if len(memory) % 20 == 0:
                    print(f"step {len(memory)}: {memory[-1]:.0f} MiB, {files[-1]} files", flush=True)
        if process.wait() != 0:
            return 1
    third = len(memory) // 3
    thirds = [seen[start : start + third] for seen in (memory, files) for start in (third, len(seen) - third)]
    middle, last, open_before, open_after = map(statistics.median, thirds)
    print(f"resident memory, median: {middle:.1f} MiB in the middle third, {last:.1f} MiB in the last")
    print(f"({last / middle - 1:+.2%}); open files, median: {open_before:g} and {open_after:g}, at most {max(files)}")
    return int(abs(last / middle - 1) > 0.02 or open_after > open_before)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, sys.argv[2:]))
