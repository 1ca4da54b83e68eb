"""Where the GPU memory of a run will go, before anything large is loaded; and limits for when it runs out all the same.

A run that cannot fit should say so in its first second and name the setting to lower, not die in its first update
after minutes of sampling. The plan counts what the code allocates, from shapes alone; tests/test_memory.py holds it
against a count of live bytes. For the rest (cuBLAS workspaces, fragmentation) it keeps RESERVE free.

    python -m tools.benchmark --config config.yml --fits                  # which sizes fit on which cards, and how
    python -m tools.benchmark --config config.yml --shape 3B --plan 48    # the plan of one config on a card of 48 GB

Left out: the host's memory that `offload` takes.
"""

import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from data_types import CHUNK_TOKENS, COLUMN_BLOCK, PREFILL_TOKENS, Config
from plumbing.ranks import T, world_size
from plumbing.terminal import UserError, out_of_memory, say, warn
from qwen2_model import Qwen2, Qwen2Config

GIB = 2**30
RESERVE = 0.75 * GIB


class Limit:
    """How much is done at a time: half as much from the moment that memory runs out.

    All randomness comes with the work, so another attempt does the same, up to the rounding of another batch shape.
    """

    def __init__(self, what: str, most: int) -> None:
        self.what, self.most = what, most

    def attempt(self, work: Callable[[int], T], least: int, size: int) -> T:
        """The result of `work(limit)`; `size` is all there is to do, `least` what cannot be divided."""
        while True:
            limit = min(self.most, size)
            try:
                return work(limit)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            torch.cuda.empty_cache()  # only here does nothing refer to the failed attempt's tensors any more
            if limit <= least:
                raise UserError(f"out of memory even with {limit} {self.what}: set train.optimizer=offload")
            self.most = max(least, limit // 2)
            warn(f"out of memory; from now on at most {self.most} {self.what}")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose: what is always there, and what sampling and the update need on top, one after the other."""

    always: dict[str, float]
    sampling: dict[str, float]
    update: dict[str, float]
    rows: int  # responses sampled at a time

    @property
    def peaks(self) -> tuple[float, float]:
        """Peak bytes of (sampling, update)."""
        base = sum(self.always.values())
        return base + sum(self.sampling.values()), base + sum(self.update.values())


def plan_memory(
    config: Config, shape: Qwen2Config, prompt_tokens: int, available: float = math.inf, ranks: int = 1
) -> MemoryPlan:
    """The plan for a model of this shape and prompts of this length, with so many bytes available on each GPU."""
    rollout, train = config.rollout, config.train
    size = {"float32": 4, "bfloat16": 2}[config.model.dtype]  # bytes per number
    layers, vocabulary = shape.num_hidden_layers, shape.vocab_size
    with torch.device("meta"):  # shapes without memory
        model = Qwen2(shape)
    weights, in_layer = (sum(p.numel() for p in part.parameters()) for part in (model, model.layers[0]))
    state = {"split": 6, "offload": 0, "master": 8 if size == 4 else 12}[train.optimizer]
    parts = ranks if train.shard else 1
    stored, state = (4, 8) if parts > 1 else (size, state)  # sharded weights are fp32, their own masters
    always = {"weights": weights * stored / parts, "optimizer": weights * state / parts, "reserve": RESERVE}

    questions = math.ceil(rollout.questions_per_step / ranks)
    responses, longest = questions * rollout.group_size, prompt_tokens + rollout.max_new_tokens
    columns = math.ceil(longest / COLUMN_BLOCK) * COLUMN_BLOCK
    row_cache = 2 * layers * shape.num_key_value_heads * shape.head_dim * columns * size
    row_logits = 2 * 12 * vocabulary  # logits, probabilities, running sum; again in the graphs' pool
    prefill = 1.25 * activations(shape, size, max(PREFILL_TOKENS, prompt_tokens), 0)
    wanted = max(responses, math.ceil(config.data.held_out / ranks))
    copy = weights * size if parts > 1 else 0  # all the weights, to sample with
    room = available - sum(always.values()) - prefill - copy
    rows = max(rollout.group_size, int(min(wanted, room / (row_cache + row_logits))))
    sampling = {"cache": rows * row_cache, "logits or prefill": max(rows * row_logits, prefill), "copy": copy}

    # a micro-batch has each prompt once; its rows, which attention sees, may be twice as long (grpo.fits)
    budget, all_tokens = train.tokens_per_microbatch, questions * prompt_tokens + responses * rollout.max_new_tokens
    tokens, row_tokens = min(max(budget, longest), all_tokens), min(max(2 * budget, longest), responses * longest)
    layer = activations(shape, size, tokens, row_tokens)
    # activations that backward needs, or with checkpointing each layer's input
    kept = layers * (tokens * shape.hidden_size * size if train.activation_checkpointing else layer)
    embedding = 4 * vocabulary * shape.hidden_size  # the gradient of the embedding, which the head may share, fp32
    chunk = CHUNK_TOKENS * 16 * vocabulary
    working = max(embedding + 1.6 * layer, 3 * embedding, chunk)
    if parts > 1:  # FSDP2: embedding and head stay gathered until backward ends, layers two at a time; fp32 gradients
        head, outside = vocabulary * shape.hidden_size, weights - layers * in_layer  # numbers, not bytes
        two_layers = 2 * size * in_layer + max((size + 4) * in_layer, size * in_layer + 1.6 * layer)
        # in backward of a chunk the first log-softmax is not alive
        in_backward = size * (outside + head) + max(two_layers, CHUNK_TOKENS * 12 * vocabulary)
        reduced_last = (size + 4) * outside - kept  # kept activations are free by then
        tied = 4 * size * head + 2 * size * in_layer if shape.tie_word_embeddings else 0
        working = max(in_backward, tied, reduced_last)
    update = {"gradients": 4 * weights / parts, "kept": kept, "one layer, or embedding and head": working}
    return MemoryPlan(always, sampling, update, rows)


def activations(shape: Qwen2Config, size: int, tokens: int, row_tokens: int) -> float:
    """Bytes that one layer keeps for backward: norms, attention's output and SwiGLU per token, q/k/v/output per row."""
    queries, keys = (heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    per_token = 4 * shape.hidden_size + queries + 4 * shape.intermediate_size
    return size * (tokens * per_token + row_tokens * 2 * (queries + keys))


def check_memory(config: Config, shape: Qwen2Config, prompt_tokens: int, device: torch.device) -> int:
    """Plan, and refuse what cannot fit; returns how many rows may be sampled at a time."""
    on_gpu = device.type == "cuda"
    if on_gpu and config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bfloat16: set model.dtype=float32 train.optimizer=master")
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else host_memory()
    plan = plan_memory(config, shape, prompt_tokens, available, world_size())
    (sampling, update), free = (peak / GIB for peak in plan.peaks), available / GIB
    say(f"memory  {sampling:.2f} GiB planned for sampling, {update:.2f} for the update; {free:.2f} are free")
    if max(sampling, update) > free:
        cures = "set train.activation_checkpointing=true, model.dtype=bfloat16 or train.optimizer=offload"
        raise UserError(f"this run needs {max(sampling, update):.1f} GiB, and {free:.1f} GiB are free: {cures}")
    return plan.rows


def host_memory() -> float:
    """Bytes of memory that are available on this machine, or all there are where it does not say."""
    with suppress(OSError):  # not Linux
        return 1024 * int(re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
