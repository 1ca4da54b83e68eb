"""How long a GRPO step should take: bytes, FLOPs and network, from 0.5B to 72B and from 1 to 1,024 cards.

    python -m tools.cost_model            # the tables of docs/scaling.md
    python -m tools.cost_model --check    # predicted against measured, on this machine's CPU

Nothing in it is fitted to a GPU: it has data-sheet figures, and two utilisations that are guesses until a card has been
measured (tools/benchmark.py prints both).
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median

import torch

from grpo import packed_tokens
from plumbing.config import load_config
from qwen2_model import Qwen2, Qwen2Config
from tools.benchmark import SHAPES, Workload, copy_bandwidth, markdown, matmul_rate, shape_config

BANDWIDTH_UTILISATION, FLOP_UTILISATION = 0.6, 0.4  # guesses, of the data sheet
ACTIVE = 0.6  # share of rows in groups with variance


@dataclass(frozen=True)
class Batch:
    """Responses of one step, in tokens."""

    responses: int
    prompt: float
    mean: float  # of the response lengths
    square: float  # mean of their squares
    longest: int
    group: int = 8
    active: float = ACTIVE

    @classmethod
    def of(cls, responses: int) -> "Batch":
        """Lengths such as a 3B model's: log-normal, 331 tokens in the mean, decoded up to 1,024."""
        return cls(responses, prompt=150, mean=331, square=331**2 * math.exp(0.8**2), longest=1024)


@dataclass(frozen=True)
class Card:
    flops: float  # dense bf16, per second
    bandwidth: float  # bytes per second of its memory
    memory: float  # bytes
    link: float  # bytes per second to the other cards of a machine
    network: float  # bytes per second and card between machines of eight
    dollars: float  # per hour, a price of the kind one finds, not a quotation
    weight_bytes: int = 2  # in rollout and forward pass
    bandwidth_utilisation: float = BANDWIDTH_UTILISATION
    flop_utilisation: float = FLOP_UTILISATION


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


@cache
def parameters(shape: Qwen2Config) -> tuple[int, int]:
    """All of them, and those that a token's forward pass multiplies with: an untied embedding is only looked up."""
    with torch.device("meta"):
        model = Qwen2(shape)
    total = sum(weight.numel() for weight in model.parameters())
    return total, total - (0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size)


def predict(shape: Qwen2Config, card: Card, cards: int, batch: Batch, checkpointing: bool = True) -> Step | None:
    """Seconds of a step. Each card has all the weights in the rollout. None where it does not fit."""
    total, used = parameters(shape)
    rows = batch.responses / cards
    sharded = total * (2 + 4 + 6) > 0.9 * card.memory  # split: bf16 weights, fp32 gradients, 6 bytes of state
    # in the rollout: fp32 weights and moments, sharded, and all the weights in bf16
    if sharded and total * (12 / cards + 2) > 0.9 * card.memory:
        return None
    flops, bandwidth = card.flops * card.flop_utilisation, card.bandwidth * card.bandwidth_utilisation
    column = (
        2 * card.weight_bytes * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    )  # K and V per token
    read = batch.longest * card.weight_bytes * used + rows * column * (batch.prompt * batch.mean + batch.square / 2)
    prefill = rows / batch.group * batch.prompt * 2 * used / flops
    rollout = max(read / bandwidth, rows * batch.mean * 2 * used / flops) + prefill
    tokens = rows * batch.active * (batch.prompt / batch.group + batch.mean)  # each prompt once per group
    per_weight = 8 if checkpointing else 6  # FLOPs per token: forward 2, backward 4, recomputed forward 2
    update = tokens * per_weight * used / flops + (12 * 2 * total / (cards if sharded else 1)) / bandwidth
    link = card.link if cards <= 8 else card.network
    # FSDP2 gathers bf16 weights twice in each micro-batch and reduces fp32 gradients; the rollout gathers fp32 weights
    moved = (math.ceil(tokens / 8192) * (2 * 2 + 4) + 4) * total if sharded else 2 * 4 * total
    return Step(rollout, update, moved * (1 - 1 / cards) / link, sharded)


def table(card: str, counts: tuple[int, ...], responses: int) -> str:
    rows = []
    for size in SHAPES:
        cells = []
        for count in counts:
            step = predict(shape_config(size), CARDS[card], count, Batch.of(max(responses, 2 * count)))
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
                step = predict(shape_config(size), CARDS[card], count, Batch.of(responses))
                hours = steps * step.seconds / 3600 if step else 0
                cells.append(f"{hours:.1f} h, ${hours * count * CARDS[card].dollars:.0f}" if step else "-")
        rows.append([size, *cells])
    return markdown(["", "1 A40", "4 A40", "1 A100", "8 A100", "1 H100", "8 H100"], rows)


# ---- Against measurements ----------------------------------------------------------------------------------------

CHECKED = {  # hidden, inner, layers, heads, kv heads, tied, ids, as in benchmark.py
    "10M": (256, 768, 12, 4, 2, True, 4096),
    "27M": (384, 1152, 14, 6, 2, True, 8192),
    "53M": (512, 1536, 16, 8, 2, True, 8192),
    "130M": (768, 2304, 18, 12, 4, True, 8192),
}
BATCHES = {"8 x 128": (1, 8, 128), "32 x 128": (4, 8, 128), "8 x 512": (1, 8, 512), "64 x 64": (8, 8, 64)}
BASE = ("53M", "8 x 128")  # the two utilisations come from it: few rows, so that decoding is bound by bandwidth


def measured(size: str, batch: str) -> tuple[Batch, float, float]:
    """What this machine takes: (batch, seconds of the rollout, seconds of the update), random weights, fp32."""
    questions, group, limit = BATCHES[batch]
    changes = [f"rollout.questions_per_step={questions}", f"rollout.group_size={group}", "train.threads=1"]
    work = Workload(load_config("config_tiny.yml", [*changes, f"rollout.max_new_tokens={limit}"]), size)
    lengths = [len(episode.response_ids) for episode in work.episodes]
    prompt = fmean(len(episode.prompt_ids) for episode in work.episodes)
    squares = fmean(length**2 for length in lengths)
    active = packed_tokens(work.active) / packed_tokens(work.episodes)
    found = Batch(len(lengths), prompt, fmean(lengths), squares, max(lengths), group, active)
    return found, *work.best_seconds(rounds=2)


def calibrated(card: Card, shape: Qwen2Config, batch: Batch, rollout: float, update: float) -> Card:
    """The card with the utilisations that make this case come out right."""
    for _ in range(20):  # each depends a little on the other
        step = predict(shape, card, 1, batch, checkpointing=False)
        assert step
        flops, bandwidth = card.flop_utilisation, card.bandwidth_utilisation
        card = replace(card, flop_utilisation=flops * step.update / update)
        card = replace(card, bandwidth_utilisation=bandwidth * step.rollout / rollout)
    return card


def check() -> str:
    """Predicted over measured on one core of this machine, whose two utilisations come from BASE alone."""
    time.perf_counter = time.process_time  # other work on the machine does not count
    torch.set_num_threads(1)
    SHAPES.update(CHECKED)
    host = torch.device("cpu")
    speeds = {"flops": matmul_rate(host), "bandwidth": copy_bandwidth(host)}
    card = Card(**speeds, memory=1e12, link=1e9, network=1e9, dollars=0.0, weight_bytes=4)
    cases = [BASE, *((size, BASE[1]) for size in CHECKED), *(("27M", batch) for batch in BATCHES)]
    rows, errors = [], []
    for size, batch in dict.fromkeys(cases):
        found, *seconds = measured(size, batch)
        if (size, batch) == BASE:
            card = calibrated(card, shape_config(size), found, *seconds)
        step = predict(shape_config(size), card, 1, found, checkpointing=False)
        assert step
        pairs = list(zip((step.rollout, step.update), seconds, strict=True))
        if (size, batch) != BASE:
            errors += [abs(math.log(guess / seconds)) for guess, seconds in pairs]
        rows.append(
            [size, batch, *(f"{guess:.2f} / {seconds:.2f} = {guess / seconds:.2f}" for guess, seconds in pairs)]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    head = ["parameters", "responses x limit", "rollout, predicted / measured seconds", "update"]
    used = f"FLOPs {card.flop_utilisation:.2f} of {card.flops / 1e9:.0f} GFLOP/s, "
    used += f"bandwidth {card.bandwidth_utilisation:.2f} of {card.bandwidth / 1e9:.1f} GB/s"
    typical, worst = (math.exp(error) - 1 for error in (median(errors), max(errors)))
    return f"{markdown(head, rows)}\n\n{used}; error {typical:.0%} in the median, {worst:.0%} at most"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools.cost_model", description="Seconds and dollars of a step, predicted.")
    parser.add_argument("--responses", type=int, default=256, help="per step")
    parser.add_argument("--steps", type=int, default=400, help="to a success of 60 %%: a guess")
    parser.add_argument("--check", action="store_true", help="against this machine's CPU (five minutes)")
    options = parser.parse_args(argv)
    if options.check:
        print(check())
    else:
        for card in CARDS:
            print(table(card, (1, 4, 8, 64, 256, 1024), options.responses), "\n")
        print(dollars(options.steps, options.responses))


if __name__ == "__main__":
    main()
