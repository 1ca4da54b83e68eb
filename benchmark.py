"""How fast the sampler and the update are, beside what the hardware allows and beside transformers.

    python benchmark.py --config config_tiny.yml                    # the model of the config, real answers
    python benchmark.py --config config_tiny.yml --ablate           # each idea of rollout.py switched off in turn
    python benchmark.py --config config_tiny.yml --grow             # other group sizes and lengths
    python benchmark.py --config config.yml --shape 3B --json benchmarks/3b.json    # random weights, no download
    python benchmark.py --config config.yml --shape 3B --plan 48    # the memory plan for a card of 48 GB, nothing run
    python benchmark.py --config config.yml --fits                  # which sizes fit on 24, 48 and 80 GB

Everything compared runs in turns within one process, and the figure is the median over the rounds: on a shared machine
only ratios from one run mean anything. `transformers` (requirements-dev.txt) generates from the same weights, prompts
and lengths.

With --shape the answers have forced lengths, log-normal with mean 331 and cut at 1,024 as in real runs, because random
weights never end an answer. Model bandwidth utilisation is the bytes a rollout must move (the weights once a step,
each living row's keys and values once a step) over its time, over the measured bandwidth of a large device copy.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rollout
from checkpoint import find_folder, read_model_config
from countdown_task import ASSISTANT_PREFIX, question_text
from data_types import Config, UserError, load_config
from memory import GIB, SHAPES, advice, plan_memory, shape_config
from qwen2_model import Qwen2, Qwen2Config
from rollout import Answer, Decoder, KVCache, Sampling, generate
from train import find_device, set_up


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


@contextmanager
def replaced(module: object, name: str, stand_in: object) -> Iterator[None]:
    """While active, `module.name` is `stand_in`: how an idea of the sampler is switched off from outside."""
    original = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, original)


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


def take_turns(variants: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
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
    for group, max_new in [(4, 128), (8, 128), (16, 128), (32, 128), (64, 128), (16, 64), (16, 256), (16, 512), (16, 1024)]:
        grown = Work(work.model, work.prompts, group, max_new, [], work.vocabulary)
        variants[f"group {group}, {max_new} tokens"] = grown.sample
    return take_turns(variants, rounds, device)


def table(results: dict[str, dict[str, float]]) -> None:
    """Print variants with their tokens/s and the ratio of the first to each."""
    first = next(iter(results.values()))["tokens_per_second"]
    for name, row in results.items():
        print(f"  {name:34s} {row['tokens_per_second']:>10,.0f} tok/s  {row['seconds']:>8.2f} s  "
              f"first / this {first / row['tokens_per_second']:.2f}")


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the sampler beside the hardware and transformers.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this size, forced lengths")
    parser.add_argument("--ablate", action="store_true", help="switch each idea of the sampler off in turn")
    parser.add_argument("--grow", action="store_true", help="measure other group sizes and lengths instead")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--plan", type=float, metavar="GB", help="only print the memory plan for a card of this size")
    parser.add_argument("--fits", action="store_true", help="only print which sizes fit on 24, 48 and 80 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    parser.add_argument("overrides", nargs="*", help="settings such as rollout.group_size=32 model.path=runs/x/final")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.fits:
            print("\n".join(line for card in (24, 48, 80) for line in what_fits(config, card)))
            return 0
        if arguments.plan:
            shape = (shape_config(arguments.shape) if arguments.shape else
                     read_model_config(find_folder(config.model.path, config.model.revision)))
            card = arguments.plan * 0.95 * GIB  # of a card's nominal size, what CUDA reports
            plan = plan_memory(config, shape, card)
            print(plan.table(card))
            if plan.peak > card:
                print(f"does not fit: {advice(config, plan, card)}")
            return 0
        work = make_work(config, arguments.shape)
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    device = work.model.embed.weight.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    report: dict[str, object] = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
                                 "rows": len(work.uniforms), "max_new_tokens": work.max_new}
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {len(work.uniforms)} rows")
    if arguments.grow:
        report["growth"] = measure_growth(work, arguments.rounds)
        table(report["growth"])
    else:
        report["rollout"] = measure_rollout(work, arguments)
        table(report["rollout"]["variants"])
        for key, value in report["rollout"].items():
            if key != "variants":
                print(f"  {key}: {value:,.3f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
