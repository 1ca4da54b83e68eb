"""The optimizer and its learning rate."""

import math

import torch

from data_types import TrainSettings
from qwen2_model import Qwen2


def make_optimizer(policy: Qwen2, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over all parameters of the policy."""
    return torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
                             weight_decay=settings.weight_decay, fused=True)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Learning rate of step 1, 2, ...: linear warm-up, then constant, or a half cosine down to a tenth."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
