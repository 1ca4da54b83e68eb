"""Draws the learning curves of runs: training success, held-out success and response length against minutes.

    for seed in 1 2 3 4 5; do python train.py --config config_tiny.yml --name demo-$seed train.seed=$seed; done
    python plot.py runs/demo-1 runs/demo-2 runs/demo-3 runs/demo-4 runs/demo-5 --out docs/learning.png

Needs matplotlib (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path

import pandas
from matplotlib import pyplot


def read_run(folder: Path) -> pandas.DataFrame:
    """A run's metrics by step, with `minutes`: time spent sampling and updating up to the end of each step."""
    metrics = pandas.read_json(folder / "metrics.jsonl", lines=True)
    metrics["minutes"] = (metrics["rollout_seconds"].fillna(0) + metrics["update_seconds"].fillna(0)).cumsum() / 60
    return metrics


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the learning curves of runs.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/learning.png"))
    arguments = parser.parse_args()
    figure, (success, length) = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, folder in enumerate(arguments.runs):
        run = read_run(folder)
        colour = f"C{number}"
        evaluated = run.dropna(subset="eval_greedy")
        success.plot(run.minutes, run.success * 100, color=colour, alpha=0.3, linewidth=1)
        success.errorbar(
            evaluated.minutes,
            evaluated.eval_greedy * 100,
            evaluated.eval_greedy_se * 100,
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            label=folder.name,
        )
        length.plot(run.minutes, run.response_length, color=colour, linewidth=1)
    success.set(title="success: held-out (points), training (thin)", ylabel="%", ylim=(0, 100))
    length.set(title="response length", ylabel="tokens", ylim=(0, None))
    for axes in (success, length):
        axes.set_xlabel("minutes of sampling and updating")
        axes.grid(alpha=0.3)
    success.legend(loc="lower right")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
