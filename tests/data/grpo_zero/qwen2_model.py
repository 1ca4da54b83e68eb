"""Stands in for GRPO-Zero's module of this name."""

from dataclasses import dataclass

import torch


@dataclass
class Qwen2Config:
    hidden_size: int
    attention_dropout: float = 0.0


class Transformer(torch.nn.Linear):
    def __init__(self, config, device):
        super().__init__(config.hidden_size, 1)

    def load_state_dict(self, weights):
        self.weights = weights
