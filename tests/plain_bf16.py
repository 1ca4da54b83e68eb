"""What the demo learns from bf16 weights when nothing keeps the update: torch's own AdamW instead of optimizer.py.

    python tests/plain_bf16.py --config config_tiny.yml --name plain-1 model.dtype=bfloat16 train.steps=40 train.seed=1

Everything but the optimizer is train.py. The runs to compare with are the same command with `train.py` and
`train.optimizer=master` or `split`, or `model.dtype=float32`; LOG.md has the table.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data_types import TrainSettings  # noqa: E402


class PlainAdamW(torch.optim.AdamW):
    """Weights, gradients and moments in bf16, each rounded to nearest."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: TrainSettings) -> None:
        super().__init__(parameters, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
                         weight_decay=settings.weight_decay)


if __name__ == "__main__":
    train.AdamW = PlainAdamW
    sys.exit(train.main())
