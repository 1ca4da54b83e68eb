"""Where the GPU memory of a run will go, before anything large is loaded.

A run that cannot fit should say so in its first second and name the setting to lower, not die in its first update
after minutes of sampling. The plan counts what the code allocates, from shapes alone; tests/test_memory.py holds it
against a count of live bytes. For the rest (cuBLAS workspaces, fragmentation) it keeps RESERVE free.

    python benchmark.py --config config.yml --fits                  # which sizes fit on which cards, and how
    python benchmark.py --config config.yml --shape 3B --plan 48    # the plan of one config on a card of 48 GB

Left out: the host's memory that `offload` takes.
"""

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from data_types import Config, UserError
from grpo import CHUNK_TOKENS
from optimizer import SLICE
from qwen2_model import Qwen2, Qwen2Config
from ranks import count
from rollout import COLUMN_BLOCK, PREFILL_TOKENS, round_up
from terminal import say

GIB = 2**30
RESERVE = 0.75 * GIB


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose: what is always there, and what sampling and the update need on top, one after the other."""

    always: dict[str, float]
    sampling: dict[str, float]
    update: dict[str, float]
    rows: int  # responses sampled at the same time

    @property
    def peaks(self) -> tuple[float, float]:
        """Peak bytes of (sampling, update)."""
        base = sum(self.always.values())
        return base + sum(self.sampling.values()), base + sum(self.update.values())

    def table(self, available: float) -> str:
        """The plan in words, one line per purpose, in GiB."""
        parts = self.always | self.sampling | self.update
        lines = [f"  {name:44s} {size / GIB:8.2f}" for name, size in parts.items()]
        sampling, update = (peak / GIB for peak in self.peaks)
        peaks = f"  peak: {sampling:.2f} while sampling, {update:.2f} in the update, of {available / GIB:.2f}"
        return "\n".join(["memory plan (GiB):", *lines, peaks])


def plan_memory(
    config: Config, shape: Qwen2Config, prompt_tokens: int, available: float = float("inf"), ranks: int = 1
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
    always = {
        "weights": weights * stored / parts,
        f"optimizer state ({train.optimizer})": weights * state / parts,
        "reserve": RESERVE,
    }

    questions = math.ceil(rollout.questions_per_step / ranks)
    responses, longest = questions * rollout.group_size, prompt_tokens + rollout.max_new_tokens
    columns = round_up(longest, COLUMN_BLOCK)
    row_cache = 2 * layers * shape.num_key_value_heads * shape.head_dim * columns * size
    warped = 28 * vocabulary if rollout.top_k or rollout.top_p < 1 else 0  # sorting logits, per token
    row_logits = 2 * (12 * vocabulary + warped)  # logits, probabilities, running sum; again in the graphs' pool
    prefill = max(PREFILL_TOKENS, prompt_tokens) * 1.25 * activations(shape, size)
    wanted = max(responses, math.ceil(config.data.held_out / ranks))
    whole = weights * size if parts > 1 else 0
    room = available - sum(always.values()) - prefill - whole
    rows = max(rollout.group_size, int(min(wanted, rollout.max_rows or wanted, room / (row_cache + row_logits))))
    sampling = {
        f"sampling: KV cache, {rows} rows of {columns} tokens": rows * row_cache,
        "sampling: logits and prefill": max(rows * row_logits, prefill),
        **({"sampling: all the weights": whole} if whole else {}),
    }

    tokens = min(max(train.tokens_per_microbatch, longest), responses * longest)
    layer = tokens * activations(shape, size)
    kept = layers * (tokens * shape.hidden_size * size if train.activation_checkpointing else layer)
    embedding = 4 * vocabulary * shape.hidden_size  # the gradient of the embedding, which the head may share, fp32
    chunk = CHUNK_TOKENS * (16 * vocabulary + warped)
    slices = (12 if train.optimizer == "offload" else 6) * 4 * SLICE
    working = max(embedding + 1.6 * layer, 3 * embedding, chunk, slices - kept)
    if parts > 1:  # FSDP2: embedding and head stay gathered until backward ends, layers two at a time; fp32 gradients
        head, outside = vocabulary * shape.hidden_size, weights - layers * in_layer  # numbers, not bytes
        two_layers = 2 * size * in_layer + (size + 4) * in_layer + 1.6 * layer
        chunk_backward = CHUNK_TOKENS * (12 * vocabulary + warped)  # the first log-softmax is not alive then
        in_backward = size * (outside + head) + max(two_layers, chunk_backward)
        reduced_last = (size + 4) * outside - kept  # kept activations are free by then
        working = max(in_backward, size * outside + chunk, reduced_last, slices - kept)
    update = {
        "update: gradients (fp32)": 4 * weights / parts,
        "update: kept activations": kept,
        "update: one layer, or head and embedding": working,
    }
    return MemoryPlan(always, sampling, update, rows)


def activations(shape: Qwen2Config, size: int) -> float:
    """Bytes per token that one layer keeps for backward: norms, q/k/v, attention, SwiGLU."""
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    return size * (4 * shape.hidden_size + 2 * queries + 2 * keys + 4 * shape.intermediate_size)


def check_memory(config: Config, shape: Qwen2Config, prompt_tokens: int, device: torch.device) -> int:
    """Plan, and refuse what cannot fit; returns how many rows may be sampled at once. Prints the plan for a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu and config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("this GPU has no bfloat16: set model.dtype=float32 train.optimizer=master")
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else host_memory()
    plan = plan_memory(config, shape, prompt_tokens, available, count())
    needed, free = max(plan.peaks) / GIB, available / GIB
    say(plan.table(available) if on_gpu else f"memory  {needed:.2f} GiB planned, {free:.2f} are free")
    if needed > free:
        raise UserError(f"this run needs {needed:.1f} GiB, and {free:.1f} GiB are free: {advice(config, plan)}")
    rollout = config.rollout
    tokens = rollout.questions_per_step * rollout.group_size * rollout.max_new_tokens
    if tokens * 80 > host_memory():  # bytes per response token: random numbers, and lists of ids and logprobs
        raise UserError(f"no memory for {tokens:,} tokens per step: lower rollout.group_size or questions_per_step")
    return plan.rows


def host_memory() -> float:
    """Bytes of memory that are available on this machine, or all there are where it does not say."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # not Linux
        sizes += [1024 * int(size) for size in re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())]
    with suppress(OSError, ValueError):  # no container, or one without a limit
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)


def advice(config: Config, plan: MemoryPlan) -> str:
    """Which setting to change first when a plan does not fit."""
    if plan.peaks[0] >= plan.peaks[1]:
        return "lower rollout.max_new_tokens, or take a smaller model"
    if not config.train.activation_checkpointing:
        return "set train.activation_checkpointing=true"
    return "set model.dtype=bfloat16, train.optimizer=split or offload, or lower train.tokens_per_microbatch"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is about memory: cuBLAS, graphs and the CPU report it in words of their own."""
    words = "out of memory|ALLOC_FAILED|can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))
