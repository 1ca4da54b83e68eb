"""What the demo learns from bf16 weights when nothing keeps the update: torch's own AdamW instead of optimizer.py.

    python tests/plain_bf16.py --config config_tiny.yml --name plain-1 model.dtype=bfloat16 train.steps=40 train.seed=1

Everything but the optimizer is train.py; its checkpoints lack the moments, so such a run cannot be resumed. The runs to
compare with are the same command with `train.py` and `train.optimizer=master` or `split`, or `model.dtype=float32`;
LOG.md has the table.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run
import train
from data_types import TrainSettings
from optimizer import AdamW


class PlainAdamW(AdamW):
    """Weights, gradients and moments in bf16, each rounded to nearest."""

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


if __name__ == "__main__":
    run.AdamW = PlainAdamW
    sys.exit(train.main())
