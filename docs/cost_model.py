"""How long a GRPO step should take: bytes, FLOPs and network, from 0.5B to 72B and from 1 to 1,024 cards.

    PYTHONPATH=. python docs/cost_model.py    # the tables of docs/scaling.md

Nothing in it is fitted to a GPU: it has data-sheet figures, and two utilisations that are guesses until a card has been
measured (benchmark.py prints both).
"""

import argparse
import math
from dataclasses import dataclass

import torch

from benchmark import SHAPES, markdown, shape_config
from qwen2_model import Qwen2, Qwen2Config

BANDWIDTH_UTILISATION, FLOP_UTILISATION = 0.6, 0.4  # guesses, of the data sheet
PROMPT, MEAN, LIMIT, SPREAD = 150, 331, 1024, 0.8  # tokens; response lengths are log-normal
ACTIVE = 0.6  # share of rows in groups with variance


@dataclass(frozen=True)
class Card:
    flops: float  # dense bf16, per second
    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes
    link: float  # bytes per second to the other cards of a machine
    network: float  # bytes per second and card between machines of eight
    dollars: float  # per hour, a price of the kind one finds, not a quotation


CARDS = {
    "A40": Card(149.7e12, 0.696e12, 44e9, 25e9, 3e9, 0.40),
    "A100": Card(312e12, 2.04e12, 74e9, 300e9, 25e9, 1.60),
    "H100": Card(989e12, 3.35e12, 74e9, 450e9, 50e9, 2.50),
}


@dataclass(frozen=True)
class Step:
    rollout: float  # seconds
    update: float
    reduce: float
    sharded: bool

    @property
    def seconds(self) -> float:
        return self.rollout + self.update + self.reduce


def parameters(shape: Qwen2Config) -> tuple[int, int]:
    """All of them, and those that a token's forward pass multiplies with: an untied embedding is only looked up."""
    with torch.device("meta"):
        model = Qwen2(shape)
    total = sum(weight.numel() for weight in model.parameters())
    return total, total - (0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size)


def predict(shape: Qwen2Config, card: Card, cards: int, responses: int) -> Step | None:
    """A step of so many responses; None where it does not fit. Each card has all the weights in the rollout."""
    total, used = parameters(shape)
    rows = responses / cards
    sharded = total * (2 + 4 + 6) > 0.9 * card.memory  # split: bf16 weights, fp32 gradients, 6 bytes of state
    if sharded and total * (12 / cards + 2) > 0.9 * card.memory:
        return None
    flops, bandwidth = card.flops * FLOP_UTILISATION, card.bandwidth * BANDWIDTH_UTILISATION
    column = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim  # bytes of K and V per token
    square = MEAN**2 * math.exp(SPREAD**2)  # mean of the squared length
    read = LIMIT * 2 * used + rows * column * (PROMPT * MEAN + square / 2)
    rollout = max(read / bandwidth, rows * MEAN * 2 * used / flops) + rows / 8 * PROMPT * 2 * used / flops
    tokens = rows * ACTIVE * (PROMPT + MEAN)
    update = tokens * 8 * used / flops + (12 * 2 * total / (cards if sharded else 1)) / bandwidth
    link = card.link if cards <= 8 else card.network
    passes = max(1, tokens / 8192) if sharded else 0  # FSDP2 gathers the weights twice in each micro-batch
    moved = (2 * 4 * total + passes * (2 * 2 + 4) * total + (2 * total if sharded else 0)) * (1 - 1 / cards)
    return Step(rollout, update, moved / link, sharded)


def table(card: str, counts: tuple[int, ...], responses: int) -> str:
    rows = []
    for size in SHAPES:
        cells = []
        for count in counts:
            step = predict(shape_config(size), CARDS[card], count, max(responses, 2 * count))
            parts = f"{step.rollout:.0f} + {step.update:.0f} + {step.reduce:.0f}" if step else "-"
            cells.append(parts + (" s" if step and step.sharded else ""))
        rows.append([size, *cells])
    return markdown([card, *map(str, counts)], rows)


def dollars(steps: int, responses: int) -> str:
    rows = []
    for size in ("1.5B", "3B", "7B", "14B"):
        cells = []
        for card, counts in (("A40", (1, 4)), ("A100", (1, 8)), ("H100", (1, 8))):
            for count in counts:
                step = predict(shape_config(size), CARDS[card], count, responses)
                hours = steps * step.seconds / 3600 if step else 0
                cells.append(f"{hours:.1f} h, ${hours * count * CARDS[card].dollars:.0f}" if step else "-")
        rows.append([size, *cells])
    return markdown(["", "1 A40", "4 A40", "1 A100", "8 A100", "1 H100", "8 H100"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--responses", type=int, default=256, help="per step")
    parser.add_argument("--steps", type=int, default=400, help="to a success of 60 %%: a guess")
    options = parser.parse_args()
    for card in CARDS:
        print(table(card, (1, 4, 8, 64, 256, 1024), options.responses), "\n")
    print(dollars(options.steps, options.responses))
