"""Draws the curves of runs: reward, held-out score, length, entropy, zero-variance groups and time, in one picture.

    python plot.py runs/NAME                       # or NAME; writes runs/NAME/curves.png
    python plot.py runs/A runs/B runs/C            # compares them, in runs/A/compared.png
    python plot.py runs/A runs/B --minutes --panels reward_correct response_length --out both.png

With --minutes the x axis is the time spent sampling and updating, as on the machine where the runs were made. Needs
matplotlib (requirements-dev.txt).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas

from plumbing.checkpoint import find_run
from plumbing.terminal import UserError, say, warn


def read_run(folder: Path) -> pandas.DataFrame:
    """A run's metrics by step, with `minutes`: time spent sampling and updating up to the end of each step."""
    path = folder / "metrics.jsonl"
    try:
        metrics = pandas.read_json(path, lines=True)
        spent = metrics[["rollout_seconds", "update_seconds"]].fillna(0).sum(axis=1)
    except (ValueError, KeyError):
        raise UserError(f"{path}: not the metrics of a run with at least one step") from None
    metrics["minutes"] = spent.cumsum() / 60
    metrics["zero_variance_share"] = metrics["zero_variance"] / metrics["groups"]
    metrics["step_seconds"] = spent.where(metrics.step > 0)
    return metrics


PANELS = {  # column: title, label of the y axis
    "reward": ("reward of the sampled responses", "mean of a step"),
    "eval_greedy": ("held-out score, greedy (sampled: dotted)", "mean and its standard error"),
    "response_length": ("response length", "tokens"),
    "entropy": ("entropy of the policy", "nats per token"),
    "zero_variance_share": ("zero-variance groups", "share of a step's groups"),
    "step_seconds": ("time", "seconds per step"),
}


def draw(runs: dict[str, pandas.DataFrame], x: str, columns: list[str]) -> Any:
    """The figure: a panel per column, a colour per run."""
    from matplotlib.figure import Figure

    down = -(-len(columns) // 3)
    across = -(-len(columns) // down)
    figure = Figure(figsize=(4 * across, 3.25 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, column in zip(panels, columns, strict=False):
        title, label = PANELS.get(column, (column, "mean of a step"))
        for number, run in enumerate(runs.values()):
            there, colour = run.dropna(subset=column), f"C{number}"
            if column == "eval_greedy":
                for score, line in (("eval_greedy", "-"), ("eval_sampled", ":")):
                    some = run.dropna(subset=score)
                    style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "capsize": 2}
                    axes.errorbar(some[x], some[score], some[f"{score}_se"], **style)
            elif len(there) > 20:  # the points, and their mean over a few steps
                axes.plot(there[x], there[column], color=colour, alpha=0.25, linewidth=1)
                smooth = there[column].rolling(5, center=True, min_periods=1).mean()
                axes.plot(there[x], smooth, color=colour, linewidth=1.6)
            else:
                axes.plot(there[x], there[column], color=colour, marker=".")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step" if x == "step" else "minutes of sampling and updating")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for number, name in enumerate(runs):
        axes.plot([], [], color=f"C{number}", label=name)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the curves of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run: its name, folder, or `latest`")
    parser.add_argument(
        "--out", type=Path, help="default: curves.png, or compared.png, in the first run's folder"
    )
    parser.add_argument("--panels", nargs="+", default=[*PANELS], help="metrics to draw instead of the six")
    parser.add_argument("--minutes", action="store_true", help="against minutes instead of steps")
    arguments = parser.parse_args(argv)
    out = arguments.out
    try:
        folders = [find_run(name) for name in arguments.runs]
        out = out or folders[0] / ("curves.png" if len(folders) == 1 else "compared.png")
        names = [folder.name or folder.resolve().name for folder in folders]
        unique = len({*names}) == len(names)
        titles = names if unique else map(str, folders)
        runs = dict(zip(titles, map(read_run, folders), strict=True))
        draw(runs, "minutes" if arguments.minutes else "step", arguments.panels).savefig(out, dpi=110)
    except UserError as error:
        warn(f"{error}", "plot.py")
        return 2
    except KeyError as error:
        warn(f"no metric {error} in these runs: see metrics.jsonl", "plot.py")
        return 2
    except (OSError, ValueError) as error:  # ValueError: a kind of picture that matplotlib does not know
        warn(f"{out}: cannot be written: {error}", "plot.py")
        return 2
    except ModuleNotFoundError:
        warn("drawing needs matplotlib: pip install matplotlib", "plot.py")
        return 2
    say(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
