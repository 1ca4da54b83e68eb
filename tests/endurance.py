"""Does a long run keep its memory and its file descriptors? 300 steps of the tiny config, a checkpoint each 5 steps.

    python tests/endurance.py [steps] [settings ...]     # a quarter of an hour; LOG.md has its result

Looks at the training process from outside each time it prints a step, and compares the median resident memory of the
last third of the steps with that of the middle third (the first third grows with the answers, which get longer).
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(steps: int, settings: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "train.py", "--config", "config_tiny.yml", "--name", "long", "checkpoint.every=5",
                   f"output.folder={scratch}", f"train.steps={steps}", *settings]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        memory, files = [], []
        for line in process.stdout:
            if line.startswith("step") and not line.startswith("step   0"):
                status = Path(f"/proc/{process.pid}/status").read_text()
                memory.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
                files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
                if len(memory) % 20 == 0:
                    print(f"step {len(memory)}: {memory[-1]:.0f} MiB, {files[-1]} files", flush=True)
        if process.wait() != 0:
            return 1
    third = len(memory) // 3
    middle, last = statistics.median(memory[third : 2 * third]), statistics.median(memory[-third:])
    open_before, open_after = statistics.median(files[third : 2 * third]), statistics.median(files[-third:])
    print(f"resident memory, median: {middle:.1f} MiB in the middle third, {last:.1f} MiB in the last "
          f"({last / middle - 1:+.2%}); open files, median: {open_before:g} and {open_after:g}, at most {max(files)} "
          "(a look may fall into a save)")
    return int(abs(last / middle - 1) > 0.02 or open_after > open_before)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, sys.argv[2:]))
