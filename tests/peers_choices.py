"""The demo with a choice of other trainers in place of ours, to see what each of ours is worth.

    python tests/peers_choices.py plain_bf16 --config config_tiny.yml --name plain-1 model.dtype=bfloat16 train.seed=1

ours           no change, for the same clock
plain_bf16     torch's own AdamW on bf16 weights, gradients and moments, each rounded to nearest
every_row      zero-variance groups go through the update too
finished_rows  responses that have ended stay in the batch until the last one ends

What follows the choice goes to train.py. The seconds in the metrics are CPU time: with train.threads=1 those of a quiet
machine, whatever else is running. A run of plain_bf16 cannot be resumed: its moments are not in its checkpoints. LOG.md
has the tables, and this draws docs/peers.png from the runs NAME-1 and NAME-2 of each choice NAME in a folder:

    python tests/peers_choices.py draw runs
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run
import train
from benchmark import wait_for_all
from data_types import Episode, TrainSettings
from optimizer import AdamW
from plot import read_run
from rollout import Decoder


class PlainAdamW(AdamW):
    """Weights, gradients and moments in the dtype of the weights."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: TrainSettings) -> None:
        super().__init__(parameters, settings)
        for parameter in self.parameters:
            parameter.grad_dtype = parameter.dtype
        betas = settings.beta1, settings.beta2
        self.plain = torch.optim.AdamW(self.parameters, betas=betas, weight_decay=settings.weight_decay)

    def step(self) -> None:
        self.steps += 1
        self.plain.param_groups[0]["lr"] = self.learning_rate
        self.plain.step()


def ours() -> None:
    pass


def plain_bf16() -> None:
    run.AdamW = PlainAdamW


def every_row() -> None:
    Episode.active = property(lambda episode: episode.token_weight != 0.0)


def finished_rows() -> None:
    Decoder.drop_finished = wait_for_all


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


CHOICES = {choice.__name__: choice for choice in (ours, plain_bf16, every_row, finished_rows)}

if __name__ == "__main__":
    if sys.argv[1] == "draw":
        sys.exit(draw(sys.argv[2]))
    CHOICES[sys.argv[1]]()
    time.perf_counter = time.process_time
    sys.exit(train.main(sys.argv[2:]))
