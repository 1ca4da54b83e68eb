"""How a step's cost grows with group, questions, response length, model and ranks: tables and exponents.

    python -m tools.growth     # prints the tables, writes docs/growth.png (ten minutes on an idle machine)

Random weights of tiny shapes on one core, forced response lengths; CPU seconds, the best of three. For the ranks, wall
time of the demo's rollout and update, one core per rank.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plumbing.config import load_config
from tools import benchmark
from tools.benchmark import Workload, markdown

BASE = ["train.threads=1", "rollout.group_size=8", "rollout.questions_per_step=8", "rollout.max_new_tokens=128"]
SHAPES = {"0.8M": (128, 384, 4, 8, 2, True, 496), "3.2M": (256, 768, 4, 8, 2, True, 496)}
SHAPES["12.3M"] = (512, 1536, 4, 8, 2, True, 496)
AXES: dict[str, list[Any]] = {
    "group_size": [4, 8, 16, 32, 64],
    "questions_per_step": [8, 16, 32, 64, 128],
    "max_new_tokens": [64, 128, 256, 512, 1024],
    "parameters": list(SHAPES),
}


def measure(setting: str, value: int | str) -> tuple[float, float]:
    """Seconds of rollout and update."""
    size = str(value) if setting == "parameters" else "0.8M"
    changes = [] if setting == "parameters" else [f"rollout.{setting}={value}"]
    config = load_config("config_tiny.yml", [*BASE, *changes])
    work = Workload(config, size)
    if setting == "max_new_tokens":  # the same distribution of lengths, as a share of the limit
        uniforms = Workload(load_config("config_tiny.yml", [*BASE, "rollout.max_new_tokens=1024"]), size).uniforms
        work.uniforms = uniforms[:, :: 1024 // int(value)]
    return work.best_seconds(rounds=3)


def with_ranks(count: int) -> tuple[float, float]:
    """Median seconds of rollout and update in steps 2 to 10 of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "train.py"]
        command += ["--config", "config_tiny.yml", "--name", "run", f"output.folder={folder}"]
        command += ["train.threads=1", "train.steps=10", "eval.every=0", "checkpoint.every=0", "data.held_out=16"]
        subprocess.run(command, check=True, capture_output=True)
        steps = list(map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines()))[1:]
    rollout, update = (statistics.median(step[f"{part}_seconds"] for step in steps) for part in ("rollout", "update"))
    return rollout, update


def exponent(xs: list[float], ys: list[float]) -> float:
    """Slope of a line through the logarithms."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    x_mean, y_mean = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    return sum((x - x_mean) * (y - y_mean) for x, y in pairs) / sum((x - x_mean) ** 2 for x, _ in pairs)


def main() -> None:
    rows = [[str(count), *(f"{seconds:.2f} s" for seconds in with_ranks(count))] for count in (1, 2)]
    print(markdown(["ranks", "rollout", "update"], rows), "\n", flush=True)
    time.perf_counter = time.process_time
    benchmark.SHAPES |= SHAPES
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (setting, values) in zip(figure.subplots(1, 4, sharey=True), AXES.items(), strict=True):
        seconds = [measure(setting, value) for value in values]
        numbers = [float(size.rstrip("M")) for size in SHAPES] if setting == "parameters" else values
        rows = []
        for name, ys in zip(("rollout", "update"), zip(*seconds, strict=True), strict=True):
            slope = exponent([float(x) for x in numbers], list(ys))
            rows.append([name, *(f"{y:.2f} s" for y in ys), f"{slope:.2f}"])
            axes.loglog(numbers, ys, marker="o", label=f"{name}, exponent {slope:.2f}")
        print(markdown([setting, *map(str, values), "exponent"], rows), "\n", flush=True)
        axes.set(xlabel="million parameters" if setting == "parameters" else setting, ylabel="CPU seconds")
        axes.set_xticks(numbers, [str(value).rstrip("M") for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(Path("docs/growth.png"), dpi=110)


if __name__ == "__main__":
    main()
