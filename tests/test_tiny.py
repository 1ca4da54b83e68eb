"""The tiny model: complete, honest, able but poor, and kept away from the held-out problems.

A demo that trains on its own exam, or that starts from a model already able, would show nothing.
"""

import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from fuzz_grader import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import make_tiny
from config import load_config
from countdown_task import ASSISTANT_PREFIX, Problem, Settings, examine, grade, load_problems, question_text
from data_types import Sampling
from model_folder import load_model
from rollout import Sampler
from task import load_task, split_problems
from tokenizer import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "tiny"


@cache
def tiny():
    """Policy, tokenizer, training problems, held-out problems and their prompts."""
    problems = load_problems(Settings(path=str(TINY / "problems.parquet")))
    training, held_out = split_problems(load_task("countdown"), problems, 512)
    prompts = [Tokenizer(TINY).encode_prompt(question_text(p), ASSISTANT_PREFIX) for p in held_out]
    return load_model(TINY, torch.device("cpu"), torch.float32), Tokenizer(TINY), training, held_out, prompts


def test_transformers_opens_it_and_answers_alike():
    """AutoTokenizer puts Qwen's word splitting in place of what tokenizer.json says. With another splitting in there,
    as there was, whoever opened a trained model the usual way got other ids and nonsense."""
    policy, tokenizer, _, held_out, prompts = tiny()
    theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    loaded = [AutoTokenizer.from_pretrained(TINY), PreTrainedTokenizerFast.from_pretrained(TINY)]
    ours = Sampler(policy, tokenizer.end_ids).generate(prompts[:64], torch.rand(64, 48), Sampling(0.0))
    same = 0
    for problem, prompt, response in zip(held_out, prompts, ours, strict=False):
        chat = [{"role": "user", "content": question_text(problem)}]
        for their in loaded:
            text = their.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + ASSISTANT_PREFIX
            assert their(text)["input_ids"] == prompt
            assert their.decode(response.ids) == tokenizer.decode(response.ids)
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(policy.logits(policy(tokens)[0]), theirs(tokens).logits[0], atol=1e-4, rtol=0)
        found = theirs.generate(tokens, do_sample=False, max_new_tokens=48)[0, len(prompt) :].tolist()
        same += found == response.ids
    assert same >= 62, "but for two whose choice is a tie in the last bits"
    rng = random.Random(1)
    for lesson in make_tiny.Recipe().lessons:
        for problem in rng.choices(held_out, k=100):
            trace = make_tiny.write_trace(problem, lesson, rng) + "<|im_end|>"
            ids = tokenizer.encode(trace)
            assert [their(trace)["input_ids"] for their in loaded] == [ids, ids]
            assert tokenizer.decode(ids) == trace


def test_the_folder_is_small_prompts_are_short_and_digits_single():
    """Long prompts would spend the demo's minutes on reading the question."""
    _, tokenizer, _, _, prompts = tiny()
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    assert max(map(len, prompts)) <= 24
    assert len(tokenizer.encode("1234567890")) == 10


def test_no_held_out_problem_was_ever_trained_on():
    """Neither by GRPO nor by make_tiny.py."""
    data = load_config(TINY.parent / "config_tiny.yml").data
    assert (TINY.parent / data.path, data.held_out) == (TINY / "problems.parquet", 512)
    sides = *tiny()[2:4], load_problems(Settings(path=str(TINY / "sft_problems.parquet")))
    training, held_out, taught = ({(*sorted(p.numbers), p.target) for p in side} for side in sides)
    assert (len(training), len(held_out)) == (5435, 512)
    assert not held_out & training
    assert taught <= training


def test_able_but_poor():
    """Format and arithmetic nearly always right, 15 to 40 % success: the rest is left to GRPO."""
    policy, tokenizer, _, held_out, prompts = tiny()
    uniforms = torch.rand(512, 256, generator=torch.Generator().manual_seed(5))
    responses = Sampler(policy, tokenizer.end_ids).generate(prompts, uniforms, Sampling())
    texts = [tokenizer.decode(response.ids[:-1]) for response in responses]
    rewards = [grade(text, r.truncated, p) for text, r, p in zip(texts, responses, held_out, strict=True)]
    assert sum(r["format"] > 0 for r in rewards) / 512 > 0.97
    assert 0.15 <= sum(r["correct"] for r in rewards) / 512 <= 0.40
    equations = [equation for text in texts for equation in re.findall(r"(\d+[-+*/]\d+)=(\d+)", text)]
    right = sum(evaluate(left)[0] == int(result) for left, result in equations if not left.endswith("/0"))
    assert len(equations) > 1000
    assert right / len(equations) > 0.97


def test_examining_traces_by_hand():
    """Four of six equations are right, one of two hits is, and so is the one miss."""
    texts = ["8+6=14, 14*3=42 no\n9/3=4, 4+6=10 yes", "7-8=1, 1*3=3 yes\n7-8=1 9/0=0, 0+", "6/0=0, 1+0 = 1 no"]
    found = examine(texts, [Problem((3, 6, 8), target) for target in (10, 4, 9)])
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


def test_the_tries_cover_what_is_solvable():
    """Nearly every problem can be solved by some line of a trace, or the demo could not reach 90 %."""
    problems = tiny()[2][::10] + tiny()[3]
    solvable = sum(any(t.value == p.target for t in make_tiny.all_tries(p.numbers)) for p in problems)
    assert solvable / len(problems) > 0.99
