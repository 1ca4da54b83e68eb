"""How fast the sampler and the update are, compared with the hardware's limits and with the obvious way to do the same.

    python -m tools.benchmark --config config_tiny.yml                    # the sampler, compared with transformers
    python -m tools.benchmark --config config_tiny.yml --ablate           # and with each idea of rollout.py left out
    python -m tools.benchmark --config config_tiny.yml --update --ablate  # the update, compared with the plain formula
    python -m tools.benchmark --config config.yml --shape 3B --everything --json benchmarks/my_card.json  # a GPU
    python -m tools.benchmark --config config_tiny.yml --peers --grpo-zero ../GRPO-Zero  # a step of TRL and GRPO-Zero
    python -m tools.benchmark --config config.yml --shape 3B --plan 48    # the memory plan for 48 GB; nothing runs
    python -m tools.benchmark --config config.yml --fits                  # which sizes fit on which cards
    python -m tools.benchmark --table benchmarks                          # the cards measured so far

Variants that are compared run interleaved within one process, and each figure is the median over the rounds (three;
with --everything one): on a shared machine only ratios from one run mean anything. With --shape nothing is downloaded:
weights are random, and because random weights never end a response, lengths are forced: log-normal with mean 331, up to
rollout.max_new_tokens. A quarter of the groups then have zero variance.

Bandwidth utilisation is the bytes that a rollout must move (`bytes_to_move`) per second, over the measured bandwidth
of a large copy. FLOP utilisation is the FLOPs that a gradient needs (`useful_flops`: none for padding, recomputation or
inactive rows) per second of update, over the measured rate of a large matmul, and over the data sheet's. Tokens/s of an
update count prompt and response tokens of the active rows, as metrics.jsonl does.
"""

import argparse
import gc
import importlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, fields, replace
from functools import cached_property, lru_cache, partial
from io import StringIO
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

import grpo
import rollout
from data_types import Config, Episode
from grpo import accumulate_gradient, apply_gradient, assign_advantages, assign_token_weights
from optimizer import AdamW
from plumbing.config import load_config
from plumbing.files import read_json, write_text
from plumbing.memory import GIB, Limit, plan_memory
from plumbing.model_folder import find_folder, read_model_config
from plumbing.run import find_device, set_up
from plumbing.tasks import grade, problem_order
from plumbing.terminal import UserError, exit_status, out_of_memory, run_program, say
from qwen2_model import Qwen2, Qwen2Config, wide_matmul
from rollout import Decoder, GraphedSteps, KVCache, Response, Sampler, round_up, tempered
from tokenizer import Tokenizer

Figures = dict[str, Any]  # as they go to the JSON
Run = Callable[[], int]  # does some work and returns the tokens that count

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
TOKENIZER_IDS = 151_665  # that Qwen2.5's tokenizer knows
PROMPT_TOKENS = 160  # of a prompt with --shape, which knows no task: Countdown's in Qwen2.5's chat template, rounded up
# FLOP/s of dense bf16 matmuls, of the SXM card where there are several of the name
DATA_SHEETS = {"A40": 149.7e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}
ZERO_ROWS = 16  # per micro-batch of GRPO-Zero: faster than 32 and 64 on two CPU cores
USABLE = 0.92 * GIB  # of each nominal GB of a card, what is free: an A40 of "48 GB" has 45 GiB, CUDA takes some

# ---- Clocks and limits ---------------------------------------------------------------------------------------------


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes on the device."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of seven runs, after one to warm up."""
    run()
    return statistics.median(timed(run, device) for _ in range(7))


def graph_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of the kernels of `run` on CUDA: replayed from a graph, because launching them may take longer."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_seconds(graph.replay, device)


def attempt(run: Callable[[], Any]) -> Any:
    """The result of `run`, or a line that says why there is none: most often the GPU's memory does not suffice."""
    try:
        return run()
    except RuntimeError as error:
        reason = "out of memory" if out_of_memory(error) else f"failed: {error!s:.200}"
    torch.cuda.empty_cache()  # only here does nothing refer to the failed run's tensors any more
    return reason


def interleaved(variants: dict[str, Run], rounds: int, device: torch.device) -> Figures:
    """Run every variant once per round, after a first round that is not counted, and take medians.

    `times_slower` compares with the variant "ours". Where a rival does not fit, its figures are the reason.
    """
    tokens = {name: run() if name == "ours" else attempt(run) for name, run in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants if not isinstance(tokens[name], str)}
    for name in [*seconds] * rounds:
        seconds[name].append(timed(variants[name], device))
    speeds = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
    return tokens | {
        name: {"tokens_per_second": speed, "seconds": tokens[name] / speed, "times_slower": speeds["ours"] / speed}
        for name, speed in speeds.items()
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy on the device, counting what is read and what is written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    return 2 * source.nbytes / median_seconds(partial(torch.empty_like(source).copy_, source), device)


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of large matmuls on the device: bf16 on CUDA, fp32 elsewhere."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return 10 * 2 * size**3 / median_seconds(lambda: [left @ right for _ in range(10)], device)


# ---- What is measured ----------------------------------------------------------------------------------------------


def shape_config(name: str) -> Qwen2Config:
    """The Qwen2Config of a real size, such as "3B"."""
    hidden, inner, layers, heads, kv_heads, tied, vocabulary = SHAPES[name]
    return Qwen2Config(vocabulary, hidden, inner, layers, heads, kv_heads, hidden // heads, 1e-6, 1e6, tied, 32768)


def random_model(config: Qwen2Config, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """Weights as before pretraining, made on the device."""
    with torch.device("meta"):
        policy = Qwen2(config).to(dtype).to_empty(device=device)
    for name, weight in policy.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.02)
    policy.vocabulary = min(TOKENIZER_IDS, config.vocab_size)
    return policy


class ForcedDecoder(Decoder):
    """Ends each row where its uniform numbers become zero, and nowhere else."""

    def record(self, logits: Tensor) -> None:
        super().record(logits)
        following = self.cache.column + 1 - self.cache.prompt_columns  # on the device: this is captured in a graph
        following.clamp_(max=self.uniforms.shape[1] - 1)
        self.alive[: len(logits)] &= self.uniforms[self.rows[: len(logits)], following] > 0


class Workload:
    """One training step's batch and its policy: real responses, or random weights of a real size and forced lengths."""

    def __init__(self, config: Config, size: str | None) -> None:
        self.config, self.device = config, find_device(config.model.device)
        available = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else math.inf
        generator = torch.Generator().manual_seed(0)
        questions, limit = config.rollout.questions_per_step, config.rollout.max_new_tokens
        self.uniforms = torch.rand(questions * config.rollout.group_size, limit, generator=generator)
        self.tokenizer: Tokenizer | None = None
        if size:
            torch.set_num_threads(config.train.threads or min(os.cpu_count() or 1, 8))
            self.problems: list[Any] = [None] * questions
            self.prompts = [[i % 100] * (140 + i % 8) for i in range(questions)]
            policy = random_model(shape_config(size), self.device, getattr(torch, config.model.dtype))
            normal = torch.randn(len(self.uniforms), 1, generator=generator)
            lengths = (normal * 0.8 + math.log(331) - 0.8**2 / 2).exp().clamp(1, limit)  # (rows, 1), log-normal
            self.uniforms = self.uniforms.clamp(min=1e-6) * (torch.arange(1, limit + 1) <= lengths)
            no_text: Any = SimpleNamespace(end_ids=[])  # stands in for the tokenizer, and for the task
            self.sampler = Sampler(policy, no_text, no_text, limit, Limit("rows at a time", len(self.uniforms)))
        else:
            agent = set_up(config, find_folder(config.model), max_rows=len(self.uniforms))
            order = problem_order(len(agent.training), config.train.seed, 0, questions)  # the run's first step
            self.problems, self.sampler = [agent.training[i] for i in order], agent.sampler
            self.prompts = [self.sampler.encode_prompt(problem) for problem in self.problems]
            self.tokenizer = self.sampler.tokenizer
        self.policy = self.sampler.policy
        self.policy.checkpoint_layers = config.train.activation_checkpointing
        config = replace(config, data=replace(config.data, held_out=1))  # more rows than a step's are not sampled here
        self.plan = plan_memory(config, self.policy.config, max(map(len, self.prompts)), available)
        self.optimizer_seconds: list[float] = []  # of each update

    def sample(self) -> list[Response]:
        """The step's responses, in waves as the plan has them."""
        group, temperature = len(self.uniforms) // len(self.prompts), self.config.rollout.temperature
        responses: list[Response] = []
        with patch.object(rollout, "Decoder", Decoder if self.tokenizer else ForcedDecoder):
            while len(responses) < len(self.uniforms):
                prompts, uniforms = self.prompts[len(responses) // group :], self.uniforms[len(responses) :]
                responses += self.sampler.generate(self.policy, prompts, uniforms, temperature, self.plan.rows)
        return responses

    def count_sampled(self) -> int:
        return sum(len(response.ids) for response in self.sample())

    def assess(self, responses: Sequence[Response]) -> list[Episode]:
        """Episodes with advantages and token weights; random weights are right every second time, in 3 of 4 groups."""
        episodes = []
        for row, response in enumerate(responses):
            truncated, group = response.truncated, row // self.config.rollout.group_size
            problem, prompt = self.problems[group], self.prompts[group]
            text_ids = response.ids if truncated else response.ids[:-1]
            text = self.tokenizer.decode(text_ids) if self.tokenizer else ""
            episode = Episode(problem, prompt, response.ids, response.logprobs, truncated, text)
            right = {"format": 0.1, "correct": float(row % 2 and group % 4 != 3)}
            episode.rewards = grade(self.sampler.task, episode) if self.tokenizer else right
            episodes.append(episode)
        assign_advantages(episodes, self.config)
        assign_token_weights(episodes, self.config)
        return episodes

    def reward(self, problem: Any, text: str, truncated: bool) -> float:
        return sum(grade(self.sampler.task, Episode(problem, [], [], [], truncated, text)).values())

    @cached_property
    def episodes(self) -> list[Episode]:
        return self.assess(self.sample())

    @cached_property
    def active(self) -> list[Episode]:
        """The rows that an update runs."""
        active = [episode for episode in self.episodes if episode.active]
        if not active:
            raise UserError("all groups have zero variance: raise rollout.questions_per_step or rollout.group_size")
        return active

    def make_optimizer(self, mode: str = "") -> AdamW:
        """With a learning rate of zero a step does all its work, and every run finds the same weights."""
        assert self.active  # sampled before the optimizer takes its memory
        self.policy.zero_grad(set_to_none=True)  # left behind by an update that did not fit
        train = self.config.train
        optimizer = AdamW(self.policy.parameters(), replace(train, optimizer=mode or train.optimizer))
        optimizer.learning_rate = 0.0
        return optimizer

    def update(self, optimizer: AdamW, gradient: Callable[..., object] = accumulate_gradient) -> int:
        """Gradient and optimizer step of the batch, as in train.py or with another way to the same gradient."""
        train = self.config.train
        gradient(self.policy, self.episodes, self.config, train.tokens_per_microbatch)
        step = partial(apply_gradient, self.policy, optimizer, train.max_grad_norm)
        self.optimizer_seconds.append(timed(step, self.device))
        return sum(episode.length for episode in self.active)

    def whole_step(self, optimizer: AdamW) -> list[int]:
        """Rollout, rewards and advantages, update; returns the lengths of the responses."""
        episodes = self.assess(self.sample())
        self.update(optimizer)
        return [len(episode.response_ids) for episode in episodes]

    def best_seconds(self, rounds: int) -> tuple[float, float]:
        """The least that a rollout and an update took in so many rounds, the update's after a first that warms up."""
        optimizer = self.make_optimizer()
        self.update(optimizer)
        rollout = min(timed(self.sample, self.device) for _ in range(rounds))
        return rollout, min(timed(partial(self.update, optimizer), self.device) for _ in range(rounds))


def without(run: Run, *stand_ins: tuple[Any, str, Any]) -> Run:
    """`run` with ideas switched off from outside: each (target, name, value) replaces target.name meanwhile."""
    for stand_in in stand_ins:
        run = patch.object(*stand_in)(run)
    return run


# ---- The sampler and its rivals ------------------------------------------------------------------------------------


def attend_repeated(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Instead of KVCache.attend_new: K and V repeated for every query head."""
    rows, columns, repeats = cache.mask.shape[0], cache.mask.shape[-1], q.shape[1] // k.shape[1]
    keys, values = cache.data[layer, :, :rows]
    keys.index_copy_(2, cache.column, k)
    values.index_copy_(2, cache.column, v)
    keys, values = (x[:, :, :columns].repeat_interleave(repeats, dim=1) for x in (keys, values))
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=cache.mask)


def mask_whole(cache: KVCache, rows: int, columns: int, mask_columns: Callable = KVCache.mask_columns) -> None:
    """Instead of KVCache.mask_columns: attention reads every column of the cache, filled or not."""
    mask_columns(cache, rows, len(cache.columns))


def wait_for_all(decoder: Decoder) -> None:
    """Instead of Decoder.compact: rows stay until all have ended."""
    decoder.active *= int(decoder.alive.any())


def sampler_ablations(work: Workload) -> dict[str, Run]:
    """The sampler with one idea less each, and without any."""
    ideas: dict[str, tuple[Any, str, Any]] = {
        "each row prefills its own prompt": (work, "prompts", repeated_prompts(work)),
        "rows stay until all have ended": (Decoder, "compact", wait_for_all),
        "K and V repeated per query head": (KVCache, "attend_new", attend_repeated),
        "attention over the whole cache": (KVCache, "mask_columns", mask_whole),
    }
    ideas |= {"no CUDA graphs": (work.sampler, "graphs", False)} if work.sampler.graphs else {}
    variants = {name: without(work.count_sampled, idea) for name, idea in ideas.items()}
    return variants | {"none of these": without(work.count_sampled, *ideas.values())}


def repeated_prompts(work: Workload) -> list[list[int]]:
    return [prompt for prompt in work.prompts for _ in range(work.config.rollout.group_size)]


def transformers_sampler(work: Workload) -> Run:
    """transformers generate with the same weights, prompts and group: left padding, its own KV cache."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    assert work.tokenizer
    ends, settings, prompts = work.tokenizer.end_ids, work.config.rollout, repeated_prompts(work)
    theirs: Any = AutoModelForCausalLM.from_pretrained(find_folder(work.config.model))
    theirs.to(device=work.device, dtype=work.policy.head.dtype)
    how = {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_k": 0,
        "top_p": 1.0,
    }  # instead of the model's own
    theirs.generation_config = GenerationConfig(**how, eos_token_id=ends, pad_token_id=ends[0])
    limit, width = settings.max_new_tokens, max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=work.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=work.device)

    def run() -> int:
        torch.manual_seed(0)
        out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=limit)[:, width:]
        is_end = torch.isin(out, torch.tensor(ends, device=work.device))
        return int((is_end.cumsum(dim=1) - is_end.long() == 0).sum())  # tokens with no end token before them

    return run


def bytes_to_move(policy: Qwen2, episodes: Sequence[Episode]) -> int:
    """Bytes that decoding these rows must read: the weights once per step, each active row's cache once per step.

    As if all rows were sampled at once. An untied embedding is only looked up, so it does not count.
    """
    config, lengths = policy.config, [len(episode.response_ids) for episode in episodes]
    weights = sum(weight.numel() for weight in policy.layers.parameters()) + policy.head.numel()
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    columns = sum(len(e.prompt_ids) * n + n * (n + 1) // 2 for e, n in zip(episodes, lengths, strict=True))
    return policy.head.element_size() * (weights * max(lengths) + column * columns)


def sampling(work: Workload, options: argparse.Namespace) -> Figures:
    """A rollout in tokens/s and bandwidth, compared with its rivals."""
    variants = {"ours": work.count_sampled}
    if work.tokenizer and not options.parts and not options.no_transformers:
        variants["transformers"] = transformers_sampler(work)
    variants |= sampler_ablations(work) if options.ablate else {}
    figures = interleaved(variants, options.rounds, work.device)
    lengths, bandwidth = [len(episode.response_ids) for episode in work.episodes], copy_bandwidth(work.device)
    moved = bytes_to_move(work.policy, work.episodes) / figures["ours"]["seconds"]
    figures |= {"rows": len(lengths), "mean_length": statistics.mean(lengths), "longest": max(lengths)}
    return figures | {"copy_gb_per_second": bandwidth / 1e9, "bandwidth_utilisation": moved / bandwidth}


# ---- The update and its rivals -------------------------------------------------------------------------------------


def naive_gradient(policy: Qwen2, episodes: Sequence[Episode], config: Config, tokens_at_a_time: int) -> None:
    """The gradient of grpo.accumulate_gradient, computed the obvious way.

    All rows run, in the order sampled, padded to the longest of the batch, with the logits of every position at once.
    It leaves out the statistics (entropy and so on), which is to its advantage.
    """
    policy.zero_grad(set_to_none=True)
    rows = []
    for e in episodes:
        before, weights = [0.0] * len(e.prompt_ids), [e.token_weight] * len(e.response_ids)
        rows.append((e.prompt_ids + e.response_ids, before + e.old_logprobs, before + weights, [e.advantage]))
    columns = [pad_sequence([*map(torch.tensor, column)], batch_first=True) for column in zip(*rows, strict=True)]
    at_once = max(1, tokens_at_a_time // columns[0].shape[1])
    batches = [column.to(policy.head.device).split(at_once) for column in columns]
    for tokens, old_logprobs, token_weight, advantage in zip(*batches, strict=True):  # (B, T), advantage (B, 1)
        targets = tokens[:, 1:].flatten()  # (B * (T-1),)
        logits = policy.logits(policy(tokens)[:, :-1].flatten(0, 1))  # (B * (T-1), V)
        logprobs = tempered(logits, config.rollout.temperature).log_softmax(dim=-1).gather(-1, targets[:, None])
        objective = grpo.objective(logprobs.view(len(tokens), -1), old_logprobs[:, 1:], advantage, [], config.train)
        (-(token_weight[:, 1:] * objective).sum()).backward()


def update_ablations(work: Workload, run: Run) -> dict[str, Run]:
    """The update with one idea of grpo.py less each; the gradient stays the same."""
    # small enough to add nothing, large enough that fp32 has no denormal numbers, which are slow
    all_active = [replace(episode, advantage=episode.advantage or 1e-10) for episode in work.episodes]
    size = work.config.rollout.group_size
    apart = [episode for row in range(size) for episode in work.episodes[row::size]]  # no neighbours share a prompt
    return {
        "inactive rows run too": without(run, (work, "episodes", all_active)),
        "each row with its own prompt": without(run, (work, "episodes", apart)),
        "logits of a micro-batch at once": without(run, (grpo, "CHUNK_TOKENS", 10**9)),
    }


def useful_flops(policy: Qwen2, episodes: Sequence[Episode]) -> float:
    """FLOPs that the gradient of these rows takes however it is computed: forward, and twice as many for backward.

    A matmul takes 2 per weight and token. The embedding is a lookup; the head is needed where a response token is
    predicted. Attention takes two matmuls of each token with those up to itself.
    """
    config, lengths = policy.config, [episode.length for episode in episodes]
    matrices = sum(weight.numel() for weight in policy.layers.parameters() if weight.dim() == 2)
    head = policy.vocabulary * config.hidden_size * sum(len(episode.response_ids) for episode in episodes)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 3.0 * 2 * (matrices * sum(lengths) + head + 2 * heads * pairs)


def update(work: Workload, options: argparse.Namespace) -> Figures:
    """The update compared with its rivals; with --everything instead in every mode of the optimizer."""
    modes = [work.config.train.optimizer]
    if options.parts:  # split is for bf16 weights only
        modes = ["master", *["split"] * (work.config.model.dtype == "bfloat16"), "offload"]
    return {mode: attempt(partial(update_in_mode, work, mode, options)) for mode in modes}


def update_in_mode(work: Workload, mode: str, options: argparse.Namespace) -> Figures:
    run = partial(work.update, work.make_optimizer(mode))
    variants: dict[str, Run] = {"ours": run}
    variants |= {} if options.parts else {"naive": partial(run, naive_gradient)}
    variants |= update_ablations(work, run) if options.ablate else {}
    work.optimizer_seconds.clear()
    figures = interleaved(variants, options.rounds, work.device)
    seconds, rate, active = figures["ours"]["seconds"], matmul_rate(work.device), work.active
    flops = useful_flops(work.policy, active) / seconds  # per second
    figures |= {"rows": len(work.episodes), "active_rows": len(active)}
    # tokens that pass the linear layers, with each prompt once per group, and once per row
    groups = [list(group) for _, group in groupby(active, key=lambda episode: episode.prompt_ids)]
    batches = grpo.micro_batches(groups, work.config.train.tokens_per_microbatch)
    figures |= {"line_tokens": sum(map(grpo.packed_tokens, batches)), "row_tokens": sum(e.length for e in active)}
    figures |= {"optimizer_share": statistics.median(work.optimizer_seconds) / seconds}
    figures |= {"matmul_tflop_per_second": rate / 1e12, "flop_utilisation": flops / rate}
    sheet = [peak for card, peak in DATA_SHEETS.items() if card in device_name(work.device).replace("-", " ").split()]
    return figures | ({"flop_utilisation_of_data_sheet": flops / sheet[0]} if sheet else {})


# ---- The other parts of --everything -------------------------------------------------------------------------------


@torch.inference_mode()
def matmul(work: Workload, options: argparse.Namespace) -> Figures:
    """The head's matmul, bf16 to fp32, of decode steps and of a chunk of logprobs, with and without the padding ids."""
    figures, size = {}, work.policy.config.hidden_size
    head = torch.randn(151_936, size, device=work.device).bfloat16()
    for rows, width in [(rows, width) for rows in (32, 256, grpo.CHUNK_TOKENS) for width in (len(head), TOKENIZER_IDS)]:
        hidden = torch.randn(rows, size, device=work.device).bfloat16()
        seconds = graph_seconds(partial(wide_matmul, hidden, head[:width]), work.device)
        figures[f"{rows} x {width}"] = {"seconds": seconds, "tflop_per_second": 2e-12 * rows * width * size / seconds}
    return figures


@torch.inference_mode()
def by_batch(measure: Callable[[Workload, int, int], Figures], work: Workload) -> Figures:
    """measure(work, rows, columns) for a few batches, up to the whole one at the length limit."""
    longest = round_up(max(map(len, work.prompts)) + work.config.rollout.max_new_tokens, rollout.COLUMN_BLOCK)
    sizes = [(rows, columns) for rows in sorted({32, 128, len(work.uniforms)}) for columns in sorted({256, longest})]
    return {f"{rows} x {columns}": attempt(partial(measure, work, rows, columns)) for rows, columns in sizes}


def attention(work: Workload, options: argparse.Namespace) -> Figures:
    """Attention of one decode step in all layers, rows x columns, by backend; flash attention takes no mask."""
    return by_batch(attention_step, work)


def attention_step(work: Workload, rows: int, columns: int) -> Figures:
    config, cache = work.policy.config, KVCache(work.policy, [columns - 1], rows, 1)
    cache.mask_columns(rows, columns)
    q = cache.data.new_ones(rows, config.num_attention_heads, 1, config.head_dim)
    k = cache.data.new_ones(rows, config.num_key_value_heads, 1, config.head_dim)
    figures: Figures = {"cache_bytes": cache.data.nbytes}
    run = partial(graph_seconds, lambda: [cache.attend_new(i, q, k, k) for i in range(len(cache.data))], work.device)
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            figures[f"{backend.name.lower()}_seconds"] = attempt(run)
    return figures


def decode(work: Workload, options: argparse.Namespace) -> Figures:
    """A decode step, rows x columns, launched from Python and (on CUDA) from a graph, and what capturing it costs."""
    return by_batch(decode_step, work)


def decode_step(work: Workload, rows: int, columns: int) -> Figures:
    cache = KVCache(work.policy, [columns - 32], rows, 32)  # room for 32 steps
    uniforms = torch.rand(rows, 32, device=work.device)
    decoder = Decoder(work.policy, cache, uniforms, [], work.config.rollout.temperature)
    figures = {"launched_seconds": median_seconds(partial(decoder.step, rows, columns), work.device)}
    if work.sampler.graphs:
        step = partial(GraphedSteps(decoder).step, rows, columns)
        step()  # launched as usual; the next is captured and replayed
        figures["capture_seconds"] = timed(step, work.device)
        figures["replay_seconds"] = median_seconds(step, work.device)
    return figures


def memory(work: Workload, options: argparse.Namespace) -> Figures:
    """Peak GiB of sampling and of the update on CUDA, compared with the plan."""
    phases: dict[str, Run] = {"sampling": work.count_sampled, "update": partial(work.update, work.make_optimizer())}
    figures: Figures = {}
    for (name, run), planned in zip(phases.items(), work.plan.peaks, strict=True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        figures[name] = {f"{kind}_gib": size / GIB for kind, size in {**peaks, "planned": planned}.items()}
    return figures | {"peak_reserved_gib": max(phase["reserved_gib"] for phase in figures.values())}


def step(work: Workload, options: argparse.Namespace) -> Figures:
    """A whole training step, the second of two."""
    optimizer = work.make_optimizer()
    seconds = [timed(partial(work.whole_step, optimizer), work.device) for _ in range(2)]
    return {"step_seconds": seconds[1]}


def peers(work: Workload, options: argparse.Namespace) -> Figures:
    """A whole step compared with those of TRL's GRPOTrainer and GRPO-Zero, interleaved.

    All have the same weights, prompts, group size, length limit and reward.
    """
    from transformers import TrainerCallback

    if not work.tokenizer or work.config.rollout.temperature != 1:
        raise UserError("--peers needs a model with a tokenizer, and rollout.temperature 1")
    decode, ends = work.tokenizer.decode, work.tokenizer.end_ids
    lengths = {"trl": [0] * 0}
    runs: dict[str, Callable[[], list[int]]] = {"ours": partial(work.whole_step, work.make_optimizer())}
    if options.grpo_zero:
        runs["grpo_zero"] = grpo_zero_step(options.grpo_zero, work)
    seconds: dict[str, list[float]] = {name: [] for name in ("trl", *runs)}

    def keep_lengths(name: str, run: Callable[[], list[int]]) -> None:
        lengths[name] = run()

    def reward(completion_ids: list[list[int]], question: list[int], **others: object) -> list[float]:
        rewards = []
        for ids, number in zip(completion_ids, question, strict=True):
            cut = ids[-1] not in ends
            rewards.append(work.reward(work.problems[number], decode(ids if cut else ids[:-1]), cut))
        lengths["trl"] += map(len, completion_ids)
        return rewards

    class Interleave(TrainerCallback):
        def on_step_begin(self, *others: object, **more: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *others: object, **more: object) -> None:
            seconds["trl"].append(time.perf_counter() - self.began)
            del lengths["trl"][: -len(work.uniforms)]  # of the last step, as with the others
            gc.collect()
            gc.freeze()  # GRPO-Zero collects garbage in each step: not that of the others
            for name, run in runs.items():
                seconds[name].append(timed(partial(keep_lengths, name, run), work.device))

    train_with_trl(work, options.rounds + 1, reward, Interleave())
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
    slower = {name: value / medians["ours"] for name, value in medians.items() if name != "ours"}
    spread = {name: {"mean": statistics.mean(counts), "longest": max(counts)} for name, counts in lengths.items()}
    active = {"rows": len(work.uniforms), "active_rows": len(work.active)}
    return {"seconds": medians, "times_slower": slower, "response_tokens": spread, **active}


def train_with_trl(work: Workload, steps: int, reward: Callable[..., list[float]], callback: Any) -> None:
    """Steps of TRL's GRPOTrainer on the questions of `work`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    assert work.tokenizer
    settings, rows = work.config.rollout, len(work.uniforms)
    at_once = math.gcd(rows, 32)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=at_once, gradient_accumulation_steps=rows // at_once, learning_rate=0.0,
            num_generations=settings.group_size, max_completion_length=settings.max_new_tokens, beta=0.0, bf16=False,
            max_steps=steps, use_cpu=work.device.type == "cpu", report_to="none", save_strategy="no",
            loss_type="dr_grpo", shuffle_dataset=False, temperature=settings.temperature, logging_strategy="no",
            gradient_checkpointing=False,
        )  # fmt: skip
        questions = [{"prompt": work.tokenizer.decode(ids), "question": i} for i, ids in enumerate(work.prompts)]
        model = str(find_folder(work.config.model))
        GRPOTrainer(model, reward, config, Dataset.from_list(questions), callbacks=[callback]).train()


def grpo_zero_step(folder: Path, work: Workload) -> Callable[[], list[int]]:
    """A step of GRPO-Zero, whose files are in `folder`; it returns the lengths of its responses."""
    if not (folder / "grpo.py").is_file():
        raise UserError(f"{folder}: not a clone of GRPO-Zero, there is no grpo.py")
    names = ("grpo", "qwen2_model", "data_types", "tokenizer")  # modules of ours have these names, too
    with patch.dict(sys.modules), patch.object(sys, "path", [str(folder), *sys.path]):
        for name in names:
            del sys.modules[name]
        theirs, models, data_types = map(importlib.import_module, names[:3])
    assert work.tokenizer
    decode, ends, limits = work.tokenizer.decode, work.tokenizer.end_ids, work.config.rollout
    pad, end = ends[0], ends[-1]  # of Qwen2.5: <|endoftext|> and <|im_end|>
    device, dtype = work.device, work.policy.head.dtype
    known = {field.name for field in fields(models.Qwen2Config)}
    shape = {name: value for name, value in asdict(work.policy.config).items() if name in known}
    model = models.Transformer(models.Qwen2Config(**shape), device).to(device, dtype)
    model.load_state_dict(work.policy.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    tokenizer = SimpleNamespace(eos_token=decode([end]), eos_token_id=end, pad_token_id=pad, detokenize=decode)
    texts, problems = [decode(prompt) for prompt in work.prompts], work.problems  # numbers: all that `reward` needs
    prompts = {"prefix": texts, "prefix_tokens": texts, "prefix_token_ids": work.prompts}
    batch = data_types.MiniBatch(**prompts, numbers=problems, target=problems)

    def reward(response: str, numbers: Any, target: object, end_token: str) -> Figures:
        truncated = not response.endswith(end_token)
        return {"reward": work.reward(numbers, response.removesuffix(end_token), truncated), "reward_info": {}}

    def step() -> list[int]:
        limit, group, norm = limits.max_new_tokens, limits.group_size, work.config.train.max_grad_norm
        with redirect_stdout(StringIO()):
            episodes = theirs.rollout(model, batch, tokenizer, limit, group, reward, device, dtype)
            theirs.update_policy(model, optimizer, episodes, ZERO_ROWS, pad, norm, device, dtype)
        return [len(episode.generated_token_ids) for episode in episodes]

    return step


PARTS: list[Callable[..., Figures]] = [matmul, attention, decode, sampling, update, memory, step]
NAMES = [part.__name__ for part in PARTS]
NEED_CUDA = (matmul, attention, memory)

# ---- The command line ----------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def measure(config: Config, options: argparse.Namespace) -> None:
    """Run the parts that are asked for; print each, and write it to the JSON before the next begins.

    Other parts that the JSON has of the same device and config stay, so parts can be measured one by one.
    """
    work = Workload(config, options.shape)
    about: Figures = {"device": device_name(work.device), "torch": torch.__version__}
    about["model"] = options.shape or config.model.path
    about["config"] = {"dtype": config.model.dtype, **asdict(config.rollout), **asdict(config.train)}
    before = read_json(options.json) if options.json and options.json.exists() else {}
    parts = before["parts"] if about.items() <= before.items() else {}
    say(f"{about['device']}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    chosen = options.parts or ("update" if options.update else "sampling")
    for part in PARTS if chosen == "all" else [part for part in [*PARTS, peers] if chosen == part.__name__]:
        possible = work.device.type == "cuda" or part not in NEED_CUDA
        figures = rounded(attempt(partial(part, work, options)) if possible else {"left out": "needs CUDA"})
        parts |= {part.__name__: figures}
        say(yaml.safe_dump({part.__name__: figures}, sort_keys=False, default_flow_style=None, width=120))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.json, json.dumps(about | {"parts": parts}, indent=2) + "\n")


def rounded(figures: Any) -> Any:
    """The same, as JSON has it, to four digits."""
    return json.loads(json.dumps(figures), parse_float=lambda digits: float(f"{float(digits):.4g}"))


def card_table(folder: Path) -> str:
    """A markdown table with one row per JSON of the folder; a dash where a part was not measured."""
    columns = {
        "rollout tok/s": ("sampling ours tokens_per_second", ",.0f"),
        "bandwidth utilisation": ("sampling bandwidth_utilisation", ".0%"),
        "update tok/s": ("update {optimizer} ours tokens_per_second", ",.0f"),
        "FLOP utilisation": ("update {optimizer} flop_utilisation", ".0%"),
        "peak GiB": ("memory peak_reserved_gib", ".1f"),
        "step seconds": ("step step_seconds", ".1f"),
    }
    rows = []
    for report in map(read_json, sorted(folder.glob("*.json"))):
        rows.append([report["device"], report["model"]])
        for keys, pattern in columns.values():
            value: Any = report["parts"]
            for key in keys.format_map(report["config"]).split():
                value = value.get(key) if isinstance(value, dict) else None
            rows[-1].append("-" if value is None else format(value, pattern))
    return markdown(["device", "model", *columns], rows or [["not measured yet", *"-------"]])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def fits_table(base: Config, ranks: int, cards: Sequence[int] = (12, 24, 48, 80)) -> str:
    """A markdown table of sizes and cards (GB), with the fastest settings whose plan fits; sharded on several cards."""
    with patch("plumbing.memory.Qwen2", lru_cache(Qwen2)):  # to count its weights, a size is built once
        rows = [[size, *(fastest_that_fits(base, size, card, ranks) for card in cards)] for size in SHAPES]
    return markdown(["", *(f"{card} GB" for card in cards)], rows)


def fastest_that_fits(base: Config, size: str, card: int, ranks: int) -> str:
    modes = [("master", 16384), ("split", 16384), ("split", 8192), ("offload", 8192), ("offload", 2048)]
    for mode, tokens in modes if ranks == 1 else [("master", tokens) for tokens in (16384, 8192, 2048)]:
        train = replace(base.train, optimizer=mode, tokens_per_microbatch=tokens, shard=ranks > 1)
        config = replace(base, train=train)
        plan = plan_memory(config, shape_config(size), PROMPT_TOKENS, card * USABLE, ranks)
        if max(plan.peaks) <= card * USABLE and plan.rows >= base.rollout.group_size:
            waves = math.ceil(base.rollout.questions_per_step * base.rollout.group_size / ranks / plan.rows)
            return f"{mode}, {tokens} tokens, waves: {waves}, {max(plan.peaks) / GIB:.1f} GiB"
    return "does not fit"


def plan_table(config: Config, size: str | None, available: float) -> str:
    """The plan in words, one line per purpose, in GiB."""
    shape = shape_config(size) if size else read_model_config(find_folder(config.model))
    plan = plan_memory(config, shape, PROMPT_TOKENS, available)
    parts, (sampling, update) = plan.always | plan.sampling | plan.update, (peak / GIB for peak in plan.peaks)
    lines = [f"  {name:44s} {size / GIB:8.2f}" for name, size in parts.items()]
    peaks = f"  peak: {sampling:.2f} while sampling, {update:.2f} in the update, of {available / GIB:.2f}"
    verdict = "fits" if max(plan.peaks) <= available else "does not fit"
    return "\n".join(["memory plan (GiB):", *lines, peaks, verdict])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools.benchmark", description="Measure the sampler and the update.")
    # options.parts: "all" or a name with --everything or --part, which leave the rivals out; otherwise None
    parser.add_argument("--config", default="config_tiny.yml", help="a YAML file; default: config_tiny.yml")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this size, forced response lengths")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--update", action="store_true", help="measure the update instead of the sampler")
    what.add_argument("--everything", dest="parts", action="store_const", const="all", help="measure all parts")
    what.add_argument("--part", dest="parts", choices=NAMES, help="measure only this part of --everything")
    what.add_argument(
        "--peers", dest="parts", action="store_const", const="peers", help="a step compared with TRL's and GRPO-Zero's"
    )
    what.add_argument("--plan", type=float, metavar="GB", help="print the memory plan for a card of this size")
    what.add_argument("--fits", action="store_true", help="print which sizes fit on which cards")
    what.add_argument("--table", type=Path, metavar="FOLDER", help="print a table of the JSON files in a folder")
    parser.add_argument("--grpo-zero", type=Path, metavar="CLONE", help="for --peers: a clone of its repository")
    parser.add_argument("--ranks", type=int, default=1, help="with --fits: on so many cards together")
    parser.add_argument("--ablate", action="store_true", help="leave each idea out, one at a time")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--rounds", type=int, help="runs per variant; default: 3, with --everything 1")
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each part")
    parser.add_argument("overrides", nargs="*", help="settings such as rollout.group_size=32 model.path=runs/x/final")
    options = parser.parse_intermixed_args(argv)
    if options.grpo_zero and options.parts != "peers":
        parser.error("--grpo-zero goes with --peers")
    options.rounds = options.rounds or (1 if options.parts not in (None, "peers") else 3)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)

    def work() -> None:
        config = load_config(options.config, options.overrides)
        if options.table:
            say(card_table(options.table))
        elif options.fits:
            say(fits_table(config, options.ranks))
        elif options.plan:
            say(plan_table(config, options.shape, options.plan * USABLE))
        else:
            measure(config, options)

    return exit_status("tools.benchmark", work)


if __name__ == "__main__":
    run_program(main)
