"""The tiny model: complete, honest, able but poor, and never trained on what a demo is judged by."""

import random
import re
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from countdown_task import Problem, Settings, grade, load_problems
from fuzz_grader import evaluate
from plumbing.config import load_config
from plumbing.memory import Limit
from plumbing.model_folder import load_model
from plumbing.tasks import load_task, split_problems
from rollout import Sampler
from tokenizer import Tokenizer
from tools import make_tiny

TINY = Path(__file__).resolve().parent.parent / "tiny"


@cache
def tiny():
    """The sampler of the tiny model, training problems, held-out problems and their prompts."""
    training, held_out = split_problems(load_task("countdown"), Settings(path=str(TINY / "problems.parquet")))
    policy, limit = load_model(TINY, torch.device("cpu"), torch.float32), Limit("rows at a time", 512)
    sampler = Sampler(policy, Tokenizer(TINY), load_task("countdown"), 256, limit)
    return sampler, training, held_out, [sampler.encode_prompt(problem) for problem in held_out]


def test_transformers_gets_the_same_ids():
    """AutoTokenizer puts Qwen's word splitting in place of what tokenizer.json says: with another, ids would differ."""
    (sampler, _, held_out, _), rng = tiny(), random.Random(1)
    loaded = [kind.from_pretrained(TINY) for kind in (AutoTokenizer, PreTrainedTokenizerFast)]
    for lesson, problem in product(make_tiny.Recipe().lessons, held_out[:100]):
        trace = make_tiny.write_trace(problem, lesson, rng) + "<|im_end|>"
        ids = sampler.tokenizer.encode(trace)
        assert [their(trace)["input_ids"] for their in loaded] == [ids, ids]
        assert [their.decode(ids) for their in (sampler.tokenizer, *loaded)] == [trace] * 3


def test_the_folder_is_small_prompts_are_short_and_no_held_out_problem_was_ever_trained_on():
    """Neither by GRPO nor by make_tiny.py. Long prompts would spend the demo's minutes on reading the question."""
    sampler, *sides, prompts = tiny()
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    assert max(map(len, prompts)) <= 24
    assert len(sampler.tokenizer.encode("1234567890")) == 10
    data = load_config(TINY.parent / "config_tiny.yml").data
    assert (TINY.parent / data.path, data.held_out) == (TINY / "problems.parquet", 512)
    sides.append(load_problems(Settings(path=str(TINY / "sft_problems.parquet"))))
    training, held_out, taught = ({(*sorted(p.numbers), p.target) for p in side} for side in sides)
    assert (len(training), len(held_out), held_out & training, taught - training) == (5435, 512, set(), set())


def test_examining_traces_by_hand():
    """Four of six equations are right, one of two hits is, and so is the one miss."""
    texts = ["8+6=14, 14*3=42 no\n9/3=4, 4+6=10 yes", "7-8=1, 1*3=3 yes\n7-8=1 9/0=0, 0+", "6/0=0, 1+0 = 1 no"]
    found = make_tiny.examine(texts, [Problem((3, 6, 8), target) for target in (10, 4, 9)])
    assert found == {"tries per response": 1.0, "equations right": 4 / 6, "`yes` true": 0.5, "`no` true": 1.0}


@pytest.mark.parametrize("lesson", make_tiny.Recipe().lessons)
def test_traces_are_honest_and_their_arithmetic_is_right(lesson):
    """A trace that says `yes` beside a miss would teach the model to claim success instead of checking."""
    rng = random.Random(3)
    for _ in range(300):
        problem = Problem(tuple(rng.randint(1, 15) for _ in range(3)), rng.randint(10, 100))
        trace = make_tiny.write_trace(problem, lesson, rng)
        thoughts, answer = re.fullmatch(r"\n(.*)\n</think>\n<answer>(.*)</answer>", trace, re.DOTALL).groups()
        lines = re.findall(r"(\S+)=(\d+), (\S+)=(\d+) (yes|no)(?:\n|$)", thoughts)
        assert len(set(lines)) == len(lines) == thoughts.count("\n") + 1  # no try is repeated
        for first, between, second, result, verdict in lines:
            assert (evaluate(first)[0], evaluate(second)[0]) == (int(between), int(result))
            assert (verdict == "yes") == (int(result) == problem.target)
        assert all(line[-1] == "no" for line in lines[:-1])  # the first hit ends the search
        assert evaluate(answer) == (int(lines[-1][3]), sorted(problem.numbers))  # the answer is the last try
        assert grade(trace, False, problem)["correct"] == float(lines[-1][-1] == "yes")


def test_the_problems_are_all_there_are_and_the_tries_cover_what_is_solvable():
    """Nearly every problem can be solved by some line of a trace, or the demo could not reach 90 %."""
    small = [p for p in load_problems(Settings(path=str(TINY / "problems.parquet"))) if max(p.numbers) <= 6]
    assert make_tiny.generate_problems(count=3, low=1, high=6, target_low=10, target_high=100) == small
    assert make_tiny.reachable_values((2, 3)) == {5, -1, 1, 6, Fraction(2, 3), Fraction(3, 2)}
    problems = tiny()[1][::10] + tiny()[2]
    solvable = sum(any(t.value == p.target for t in make_tiny.all_tries(p.numbers)) for p in problems)
    assert solvable / len(problems) > 0.99
