"""The demo with a choice of other trainers in place of ours, to see what each of ours is worth.

    python -m tools.peers_choices plain_bf16 --config config_tiny.yml --name plain-1 model.dtype=bfloat16 train.seed=1

ours           no change, for the same clock
plain_bf16     torch's own AdamW on bf16 weights, gradients and moments, each rounded to nearest
every_row      zero-variance groups go through the update too
finished_rows  responses that have ended stay in the batch until the last one ends

What follows the choice goes to train.py. The seconds in the metrics are CPU time: with train.threads=1 those of a quiet
machine, whatever else is running. A run of plain_bf16 cannot be resumed: its moments are not in its checkpoints.
docs/log.md has the tables, and this draws docs/peers.png from the runs NAME-1 and NAME-2 of each choice NAME in a
folder:

    python -m tools.peers_choices draw runs
"""

import argparse
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import train
from data_types import Episode, TrainSettings
from optimizer import AdamW
from plot import read_run
from plumbing import run
from plumbing.terminal import exit_status, run_program
from rollout import Decoder
from tools.benchmark import wait_for_all


class PlainAdamW(AdamW):
    """Weights, gradients and moments in the dtype of the weights."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: TrainSettings, dtype: torch.dtype) -> None:
        super().__init__(parameters, settings, dtype)
        for parameter in self.parameters:
            parameter.grad_dtype = parameter.dtype
        betas = settings.beta1, settings.beta2
        self.plain = torch.optim.AdamW(self.parameters, betas=betas, weight_decay=settings.weight_decay)

    def step(self) -> None:
        self.steps += 1
        self.plain.param_groups[0]["lr"] = self.learning_rate
        self.plain.step()


def draw(folder: str) -> None:
    """Reward and held-out score against minutes, a colour per choice."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("reward", "eval_greedy"), strict=True):
        for number, name in enumerate(("ours", "tokens", "every_row", "finished_rows", "plain_bf16")):
            for seed in (1, 2):
                metrics = read_run(Path(folder) / f"{name}-{seed}").dropna(subset=column)
                smooth = metrics[column].rolling(3 if column == "reward" else 1, min_periods=1).mean()
                label = name if seed == 1 and column == "reward" else None
                axes.plot(metrics.minutes, smooth, color=f"C{number}", linewidth=1.3, label=label)
        axes.set(xlabel="CPU minutes of sampling and updating", title=column, xlim=(0, None))
        axes.grid(alpha=0.25)
    panels[1].set(xlim=(0, 2), ylim=(0.25, 1))
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig("docs/peers.png", dpi=110)


CHOICES: dict[str, list[tuple[Any, str, Any]]] = {  # what is replaced: of which object, its name, by what
    "ours": [],
    "plain_bf16": [(run, "AdamW", PlainAdamW)],
    "every_row": [(Episode, "active", property(lambda episode: episode.token_weight != 0.0))],
    "finished_rows": [(Decoder, "compact", wait_for_all)],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.peers_choices", description="The demo with another trainer's choice.")
    parser.add_argument("choice", choices=[*CHOICES, "draw"])
    parser.add_argument("words", nargs=argparse.REMAINDER, help="for train.py; for draw, the folder of the runs")
    arguments = parser.parse_args(argv)
    if arguments.choice == "draw":
        return exit_status("tools.peers_choices", partial(draw, *arguments.words))
    for target, name, value in CHOICES[arguments.choice]:
        setattr(target, name, value)
    time.perf_counter = time.process_time
    return train.main(arguments.words)


if __name__ == "__main__":
    run_program(main)
