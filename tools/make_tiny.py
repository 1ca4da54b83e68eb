"""Makes `tiny/`: a tiny model with the Qwen2 architecture, small enough for a laptop, trained from scratch.

A byte-level BPE is trained on the texts of the task, then a small Qwen2 is trained, supervised, on reasoning traces
that a program writes. A trace tries combinations, one a line, and says of each whether it hits the target:

    12*3=36, 36+7=43 no
    12-7=5, 5*3=15 yes
    </think>
    <answer>(12-7)*3</answer>

Traces are honest: a line says `yes` exactly when it reaches the target. And they are impatient: most give up after a
few misses and answer with their last try. So the model learns the format and gets the arithmetic right, but solves only
some of the problems. What is missing, patience and better tries, is left to GRPO (train.py --config config_tiny.yml).

There are two lessons. In the first the traces are patient and try at random: here the model learns the arithmetic, the
checking and not to repeat a try. (A trace that soon hits would teach it to write whatever number makes it hit.) In the
second they are impatient, and choose better.

    python -m tools.make_tiny --out tiny                            # writes tiny/ again; same machine, same bits
    python -m tools.make_tiny --examine tiny runs/NAME/final        # how models think, read from their traces

Held-out problems never enter a trace; tiny/sft_problems.parquet lists those that did.
"""

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as BytePairTokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

import evaluate
from countdown_task import ASSISTANT_PREFIX, MAX_NUMBER, Problem, Settings, question_text
from plumbing.files import write_json
from plumbing.model_folder import CONFIG, save_model
from plumbing.tasks import load_task, split_problems
from plumbing.terminal import exit_status, run_program, say
from qwen2_model import Qwen2, Qwen2Config
from tokenizer import Tokenizer

HELD_OUT = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in Qwen2.5
WORDS = (  # how Qwen2.5 splits a text into words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRACE_PHRASES = [", ", " no\n", " yes\n", "</think>\n<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def generate_problems(count: int, low: int, high: int, target_low: int, target_high: int) -> list[Problem]:
    """Every solvable problem with `count` numbers from low to high (repeats allowed) and a target in the range.

    In a fixed order: by numbers, which are sorted, then by target.
    """
    problems = []
    for numbers in itertools.combinations_with_replacement(range(low, high + 1), count):
        values = sorted(reachable_values(numbers))
        targets = [int(v) for v in values if v.denominator == 1 and target_low <= v <= target_high]
        problems += [Problem(numbers, target) for target in targets]
    return problems


def reachable_values(numbers: tuple[int, ...]) -> set[Fraction]:
    """The value of every expression that uses each number once.

    Brute force: all ways to split the numbers between the two sides of the last operation, and all values of
    either side. Signs are left out: they would only add the negatives of values that are here already.
    """
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    positions = range(len(numbers))
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(positions, size):
            left = reachable_values(tuple(numbers[i] for i in chosen))
            right = reachable_values(tuple(numbers[i] for i in positions if i not in chosen))
            for a, b in itertools.product(left, right):
                values |= {a + b, a - b, a * b} | ({a / b} if b else set())
    return values


@dataclass(frozen=True)
class Lesson:
    """How the traces of one part of the training are written."""

    steps: int
    rows: int  # traces per step
    orderly: float  # share of traces that go through the first operations in order, each with its best second one
    guided: float  # in the other traces: share of tries that are a solution, as if guessed,
    sensible: float  # share that have the best second operation for a random first one; the rest are random
    patience: tuple[float, ...]  # shares of traces that give up after 1, 2, 3, ... misses; the others after 14


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the model; found by the experiments in docs/log.md."""

    seed: int = 0
    learning_rate: float = 2.5e-3
    warmup_steps: int = 100
    merges: int = 320
    threads: int = 1  # the order of sums, and so the last bits, may depend on it
    lessons: tuple[Lesson, ...] = (
        Lesson(steps=3000, rows=48, orderly=0.7, guided=0.12, sensible=0.5, patience=()),
        Lesson(steps=1000, rows=64, orderly=0.5, guided=0.15, sensible=0.45, patience=(0.58, 0.2)),
    )


# ------------------------------------------------------------------------------------------------- the traces


@dataclass(frozen=True)
class Try:
    """One line of a trace: its text, the value it comes to, the expression it stands for, its first operation."""

    line: str
    value: int
    expression: str
    first: str


def operations(a: int, b: int) -> list[tuple[int, str, bool]]:
    """(result, sign, whether b stands left) of each operation with a natural result; the larger stands left."""
    big, small, swapped = (a, b, False) if a >= b else (b, a, True)
    results = [(big + small, "+", swapped), (big - small, "-", swapped), (big * small, "*", swapped)]
    return results + ([(big // small, "/", swapped)] if small and big % small == 0 else [])


def all_tries(numbers: tuple[int, ...], most: int = 200) -> list[Try]:
    """Every way to combine three numbers in two operations whose result is natural and at most `most`."""
    tries = []
    for rest in range(3):
        a, b = (n for i, n in enumerate(numbers) if i != rest)
        for between, sign, _ in operations(a, b):
            first = f"{max(a, b)}{sign}{min(a, b)}"
            for value, last_sign, swapped in operations(between, numbers[rest]):
                written = [(str(between), f"({first})"), (str(numbers[rest]), str(numbers[rest]))]
                (left, left_text), (right, right_text) = reversed(written) if swapped else written
                line = f"{first}={between}, {left}{last_sign}{right}={value}"
                if value <= most:
                    tries.append(Try(line, value, f"{left_text}{last_sign}{right_text}", first))
    return tries


def write_trace(problem: Problem, lesson: Lesson, rng: random.Random) -> str:
    """One trace, from right after `<think>` to the end of the answer."""
    shares = itertools.accumulate(lesson.patience)
    draw = rng.random()
    patience = next((misses for misses, share in enumerate(shares, start=1) if draw < share), 14)
    orderly = rng.random() < lesson.orderly
    left = list(dict.fromkeys(all_tries(problem.numbers)))
    lines: list[str] = []
    hit = False
    while left and len(lines) < patience and not hit:
        if orderly:
            chosen = best_second(left, left[0].first, problem.target)
        else:
            chosen = choose_try(left, problem.target, lesson, rng)
        # an orderly search is done with a first operation once its best try has missed
        left = [t for t in left if t.first != chosen.first] if orderly else [t for t in left if t != chosen]
        hit = chosen.value == problem.target
        lines.append(f"{chosen.line} {'yes' if hit else 'no'}")
    return "\n" + "\n".join(lines) + f"\n</think>\n<answer>{chosen.expression}</answer>"


def choose_try(left: list[Try], target: int, lesson: Lesson, rng: random.Random) -> Try:
    """The next try, among those that are left."""
    kind = rng.random()
    hits = [t for t in left if t.value == target]
    if hits and kind < lesson.guided:
        return rng.choice(hits)
    if kind < lesson.guided + lesson.sensible:
        return best_second(left, rng.choice(left).first, target)
    return rng.choice(left)


def best_second(left: list[Try], first: str, target: int) -> Try:
    """Of the tries that begin with `first`, the one closest to the target."""
    return min((t for t in left if t.first == first), key=lambda t: abs(t.value - target))


# ---------------------------------------------------------------------------------------------- the tokenizer


def write_tokenizer(problems: list[Problem], recipe: Recipe, folder: Path) -> Tokenizer:
    """Train and save a byte-level BPE with Qwen's own word splitting, and the fixed phrases as added tokens.

    So a prompt has 15 to 19 tokens, and AutoTokenizer, which rebuilds Qwen's splitting, gives the same ids.
    """
    rng = random.Random(recipe.seed)
    texts = []
    for problem in rng.choices(problems, k=4000):
        texts += [question_text(problem), write_trace(problem, recipe.lessons[0], rng)]
    bpe = BytePairTokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=len(alphabet) + recipe.merges, initial_alphabet=alphabet, show_progress=False),
    )
    around = question_text(Problem((MAX_NUMBER,), MAX_NUMBER)).split(str(MAX_NUMBER))  # before, between and after
    phrases = ["user\n" + around[0], *around[1:], "assistant\n" + ASSISTANT_PREFIX, *TRACE_PHRASES]
    bpe.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    bpe.add_special_tokens(SPECIAL_TOKENS)
    bpe.save(str(folder / "tokenizer.json"))
    text_end, _, turn_end = (bpe.token_to_id(token) for token in SPECIAL_TOKENS)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": [turn_end, text_end], "pad_token_id": text_end})
    return Tokenizer(folder)


# ------------------------------------------------------------------------------------------------- the lesson


def new_model(vocabulary: int, seed: int) -> Qwen2:
    """A Qwen2 of 0.8M parameters with fresh weights: 4 layers of 128, 8 query heads on 2 kv heads of 16."""
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    model = Qwen2(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # what is added to the residual stream starts smaller, as in GPT-2
            added = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.05 / (2 * config.num_hidden_layers) ** 0.5 if added else 0.05
            torch.nn.init.normal_(weight, std=std, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)
    return model


def config_json(model: Qwen2, tokenizer: Tokenizer) -> dict[str, object]:
    """The model's config.json, as transformers expects it."""
    text_end, turn_end = tokenizer.end_ids
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        **asdict(model.config),
        "use_sliding_window": False,
        "bos_token_id": text_end,
        "eos_token_id": turn_end,
    }


def batches(
    tokenizer: Tokenizer, problems: list[Problem], lesson: Lesson, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens, targets), both (rows, T), of new traces; targets are -100 except for the traces' own tokens.

    Sixteen batches are drawn at once and sorted by length, so that the rows of a batch need little padding.
    """
    while True:
        rows = []
        for problem in rng.choices(problems, k=16 * lesson.rows):
            prompt = tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX)
            rows.append((prompt, tokenizer.encode(write_trace(problem, lesson, rng) + "<|im_end|>")))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        cuts = [rows[i : i + lesson.rows] for i in range(0, len(rows), lesson.rows)]
        rng.shuffle(cuts)
        for cut in cuts:
            longest = max(len(prompt) + len(trace) for prompt, trace in cut)
            tokens = torch.zeros(len(cut), longest, dtype=torch.long)
            targets = torch.full((len(cut), longest), -100)
            for row, (prompt, trace) in enumerate(cut):
                end = len(prompt) + len(trace)
                tokens[row, :end] = torch.tensor(prompt + trace)
                targets[row, len(prompt) - 1 : end - 1] = torch.tensor(trace)  # position t predicts token t + 1
            yield tokens, targets


def teach(model: Qwen2, tokenizer: Tokenizer, problems: list[Problem], recipe: Recipe) -> None:
    """Supervised next-token training through all lessons, the learning rate falling linearly to zero."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    total, step, began = sum(lesson.steps for lesson in recipe.lessons), 0, time.perf_counter()
    for number, lesson in enumerate(recipe.lessons, start=1):
        rng = random.Random(f"seed {recipe.seed}, lesson {number}")
        for tokens, targets in itertools.islice(batches(tokenizer, problems, lesson, rng), lesson.steps):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(step / recipe.warmup_steps, 1 - (step - 1) / total)
            taught = targets >= 0  # (rows, T)
            loss = F.cross_entropy(model.logits(model(tokens)[taught]), targets[taught])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 0:
                say(f"step {step}/{total}  loss {loss.item():.4f}  {time.perf_counter() - began:.0f}s")


def write_problems(problems: list[Problem], path: Path) -> None:
    """Problems in the schema of the public data set: columns nums and target."""
    columns = {"nums": [list(p.numbers) for p in problems], "target": [p.target for p in problems]}
    pandas.DataFrame(columns).to_parquet(path, index=False)


def make(out: Path) -> None:
    """Write the model, and the problems, to the folder `out`."""
    recipe = Recipe()
    torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    problems = generate_problems(count=3, low=1, high=15, target_low=10, target_high=100)
    write_problems(problems, out / "problems.parquet")
    training, _ = split_problems(
        load_task("countdown"), Settings(path=str(out / "problems.parquet"), held_out=HELD_OUT)
    )
    tokenizer = write_tokenizer(training, recipe, out)
    model = new_model(len(tokenizer), recipe.seed)
    teach(model, tokenizer, training, recipe)
    save_model(model, {CONFIG: json.dumps(config_json(model, tokenizer)).encode()}, out)
    write_problems(training, out / "sft_problems.parquet")


# ------------------------------------------------------------------------------------ reading traces back

TRY = re.compile(r"N([-+*/])N=N, N([-+*/])N=N (yes|no)".replace("N", r"(\d{1,9})"), re.ASCII)


def examine(texts: list[str], problems: list[Problem]) -> dict[str, float]:
    """How tiny/ and what is trained from it thinks, from lines such as `12*3=36, 36+7=43 no`.

    The tries per response, and the shares of right equations and of true claims (`yes` where the target is reached).
    """
    tries = [(found, problem) for text, problem in zip(texts, problems, strict=True) for found in TRY.findall(text)]
    right = [is_right(*found[i : i + 4]) for found, _ in tries for i in (0, 4)]
    claims = {word: [int(f[7]) == p.target for f, p in tries if f[8] == word] for word in ("yes", "no")}
    return {
        "tries per response": len(tries) / len(texts),
        "equations right": sum(right) / max(1, len(right)),
        "`yes` true": sum(claims["yes"]) / max(1, len(claims["yes"])),
        "`no` true": 1 - sum(claims["no"]) / max(1, len(claims["no"])),
    }


def is_right(a: str, sign: str, b: str, result: str) -> bool:
    x, y, z = int(a), int(b), int(result)
    return z * y == x and y != 0 if sign == "/" else z == {"+": x + y, "-": x - y, "*": x * y}[sign]


def examine_models(words: list[str]) -> None:
    """Print a column per model: its scores, and how it thinks, in one response to each held-out problem."""
    config_path, overrides = evaluate.find_config(words), [word for word in words if evaluate.OVERRIDE.match(word)]
    columns = {}
    for name in [word for word in words if word not in overrides]:
        agent = evaluate.load_agent(name, config_path, overrides)
        responses = evaluate.respond(agent, count=1, temperature=1.0, seed=0)
        texts = [episode.text for (episode,) in responses]
        columns[name] = evaluate.describe(agent, responses) | examine(texts, agent.held_out)
    say(f"{len(agent.held_out)} held-out problems, settings of {config_path}")
    say("\n".join(evaluate.table(columns)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.make_tiny", description="Make the tiny model, or examine models.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="the folder to write, such as tiny; takes 45 minutes on one core")
    what.add_argument("--examine", nargs="+", metavar="MODEL", help="how models think; SETTING=VALUE may follow")
    arguments = parser.parse_args(argv)

    def work() -> None:
        if arguments.out:
            make(arguments.out)
        else:
            examine_models(arguments.examine)

    return exit_status("tools.make_tiny", work)


if __name__ == "__main__":
    run_program(main)
