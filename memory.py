"""Where the GPU memory of a run will go, before anything large is loaded.

A run that cannot fit should say so in its first second and name the setting to lower, not die in its first update
after minutes of sampling. The plan counts what the code allocates: weights, optimizer state and gradients exactly,
activations and the sampler's buffers from the shapes of what is kept; for the rest (CUDA itself, fragmentation) it
keeps RESERVE free.

    python benchmark.py --config config.yml --fits                  # which sizes fit on which cards, and how
    python benchmark.py --config config.yml --shape 3B --plan 48    # the plan of one config on a card of 48 GB

Left out: several GPUs, and the host's memory.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from data_types import Config, UserError
from grpo import CHUNK_TOKENS
from optimizer import SLICE
from qwen2_model import Qwen2, Qwen2Config

T = TypeVar("T")
GIB = 2**30
RESERVE = 1.25 * GIB  # CUDA's context, cuBLAS workspaces and what fragmentation costs
PROMPT_TOKENS = 160  # of a Countdown question in Qwen's chat template, rounded up

# hidden, inner, layers, query heads, kv heads, tied, vocabulary: the dense Qwen2.5 sizes
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, True, 151936),
    "3B": (2048, 11008, 36, 16, 2, True, 151936),
    "7B": (3584, 18944, 28, 28, 4, False, 152064),
    "14B": (5120, 13824, 48, 40, 8, False, 152064),
    "32B": (5120, 27648, 64, 40, 8, False, 152064),
    "72B": (8192, 29568, 80, 64, 8, False, 152064),
}


def shape_config(name: str) -> Qwen2Config:
    """The Qwen2Config of a real size, such as "3B"."""
    hidden, inner, layers, heads, kv_heads, tied, vocabulary = SHAPES[name]
    return Qwen2Config(vocabulary, hidden, inner, layers, heads, kv_heads, hidden // heads, 1e-6, 1e6, tied, 32768)


def parameter_count(shape: Qwen2Config) -> int:
    """Number of weights of a model of this shape."""
    with torch.device("meta"):  # shapes without memory
        return sum(parameter.numel() for parameter in Qwen2(shape).parameters())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. What is always there, and what the rollout and the update need on top, one after the other."""

    always: dict[str, float]
    rollout: dict[str, float]
    update: dict[str, float]
    questions_per_wave: int

    @property
    def peaks(self) -> tuple[float, float]:
        """Peak bytes of (rollout, update)."""
        base = sum(self.always.values())
        return base + sum(self.rollout.values()), base + sum(self.update.values())

    @property
    def peak(self) -> float:
        return max(self.peaks)

    def table(self, card: float | None) -> str:
        """The plan in words, one line a purpose, in GiB."""
        lines = [f"  {name:42s} {size / GIB:8.2f} GiB" for part in (self.always, self.rollout, self.update)
                 for name, size in part.items()]
        total = f"  peak: rollout {self.peaks[0] / GIB:.2f} GiB, update {self.peaks[1] / GIB:.2f} GiB"
        return "\n".join(["memory plan:", *lines, total + (f", of {card / GIB:.1f} GiB" if card else "")])


def plan_memory(config: Config, shape: Qwen2Config, card: float | None) -> MemoryPlan:
    """The plan for a model of this shape on a card of so many bytes (None: as if there were no limit)."""
    size = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    count, hidden, vocabulary = parameter_count(shape), shape.hidden_size, shape.vocab_size
    state = {"split": 6.0, "offload": 0.0, "master": 8.0 if size == 4 else 12.0}[config.train.optimizer]
    always = {"weights": float(count * size), f"optimizer state ({config.train.optimizer})": count * state,
              "CUDA and reserve": RESERVE}

    rollout = config.rollout
    columns = PROMPT_TOKENS + rollout.max_new_tokens
    row_cache = 2.0 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * columns * size
    row_logits = 3.0 * 4 * vocabulary  # logits, probabilities and their running sum, fp32
    prefill = PROMPT_TOKENS * layer_activations(shape, size) / 2  # of a question; nothing is kept for backward
    question = rollout.group_size * (row_cache + row_logits) + prefill
    room = (card or float("inf")) - sum(always.values())
    if rollout.kv_cache_gib:
        room = min(room, rollout.kv_cache_gib * GIB / (rollout.group_size * row_cache) * question)
    questions = int(max(1, min(rollout.questions_per_step, room // question)))
    rows = questions * rollout.group_size
    sampling = {f"rollout: KV cache, {rows} rows of {columns} tokens": rows * row_cache,
                "rollout: logits and prefill": rows * row_logits + questions * prefill}

    tokens = max(config.train.tokens_per_microbatch, columns)
    kept = hidden * size if config.train.activation_checkpointing else layer_activations(shape, size)
    update = {
        "update: gradients (fp32)": 4.0 * count,
        "update: activations": tokens * (shape.num_hidden_layers * kept + 2 * layer_activations(shape, size)),
        "update: logprob chunk": 4.0 * 4 * CHUNK_TOKENS * vocabulary + 3.0 * size * vocabulary * hidden,
    }
    slices = 4.0 * SLICE * (12 if config.train.optimizer == "offload" else 6)
    update["update: optimizer temporaries"] = max(0.0, slices - sum(update.values()) + 4.0 * count)
    return MemoryPlan(always, sampling, update, questions)


def layer_activations(shape: Qwen2Config, size: int) -> float:
    """Bytes a token that one layer keeps for backward: two norms, q/k/v with their rotation, attention, SwiGLU."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    turned = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    heads = turned + shape.num_key_value_heads * shape.head_dim
    return 2 * hidden * (4 + 2 * size) + heads * size + turned * (4 + size) + 2 * hidden * size + 5 * inner * size


def check_memory(config: Config, shape: Qwen2Config, device: torch.device) -> float:
    """Print the plan for a CUDA device and refuse what cannot fit; returns the bytes that the KV cache may take."""
    if device.type != "cuda":
        return float("inf") if config.rollout.kv_cache_gib is None else config.rollout.kv_cache_gib * GIB
    card = float(torch.cuda.get_device_properties(device).total_memory)
    plan = plan_memory(config, shape, card)
    print(plan.table(card), flush=True)
    if plan.peak > card:
        raise UserError(f"this run needs {plan.peak / GIB:.1f} GiB, {torch.cuda.get_device_name(device)} has "
                        f"{card / GIB:.1f} GiB: {advice(config, plan, card)}")
    return plan.rollout[next(iter(plan.rollout))] * 1.001


def expected_need(config: Config) -> str:
    """How much a config will need, as words for an error message, when its model's name tells the size."""
    size = next((name for name in SHAPES if f"-{name}-" in f"{config.model.path}-"), None)
    if size is None:
        return ""
    return f" with about {plan_memory(config, shape_config(size), None).peak / GIB:.0f} GiB of memory"


def advice(config: Config, plan: MemoryPlan, card: float) -> str:
    """Which setting to change first when a plan does not fit."""
    if plan.peaks[0] > card and plan.peaks[0] >= plan.peaks[1]:
        return "lower rollout.group_size or rollout.max_new_tokens (one question's group must fit at once)"
    if not config.train.activation_checkpointing:
        return "set train.activation_checkpointing=true"
    if config.model.dtype != "bfloat16":
        return "set model.dtype=bfloat16 and train.optimizer=split"
    if config.train.optimizer != "offload":
        return f"set train.optimizer={'split' if config.train.optimizer == 'master' else 'offload'}"
    return "lower train.tokens_per_microbatch, or take a smaller model or a larger card"


def fit_in_memory(attempt: Callable[[float], T], size: float, least: float, what: str) -> tuple[T, float]:
    """attempt(size), again with half the size whenever the GPU runs out of memory; its result, and the size that fit.

    `what` names the size, for the warning. Raises UserError when it does not fit with `least` either.
    """
    while True:
        try:
            return attempt(size), size
        except RuntimeError as error:  # cuBLAS and graphs have words of their own for it
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            if not out_of_memory and not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            failed = size  # and leave this block first: here the failed attempt's tensors are still referenced
        torch.cuda.empty_cache()
        size = max(least, failed / 2)
        if failed <= least:
            raise UserError(f"out of GPU memory even with the smallest {what}: lower rollout.max_new_tokens, set "
                            "train.activation_checkpointing=true or train.optimizer=offload, or free the GPU")
        print(f"warning: out of GPU memory; {what} lowered from {failed:,.0f} to {size:,.0f}, results unchanged",
              file=sys.stderr, flush=True)
