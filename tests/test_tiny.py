"""The tiny checkpoint: genuine, small, honest, able but poor, and kept away from the held-out problems.

A demo that trains on its own exam, or that starts from a model already able, would show nothing. So these tests look at
the files that are committed, not at what make_tiny.py meant to write.
"""

import ast
import operator
import random
import re
from fractions import Fraction
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import make_tiny
from model_folder import load_model
from countdown_task import ASSISTANT_PREFIX, grade, load_problems, question_text, split_problems
from data_types import Problem, load_config
from qwen2_model import head_logits
from rollout import Sampling, generate
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"


@pytest.fixture(scope="module")
def policy():
    return load_model(TINY, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def split():
    return split_problems(load_problems(str(TINY / "problems.parquet")), 512)


def value_of(text: str) -> Fraction:
    """The value of an expression, by Python's own parser: another road than the grader's."""
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def walk(node: ast.AST) -> Fraction:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](walk(node.left), walk(node.right))
        return Fraction(node.value)

    return walk(ast.parse(text, mode="eval").body)


def test_the_folder_is_small_and_complete():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names <= {file.name for file in TINY.iterdir()}


def test_transformers_opens_it_and_gives_the_same_logits_and_ids(policy, tokenizer, split):
    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    # not AutoTokenizer: for the model type qwen2 it puts Qwen's own word splitting in place of what tokenizer.json says
    their_tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    for problem in split[1][:5]:
        chat = [{"role": "user", "content": question_text(problem)}]
        text = their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + ASSISTANT_PREFIX
        ids = tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX)
        assert ids == their_tokenizer(text)["input_ids"]
        tokens = torch.tensor([ids])
        with torch.no_grad():
            ours = head_logits(policy(tokens)[0], policy.head)
            torch.testing.assert_close(ours, theirs(tokens).logits[0], atol=1e-4, rtol=0)


def test_prompts_are_short_and_digits_single(tokenizer, split):
    """Long prompts would spend the demo's minutes on reading the question."""
    for problem in split[1]:
        assert len(tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX)) <= 24
    assert len(tokenizer.encode("1234567890")) == 10
    assert tokenizer.decode(tokenizer.encode("12*3=36, 36+7=43 no\n")) == "12*3=36, 36+7=43 no\n"


def test_no_held_out_problem_was_ever_trained_on(split):
    """Neither by GRPO nor by make_tiny.py, on the files as they are committed."""
    training, held_out = split
    config = load_config(str(ROOT / "config_tiny.yml"))
    assert (ROOT / config.data.path) == TINY / "problems.parquet" and config.data.held_out == 512

    def keys(problems):
        return {(tuple(sorted(p.numbers)), p.target) for p in problems}

    taught = pandas.read_parquet(TINY / "sft_problems.parquet")
    taught = {(tuple(sorted(int(n) for n in row.nums)), int(row.target)) for row in taught.itertuples()}
    assert len(keys(held_out)) == 512 and len(keys(training) | keys(held_out)) >= 5000
    assert not keys(held_out) & keys(training)
    assert not keys(held_out) & taught
    assert taught <= keys(training)


def test_able_but_poor(policy, tokenizer, split):
    """Format and sums nearly always right, 15 to 45 % success: the rest is GRPO's doing."""
    held_out = split[1]
    prompts = [tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX) for problem in held_out]
    uniforms = torch.rand(len(held_out), 256, generator=torch.Generator().manual_seed(5))
    answers = generate(policy, prompts, uniforms, tokenizer.end_ids, len(tokenizer), Sampling(1.0))
    texts = [tokenizer.decode(answer.ids[:-1]) for answer in answers]
    rewards = [grade(t, a.ended, p) for t, a, p in zip(texts, answers, held_out, strict=True)]
    assert sum(r.format > 0 for r in rewards) / 512 > 0.97
    assert 0.15 <= sum(r.correct for r in rewards) / 512 <= 0.45
    sums = [sum_ for text in texts for sum_ in re.findall(r"(\d+[-+*/]\d+)=(\d+)", text)]
    right = sum(value_of(left) == int(result) for left, result in sums if not left.endswith("/0"))
    assert len(sums) > 1000 and right / len(sums) > 0.97


@pytest.mark.parametrize("lesson", make_tiny.Recipe().lessons)
def test_traces_are_honest_and_their_sums_are_right(lesson):
    """A trace that says `yes` beside a miss would teach the model to claim success instead of checking."""
    rng = random.Random(3)
    for _ in range(300):
        problem = Problem(tuple(rng.randint(1, 15) for _ in range(3)), rng.randint(10, 100))
        trace = make_tiny.write_trace(problem, lesson, rng)
        thoughts, answer = re.fullmatch(r"\n(.*)\n</think>\n<answer>(.*)</answer>", trace, re.DOTALL).groups()
        lines = thoughts.split("\n")
        assert len(set(lines)) == len(lines), "a try is never repeated"
        for number, line in enumerate(lines):
            first, second, verdict = re.fullmatch(r"(\S+), (\S+) (yes|no)", line).groups()
            for sum_ in (first, second):
                left, result = sum_.split("=")
                assert value_of(left) == int(result)
            assert (verdict == "yes") == (int(second.split("=")[1]) == problem.target)
            assert verdict == "no" or number == len(lines) - 1, "the first hit ends the search"
        assert value_of(answer) == int(lines[-1].split("=")[-1].split()[0]), "the answer is the last try"
        assert sorted(map(int, re.findall(r"\d+", answer))) == sorted(problem.numbers)
        assert grade(trace, True, problem).correct == float(lines[-1].endswith("yes"))


def test_the_tries_cover_what_is_solvable(split):
    """Nearly every problem can be solved by some line of a trace, or the demo could not reach 90 %."""
    problems = split[0][::10] + split[1]
    solvable = sum(any(t.value == p.target for t in make_tiny.all_tries(p.numbers)) for p in problems)
    assert solvable / len(problems) > 0.99
