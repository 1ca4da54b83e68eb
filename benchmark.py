"""How fast the sampler and the update are, beside what the hardware allows and beside the obvious way to do the same.

    python benchmark.py --config config_tiny.yml                    # the sampler: model of the config, real answers
    python benchmark.py --config config_tiny.yml --ablate           # each idea of rollout.py switched off in turn
    python benchmark.py --config config_tiny.yml --grow             # other group sizes and lengths
    python benchmark.py --config config_tiny.yml --update           # the update: gradient and optimizer step of a batch
    python benchmark.py --config config_tiny.yml --update --ablate  # each idea of grpo.py switched off in turn
    python benchmark.py --config config_tiny.yml --update-memory    # host memory of the logprobs, chunked and not
    python benchmark.py --config config.yml --shape 3B --json benchmarks/3b.json    # random weights, no download
    python benchmark.py --config config.yml --shape 3B --update     # likewise; on CUDA the peak memory beside the plan
    python benchmark.py --config config.yml --shape 3B --plan 48    # the memory plan for a card of 48 GB, nothing run
    python benchmark.py --config config.yml --fits                  # which sizes fit on 24, 48 and 80 GB

Everything compared runs in turns within one process, and the figure is the median over the rounds: on a shared machine
only ratios from one run mean anything. What the sampler is compared with is `transformers` (requirements-dev.txt),
which generates from the same weights, prompts and lengths; what the update is compared with is `naive_gradient` below,
which leaves the same gradient.

With --shape the answers have forced lengths, log-normal with mean 331 and cut at 1,024 as in real runs, because random
weights never end an answer, and a quarter of the groups have no spread.

Model bandwidth utilisation is the bytes a rollout must move (the weights once a step, each living row's keys and
values once a step) over its time, over the measured bandwidth of a large device copy. Model FLOP utilisation is the
FLOPs that an update needs (`useful_flops`: nothing for padding, for what is recomputed, for skipped rows) over its
time, the optimizer step included, over the measured rate of a large matrix product, and over the data sheet's.

Update tokens/s count the prompt and response tokens of all rows of the batch, those included that are skipped because
they teach nothing, and never padding: batches per second, in tokens. The figure for the rows really run stands beside.
"""

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import rollout
from countdown_task import ASSISTANT_PREFIX, grade, question_text
from data_types import Config, Episode, Problem, TrainSettings, UserError, load_config
from grpo import accumulate_gradient, apply_gradient, assign_advantages, assign_token_weights, response_logprobs
from memory import GIB, RESERVE, SHAPES, advice, plan_memory, shape_config
from model_folder import find_folder, read_model_config
from optimizer import AdamW
from qwen2_model import Qwen2, Qwen2Config, head_logits
from rollout import Answer, Decoder, KVCache, Sampling, generate, warp
from train import Run, find_device, set_up

# ---- What both measurements use ----------------------------------------------------------------------------


def random_model(config: Qwen2Config, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """Weights as at the start of a training, made on the device."""
    with torch.device("meta"):
        model = Qwen2(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0.0, 0.02, generator=generator)
    return model


@contextmanager
def replaced(module: object, name: str, stand_in: object) -> Iterator[None]:
    """While active, `module.name` is `stand_in`: how an idea of the sampler is switched off from outside."""
    original = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, original)


def take_turns(variants: dict[str, Callable[[], int]], rounds: int,
               device: torch.device) -> dict[str, dict[str, float]]:
    """Run every variant once a round; median seconds, tokens and tokens/s of each. A first round is not counted."""
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            synchronize(device)
            began = time.perf_counter()
            tokens = run()
            synchronize(device)
            if number:
                results[name].append((time.perf_counter() - began, tokens))
    return {
        name: {
            "tokens": statistics.median(tokens for _, tokens in runs),
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "tokens_per_second": statistics.median(tokens / seconds for seconds, tokens in runs),
        }
        for name, runs in results.items()
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy on the device, counting what is read and what is written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * source.numel() * 4 / statistics.median(seconds[1:])


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of large matrix products on the device, bf16 on CUDA and fp32 elsewhere: the best of some rounds."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = torch.randn(2, size, size, dtype=dtype, device=device)
    product = torch.empty_like(left)
    seconds = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(left, right, out=product)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 10 * 2 * size**3 / min(seconds)


def table(results: dict[str, dict[str, float]]) -> None:
    """Print variants with their tokens/s and the ratio of the first to each."""
    first = next(iter(results.values()))["tokens_per_second"]
    for name, row in results.items():
        print(f"  {name:34s} {row['tokens_per_second']:>10,.0f} tok/s  {row['seconds']:>8.2f} s  "
              f"first / this {first / row['tokens_per_second']:.2f}")


def print_figures(figures: dict[str, object]) -> None:
    """Print the plain numbers among the figures, one a line."""
    for key, value in figures.items():
        if isinstance(value, (int, float)):
            print(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value:,.3f}")


# ---- The rollout -------------------------------------------------------------------------------------------


class Work:
    """What one benchmark samples: a model, prompts, a group size, and lengths, forced or the model's own."""

    def __init__(self, model: Qwen2, prompts: Sequence[Sequence[int]], group: int, max_new: int, end_ids: Sequence[int],
                 vocabulary: int, lengths: Tensor | None = None) -> None:
        self.model, self.prompts, self.group, self.max_new = model, prompts, group, max_new
        self.end_ids, self.vocabulary, self.lengths = list(end_ids), vocabulary, lengths
        self.uniforms = torch.rand(len(prompts) * group, max_new, generator=torch.Generator().manual_seed(0))

    def sample(self, **switches: bool) -> int:
        """Our sampler; the number of tokens that belong to answers."""
        with forced_lengths(self.lengths):
            answers = generate(self.model, self.prompts, self.uniforms, self.end_ids, self.vocabulary, Sampling(),
                               **switches)
        return count_tokens(answers)

    def sample_without_sharing(self, **switches: bool) -> int:
        """Every row prefills a prompt of its own."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.group)]
        with forced_lengths(self.lengths):
            return count_tokens(generate(self.model, prompts, self.uniforms, self.end_ids, self.vocabulary, Sampling(),
                                         **switches))


def count_tokens(answers: Sequence[Answer]) -> int:
    return sum(len(answer.ids) for answer in answers)


@contextmanager
def forced_lengths(lengths: Tensor | None) -> Iterator[None]:
    """While active, answers end at these lengths (rows,) and nowhere else."""

    class ForcedDecoder(Decoder):
        def record(self, logits: Tensor) -> None:
            super().record(logits)
            rows = self.rows[: len(logits)]
            self.alive[: len(logits)] &= self.lengths[rows] < lengths.to(rows.device)[rows]

    if lengths is None:
        yield
        return
    with replaced(rollout, "Decoder", ForcedDecoder):
        yield


class RepeatingCache(KVCache):
    """Without idea 3: K and V repeated for every query head."""

    def attend_new(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = self.mask.shape[0], self.mask.shape[-1]
        keys, values = self.data[layer, :, :rows]
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        times = q.shape[1] // k.shape[1]
        keys = keys[:, :, :columns].repeat_interleave(times, dim=1)
        values = values[:, :, :columns].repeat_interleave(times, dim=1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)


class WholeCache(KVCache):
    """Without bounds: attention reads every column of the cache, filled or not."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.data.zero_()

    def look_at(self, rows: int, columns: int) -> None:
        super().look_at(rows, len(self.columns))


class PlainCache(RepeatingCache, WholeCache):
    """Without either."""


def ablations(work: Work) -> dict[str, Callable[[], int]]:
    """The sampler as it is, with one idea less each, and without any."""

    def with_cache(kind: type[KVCache], sample: Callable[[], int]) -> Callable[[], int]:
        def run() -> int:
            with replaced(rollout, "KVCache", kind):
                return sample()
        return run

    def plain() -> int:
        return work.sample_without_sharing(compact=False, graphs=False)

    variants = {
        "all ideas": work.sample,
        "each row prefills its prompt": work.sample_without_sharing,
        "rows stay until all have ended": lambda: work.sample(compact=False),
        "K and V repeated per query head": with_cache(RepeatingCache, work.sample),
        "attention over the whole cache": with_cache(WholeCache, work.sample),
        "none of these": with_cache(PlainCache, plain),
    }
    if work.model.embed.weight.is_cuda:
        variants["no CUDA graphs"] = lambda: work.sample(graphs=False)
    return variants


def transformers_sampler(work: Work) -> Callable[[], int]:
    """`transformers` generate on the same weights, prompts and lengths: left padding, its own KV cache, sampling."""
    import transformers

    transformers.logging.set_verbosity_error()
    device, dtype, config = work.model.embed.weight.device, work.model.embed.weight.dtype, work.model.config
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )).to(device=device, dtype=dtype).eval()
    theirs.load_state_dict(work.model.hf_tensors(), strict=False)
    longest = max(map(len, work.prompts))
    rows = [prompt for prompt in work.prompts for _ in range(work.group)]
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    forced = work.lengths
    new_tokens = work.max_new if forced is None else int(forced.max())
    ends = work.end_ids if forced is None else None

    def run() -> int:
        out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, temperature=1.0,
                              top_k=0, top_p=1.0, eos_token_id=ends, pad_token_id=0)[:, longest:]
        if forced is not None:
            return int(forced.sum())
        is_end = torch.isin(out, torch.tensor(ends, device=device))
        first = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, out.shape[1])
        return int(first.sum())

    return run


def bytes_that_must_move(work: Work, lengths: Sequence[int]) -> int:
    """Of a rollout with these answer lengths: weights once a step, each living row's cache once a step."""
    weights = sum(p.numel() * p.element_size() for p in work.model.parameters())
    per_column = rollout.cache_bytes_per_row(work.model, 1)
    total = weights * max(lengths)
    for row, length in enumerate(lengths):
        prompt = len(work.prompts[row // work.group])
        total += per_column * (prompt * length + length * (length + 1) // 2)
    return total


def answer_lengths(rows: int, mean: float, longest: int) -> Tensor:
    """Log-normal lengths (rows,) with this mean before the cut at `longest`."""
    sigma = 0.8
    normal = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    return (normal * sigma + math.log(mean) - sigma**2 / 2).exp().round().clamp(1, longest).long()


def make_work(config: Config, shape: str | None) -> Work:
    """The config's own model and questions, or random weights of a real size with forced lengths."""
    group, questions, max_new = (config.rollout.group_size, config.rollout.questions_per_step,
                                 config.rollout.max_new_tokens)
    if shape is None:
        run = set_up(config)
        prompts = [run.tokenizer.encode_prompt(question_text(p), ASSISTANT_PREFIX) for p in run.training[:questions]]
        return Work(run.policy, prompts, group, max_new, run.tokenizer.end_ids, len(run.tokenizer))
    device = find_device(config)
    model = random_model(shape_config(shape), device, getattr(torch, config.model.dtype))
    prompts = [[1000 + i] * (140 + i % 8) for i in range(questions)]
    lengths = answer_lengths(questions * group, 331, max_new)
    return Work(model, prompts, group, max_new, [], 151665, lengths)


def measure_rollout(work: Work, arguments: argparse.Namespace) -> dict[str, object]:
    """Decode tokens/s and bandwidth, prefill tokens/s, and the same work by transformers, in turns."""
    device = work.model.embed.weight.device
    variants: dict[str, Callable[[], int]] = {"ours": work.sample}
    if not arguments.no_transformers:
        variants["transformers"] = transformers_sampler(work)
    if arguments.ablate:
        variants |= {name: run for name, run in ablations(work).items() if name != "all ideas"}
    results: dict[str, object] = take_turns(variants, arguments.rounds, device)
    with forced_lengths(work.lengths):
        answers = generate(work.model, work.prompts, work.uniforms, work.end_ids, work.vocabulary, Sampling())
    lengths = [len(answer.ids) for answer in answers]
    bandwidth = copy_bandwidth(device)
    moved = bytes_that_must_move(work, lengths) / results["ours"]["seconds"]

    one_token = Work(work.model, work.prompts, 1, 1, work.end_ids, work.vocabulary)
    prefill = take_turns({"prefill": one_token.sample}, arguments.rounds, device)["prefill"]["seconds"]
    return {
        "variants": results,
        "mean_answer": statistics.mean(lengths),
        "longest_answer": max(lengths),
        "copy_bandwidth_gb_per_second": bandwidth / 1e9,
        "bandwidth_utilisation": moved / bandwidth,
        "prefill_tokens_per_second": sum(map(len, work.prompts)) / prefill,
    }


def measure_growth(work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens/s for group sizes 4 to 64 and answers of 64 to 1,024 tokens, no answer ending early."""
    device = work.model.embed.weight.device
    variants = {}
    sizes = [(group, 128) for group in (4, 8, 16, 32, 64)] + [(16, max_new) for max_new in (64, 256, 512, 1024)]
    for group, max_new in sizes:
        grown = Work(work.model, work.prompts, group, max_new, [], work.vocabulary)
        variants[f"group {group}, {max_new} tokens"] = grown.sample
    return take_turns(variants, rounds, device)


# ---- The update --------------------------------------------------------------------------------------------


class Update:
    """What one benchmark of the update runs: a policy, its optimizer, and a batch of rewarded answers.

    The learning rate is zero: the step does all its work, but every turn finds the same weights.
    """

    def __init__(self, policy: Qwen2, optimizer: torch.optim.Optimizer, episodes: Sequence[Episode], vocabulary: int,
                 sampling: Sampling, settings: TrainSettings) -> None:
        self.policy, self.optimizer, self.vocabulary = policy, optimizer, vocabulary
        self.episodes, self.sampling, self.settings = list(episodes), sampling, settings
        self.telling = [e for e in self.episodes if e.advantage * e.token_weight != 0.0]  # the rows that are run
        self.tokens = sum(map(row_length, self.episodes))
        self.device = policy.embed.weight.device
        self.step_seconds: list[float] = []  # of every variant: the step is the same in all
        optimizer.param_groups[0]["lr"] = 0.0

    def ours(self, episodes: Sequence[Episode] | None = None) -> int:
        """The update as train.py does it; the number of tokens in the batch."""
        accumulate_gradient(self.policy, episodes or self.episodes, self.vocabulary, self.sampling, self.settings,
                            self.settings.tokens_per_microbatch)
        return self.step()

    def naive(self) -> int:
        """The same with the gradient worked out the obvious way."""
        naive_gradient(self.policy, self.episodes, self.vocabulary, self.sampling, self.settings)
        return self.step()

    def step(self) -> int:
        """Norm of the gradient, optimizer step."""
        synchronize(self.device)
        began = time.perf_counter()
        apply_gradient(self.policy, self.optimizer, self.settings.max_grad_norm)
        synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - began)
        return self.tokens


def make_update(config: Config, shape: str | None) -> Update:
    """A batch of the config's size: real answers of its model, or random ones on random weights of a real size."""
    sampling = Sampling(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)
    if shape is None:
        run = set_up(config)
        policy, optimizer, vocabulary = run.policy, run.optimizer, len(run.tokenizer)
        episodes = sampled_episodes(run, sampling)
    else:
        work = make_work(config, shape)
        policy, vocabulary = work.model, work.vocabulary
        policy.checkpoint_layers = config.train.activation_checkpointing
        optimizer = AdamW(policy.parameters(), config.train)
        episodes = invented_episodes(work)
    assign_token_weights(episodes, config.train, config.rollout.max_new_tokens)
    update = Update(policy, optimizer, episodes, vocabulary, sampling, config.train)
    if not update.telling:
        raise UserError("no answer of this batch did better than its group, so there is no update to measure: raise "
                        "rollout.questions_per_step or rollout.group_size")
    return update


def sampled_episodes(run: Run, sampling: Sampling) -> list[Episode]:
    """Answers of the policy to the first training problems, rewarded and compared within their groups."""
    settings, tokenizer = run.config.rollout, run.tokenizer
    problems = run.training[: settings.questions_per_step]
    prompts = [tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX) for problem in problems]
    uniforms = torch.rand(len(problems) * settings.group_size, settings.max_new_tokens,
                          generator=torch.Generator().manual_seed(run.config.train.seed))
    answers = generate(run.policy, prompts, uniforms, tokenizer.end_ids, len(tokenizer), sampling, run.cache_bytes)
    episodes = [
        Episode(problems[a.question], a.question, prompts[a.question], a.ids, a.logprobs, a.ended,
                tokenizer.decode(a.ids[:-1] if a.ended else a.ids))
        for a in answers
    ]
    for episode in episodes:
        episode.reward = grade(episode.text, episode.ended, episode.problem)
    assign_advantages(episodes, run.config.train, settings.max_new_tokens)
    return episodes


def invented_episodes(work: Work) -> list[Episode]:
    """Random answers of the forced lengths with random advantages; every fourth group has no spread."""
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for row, length in enumerate(work.lengths.tolist()):
        group = row // work.group
        ids = torch.randint(work.vocabulary, (length,), generator=generator).tolist()
        advantage = 0.0 if group % 4 == 3 else torch.randn((), generator=generator).item()
        logprobs = [-math.log(work.vocabulary)] * length  # about what random weights give
        episodes.append(Episode(Problem((1, 1), 2), group, list(work.prompts[group]), ids, logprobs,
                                ended=length < work.max_new, text="", advantage=advantage))
    return episodes


def naive_gradient(policy: Qwen2, episodes: Sequence[Episode], vocabulary: int, sampling: Sampling,
                   settings: TrainSettings) -> None:
    """The gradient of accumulate_gradient, worked out the obvious way.

    Rows in the order sampled, a fixed number of them at a time, all padded to the longest of the batch and all run;
    logits of every position at once, log_softmax, gather, mask, mean. It skips what accumulate_gradient
    reports beside the gradient, the entropy for one, which is to its advantage.
    """
    policy.zero_grad(set_to_none=True)
    longest = max(map(row_length, episodes))
    rows = max(1, settings.tokens_per_microbatch // longest)
    for first in range(0, len(episodes), rows):
        batch = episodes[first : first + rows]
        tokens, sampled, weight = (tensor.to(policy.embed.weight.device) for tensor in as_rows(batch, longest))
        logprobs = naive_logprobs(policy, tokens, vocabulary, sampling)  # (B, T-1)
        advantage = torch.tensor([[e.advantage] for e in batch], dtype=torch.float32, device=tokens.device)
        loss = -(weight[:, 1:] * grpo.objective(logprobs, sampled[:, 1:], advantage, settings)).sum()
        loss.backward()


def as_rows(episodes: Sequence[Episode], columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the sampler's logprobs and token weights of the rows, each (B, columns), zero where there is none.

    Only response tokens have a logprob and a weight, so the weight is the mask too, and where all tokens count
    alike the weighted sum over a batch is the plain mean.
    """
    tokens = torch.zeros(len(episodes), columns, dtype=torch.long)
    sampled, weight = torch.zeros(2, len(episodes), columns, dtype=torch.float32)
    for row, episode in enumerate(episodes):
        start, end = len(episode.prompt_ids), row_length(episode)
        tokens[row, :end] = torch.tensor(episode.prompt_ids + episode.response_ids)
        sampled[row, start:end] = torch.tensor(episode.logprobs)
        weight[row, start:end] = episode.token_weight
    return tokens, sampled, weight


def naive_logprobs(policy: Qwen2, tokens: Tensor, vocabulary: int, sampling: Sampling) -> Tensor:
    """Logprob (B, T-1) of every token (B, T) but the first, the logits of all of them at once and kept for backward."""
    hidden = policy(tokens)[:, :-1].flatten(0, 1)  # (B * (T-1), hidden)
    targets = tokens[:, 1:].flatten()
    logits = warp(head_logits(hidden, policy.head[:vocabulary]), sampling, keep=targets)
    return logits.log_softmax(dim=-1).gather(-1, targets[:, None]).view(len(tokens), -1)


def update_ablations(update: Update) -> dict[str, Callable[[], int]]:
    """The update with one idea of grpo.py less each; the gradient stays the same."""
    # small enough to add nothing, large enough that no product of it leaves the normal numbers, which are faster
    forced = [replace(episode, advantage=episode.advantage or 1e-10) for episode in update.episodes]

    def with_stand_in(name: str, stand_in: object) -> Callable[[], int]:
        def run() -> int:
            with replaced(grpo, name, stand_in):
                return update.ours()
        return run

    return {
        "rows without advantage run too": lambda: update.ours(forced),
        "rows in the order sampled": with_stand_in("micro_batches", in_sampled_order),
        "padding without bound": with_stand_in("PADDING", 1.0),
        "logits of a micro-batch at once": with_stand_in("CHUNK_TOKENS", 10**9),
        "logits kept, not recomputed": with_stand_in("checkpoint", lambda chunk, *arguments, **_: chunk(*arguments)),
    }


def in_sampled_order(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers as they come, cut into micro-batches of at most `budget` tokens, padding included."""
    batches: list[list[int]] = []
    longest = 0  # row of the last micro-batch
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = length
    return batches


def those_that_fit(variants: dict[str, Callable[[], int]]) -> dict[str, Callable[[], int]]:
    """The variants that a GPU has the memory for; each is tried once."""
    fitting = {}
    for name, run in variants.items():
        try:
            run()
            fitting[name] = run
        except torch.OutOfMemoryError:
            print(f"  {name}: out of memory")
        torch.cuda.empty_cache()
    return fitting


def row_length(episode: Episode) -> int:
    """Tokens of prompt and response."""
    return len(episode.prompt_ids) + len(episode.response_ids)


def useful_flops(policy: Qwen2, episodes: Sequence[Episode], vocabulary: int) -> float:
    """FLOPs that the gradient of these rows takes however it is computed: forward, and twice as many for backward.

    A product takes 2 for each weight and token. The embedding is looked up, no product; the head (tied or not) is one,
    but only where a response token is predicted. Attention takes 2 products of each token with those up to itself.
    """
    config = policy.config
    matrices = sum(weight.numel() for weight in policy.layers.parameters() if weight.dim() == 2)
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    flops = 0
    for episode in episodes:
        length = row_length(episode)
        flops += 2 * matrices * length + 2 * vocabulary * config.hidden_size * len(episode.response_ids)
        flops += 2 * 2 * heads * (length * (length + 1) // 2)
    return 3.0 * flops


def measure_update(update: Update, config: Config, arguments: argparse.Namespace) -> dict[str, object]:
    """Update tokens/s beside the naive way, what the batch looked like, and how near the hardware's limit it came."""
    memory = cuda_memory(update, config) if update.device.type == "cuda" else {}
    variants: dict[str, Callable[[], int]] = {"ours": update.ours, "naive": update.naive}
    if arguments.ablate:
        variants |= update_ablations(update)
    if update.device.type == "cuda":
        variants = those_that_fit(variants)
    update.step_seconds.clear()
    results = take_turns(variants, arguments.rounds, update.device)
    seconds = results["ours"]["seconds"]
    ratio = {"times_as_fast_as_naive": results["naive"]["seconds"] / seconds} if "naive" in results else {}

    lengths = [row_length(episode) for episode in update.telling]
    batches = grpo.micro_batches(lengths, update.settings.tokens_per_microbatch)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    groups = {episode.group for episode in update.episodes}
    with_spread = {episode.group for episode in update.episodes if episode.advantage}
    return {
        "variants": results,
        "rows": len(update.episodes),
        "rows_run": len(lengths),
        "groups_without_spread": 1 - len(with_spread) / len(groups),
        "tokens": update.tokens,
        "tokens_run": sum(lengths),
        "tokens_per_second": results["ours"]["tokens_per_second"],
        "tokens_run_per_second": sum(lengths) / seconds,
        "micro_batches": len(batches),
        "padding_share": 1 - sum(lengths) / padded,
        "optimizer_step_share": statistics.median(update.step_seconds) / seconds,
        **ratio,
        **hardware_limits(update, seconds),
        **memory,
    }


# FLOP/s of dense bf16 products, of the SXM card where there are several of the name
DATA_SHEETS = {"A40": 149.7e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


def hardware_limits(update: Update, seconds: float) -> dict[str, float]:
    """Model FLOP utilisation of an update that takes so long: of the measured rate, and of the data sheet's."""
    flops = useful_flops(update.policy, update.telling, update.vocabulary)
    rate = matmul_rate(update.device)
    figures = {"useful_tflop": flops / 1e12, "matmul_tflop_per_second": rate / 1e12,
               "utilisation_of_matmul": flops / seconds / rate}
    name = torch.cuda.get_device_name(update.device) if update.device.type == "cuda" else ""
    sheet = next((DATA_SHEETS[word] for word in name.replace("-", " ").split() if word in DATA_SHEETS), None)
    return figures | ({"utilisation_of_data_sheet": flops / seconds / sheet} if sheet else {})


def cuda_memory(update: Update, config: Config) -> dict[str, float]:
    """Peak GiB of our update on CUDA beside memory.py's plan, whose reserve is for what torch does not see."""
    update.ours()  # the first run also makes what stays, such as the workspaces of cuBLAS
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(update.device)
    update.ours()
    allocated, reserved = (torch.cuda.max_memory_allocated(update.device),
                           torch.cuda.max_memory_reserved(update.device))
    card = float(torch.cuda.get_device_properties(update.device).total_memory)
    planned = plan_memory(config, update.policy.config, card).peaks[1]
    return {"peak_allocated_gib": allocated / GIB, "peak_reserved_gib": reserved / GIB, "planned_gib": planned / GIB,
            "allocated_over_plan_without_reserve": allocated / (planned - RESERVE),
            "reserved_over_plan": reserved / planned}


# ---- Memory of the logprobs --------------------------------------------------------------------------------


class SizesSeen(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation gives, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()  # how many tensors of each

    def __torch_dispatch__(self, function: Callable, types: object, arguments: tuple = (),
                           keywords: dict | None = None) -> object:
        result = self.compute(function, arguments, keywords or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.sizes[tensor.numel()] += 1
        return result

    def compute(self, function: Callable, arguments: tuple, keywords: dict) -> object:
        return function(*arguments, **keywords)

    def largest_beside(self, head: Tensor) -> int:
        """Elements of the largest tensor that is not of the head's size, as the head itself and its gradient are."""
        return max(self.sizes.keys() - {head.numel()})


def logprob_work(vocabulary: int, tokens: int) -> tuple[Qwen2, list[Episode]]:
    """Embedding and head of the 0.5B model around one thin layer, and rows of 64 prompt and 192 response tokens."""
    config = replace(shape_config("0.5B"), vocab_size=vocabulary, num_hidden_layers=1, intermediate_size=64)
    policy = random_model(config, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for _ in range(tokens // 256):
        ids = torch.randint(vocabulary, (256,), generator=generator).tolist()
        episodes.append(Episode(Problem((1, 1), 2), 0, ids[:64], ids[64:], [0.0] * 192, True, "", token_weight=1.0))
    return policy, episodes


def logprob_pass(policy: Qwen2, episodes: Sequence[Episode], chunked: bool) -> None:
    """Forward and backward of the logprobs of a micro-batch, as grpo.py has them or all at once."""
    vocabulary = len(policy.head)
    if chunked:
        logprobs, _ = response_logprobs(policy, episodes, vocabulary, Sampling())
        logprobs.sum().backward()
    else:
        tokens, _, weight = as_rows(episodes, max(map(row_length, episodes)))
        (weight[:, 1:] * naive_logprobs(policy, tokens, vocabulary, Sampling())).sum().backward()


def logprob_memory(vocabulary: int, tokens: int, chunked: bool, threads: int) -> tuple[float, float]:
    """GiB by which forward and backward raise the peak of this process, and of the largest tensor beside the head."""
    import resource  # not on Windows

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    torch.set_num_threads(threads)
    policy, episodes = logprob_work(vocabulary, tokens)
    before = peak()
    with SizesSeen() as seen:
        logprob_pass(policy, episodes, chunked)
    return (peak() - before) / GIB, seen.largest_beside(policy.head) * 4 / GIB


def measure_logprob_memory(vocabularies: Sequence[int] = (32768, 151936),
                           sizes: Sequence[int] = (512, 1024, 2048)) -> list[dict[str, float]]:
    """Host memory of the logprobs by vocabulary and micro-batch, chunked and not, each in a new process of its own.

    Either way the peak holds the head's gradient, and autograd's copies of it: about three times the head.
    """
    results = []
    print("                        chunked: peak  largest tensor    all at once: peak  largest tensor   (GiB)")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        for vocabulary, tokens in [(vocabulary, tokens) for vocabulary in vocabularies for tokens in sizes]:
            ours, naive = (processes.submit(logprob_memory, vocabulary, tokens, chunked, torch.get_num_threads())
                           .result() for chunked in (True, False))
            print(f"  {vocabulary:>7,} ids, {tokens:>5,} tokens  {ours[0]:>9.2f}  {ours[1]:>14.2f}"
                  f"  {naive[0]:>19.2f}  {naive[1]:>14.2f}", flush=True)
            head = vocabulary * shape_config("0.5B").hidden_size * 4
            results.append({"vocabulary": vocabulary, "micro_batch_tokens": tokens, "head_gib": head / GIB,
                            "chunked_peak_gib": ours[0], "chunked_largest_tensor_gib": ours[1],
                            "naive_peak_gib": naive[0], "naive_largest_tensor_gib": naive[1]})
    return results


# ---- The command line --------------------------------------------------------------------------------------


def what_fits(base: Config, card_gb: int) -> list[str]:
    """For a card, one line a size: the first of the settings, fastest first, whose plan for `base` fits."""
    lines = []
    for name in SHAPES:
        found = "does not fit"
        modes = (("master", 16384), ("split", 16384), ("split", 8192), ("offload", 8192), ("offload", 2048))
        for mode, tokens in modes:
            train = replace(base.train, optimizer=mode, tokens_per_microbatch=tokens)
            plan = plan_memory(replace(base, train=train), shape_config(name), card_gb * 0.95 * GIB)
            if plan.peak <= card_gb * 0.95 * GIB:
                waves = -(-base.rollout.questions_per_step // plan.questions_per_wave)
                plural = "s" if waves > 1 else ""
                found = f"{mode}, {tokens} tokens a micro-batch, {waves} wave{plural}, {plan.peak / GIB:.1f} GiB"
                break
        lines.append(f"| {name} | {card_gb} GB | {found} |")
    return lines


def print_plan(config: Config, size: str | None, card_gb: float) -> None:
    """The memory plan of the config, for its own model or a real size, on a card of so many GB."""
    shape = (shape_config(size) if size else
             read_model_config(find_folder(config.model.path, config.model.revision)))
    card = card_gb * 0.95 * GIB  # of a card's nominal size, what CUDA reports
    plan = plan_memory(config, shape, card)
    print(plan.table(card))
    if plan.peak > card:
        print(f"does not fit: {advice(config, plan, card)}")


def describe(device: torch.device, rows: int) -> dict[str, object]:
    """Print and return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {rows} rows")
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}


def measure(config: Config, arguments: argparse.Namespace) -> dict[str, object]:
    """Run what the command line asks for, print it, and return all figures."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if arguments.update_memory:
        return {"torch": torch.__version__, "logprob_memory": measure_logprob_memory()}
    if arguments.update:
        update = make_update(config, arguments.shape)
        report = describe(update.device, len(update.episodes))
        report["update"] = figures = measure_update(update, config, arguments)
        table(figures["variants"])
        print_figures(figures)
        return report
    work = make_work(config, arguments.shape)
    report = describe(work.model.embed.weight.device, len(work.uniforms)) | {"max_new_tokens": work.max_new}
    if arguments.grow:
        report["growth"] = measure_growth(work, arguments.rounds)
        table(report["growth"])
    else:
        report["rollout"] = measure_rollout(work, arguments)
        table(report["rollout"]["variants"])
        print_figures(report["rollout"])
    return report


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the sampler or the update beside the hardware's limits.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this size, forced lengths")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--grow", action="store_true", help="measure other group sizes and lengths instead")
    what.add_argument("--update", action="store_true", help="measure the update instead of the sampler")
    what.add_argument("--update-memory", action="store_true", help="measure the host memory of the logprobs instead")
    what.add_argument("--plan", type=float, metavar="GB", help="only print the memory plan for a card of this size")
    what.add_argument("--fits", action="store_true", help="only print which sizes fit on 24, 48 and 80 GB")
    parser.add_argument("--ablate", action="store_true", help="switch each idea off in turn")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    parser.add_argument("overrides", nargs="*", help="settings such as rollout.group_size=32 model.path=runs/x/final")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    report: dict[str, object] = {}
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.fits:
            print("\n".join(line for card in (24, 48, 80) for line in what_fits(config, card)))
        elif arguments.plan:
            print_plan(config, arguments.shape, arguments.plan)
        else:
            report = measure(config, arguments)
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    if report and arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
