"""Hostile responses for the grader: what a policy, pushed by a reward, may come to write.

    PYTHONPATH=. python tests/fuzz_grader.py 1000000 [SEED]

Each is graded by `countdown_task.grade`, which walks a syntax tree, and by an oracle that lets Python run it. The first
response on which they disagree, or the grader raises or is slow, stops it.
"""

import random
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from itertools import accumulate
from math import ceil, floor
from typing import Any

from countdown_task import MAX_EXPRESSION_LENGTH, Problem, grade

DEEPEST = 200  # parentheses inside parentheses: Python's parser takes no more
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPACE = " \t\n\r\v\f"
TEXTS = """<ANSWER> < answer> <answer > </ answer> <answer/> <answ er> <|im_end|> <|im_start|> <|endoftext|> <b> </b>
    ( ) (( )) () + - * / ** // % ^ = == != , . ; : _ & | ~ ! # @ \\ ' " ` { } [ ] $ 0 1 2 3 7 12 007 -1 +1
    1.0 .5 1e3 1_000 0x1F 1j 9999999999999999999999 10**99 9**9**9 True None x lambda:0 __import__('os')
    int(3) ١٢ ３ ² ½ Ⅷ ⅓ × ÷ − ＋ （ ） ＝ ∕ ⁄ é 数 🙂 Let's try so that is too much hit \\boxed{3} \\frac{1}{2}"""  # noqa: RUF001
PIECES = [*TAGS * 3, *TEXTS.split(), *SPACE, "  ", "1 2", "# no\n", *"\0\x1b\x1c\x85\xa0\u2028\u200b\ufeff\u202e\ud800"]
FORMS = [*["{}", "({})"] * 6, "-{}", "--{}", "+ {}", "+-\n-({})"]  # of a part of an expression
THOUGHTS = ["", "1 + 2 = 3, no", "\n12 - 7 = 5. too low.\n12 + 7 * 3 = 33. yes\n", "Try (a + b) * c < 10 > 4"]


def oracle(response: str, truncated: bool, problem: Problem) -> dict[str, float]:
    """What `grade` should say, found another way."""
    text = "<think>" + response
    places = [text.find(tag) for tag in TAGS]
    if any(text.count(tag) != 1 for tag in TAGS) or places != sorted(places):
        return {"format": 0.0, "correct": 0.0}
    between = text[places[1] + len("</think>") : places[2]]
    after = text[places[3] + len("</answer>") :]
    well_formed = not truncated and set(between + after) <= set(SPACE)
    expression, *stated = text[places[2] + len("<answer>") : places[3]].split("=")
    expression = re.sub(f"[{SPACE}]+", " ", expression).strip(" ")
    deepest = max(accumulate((c == "(") - (c == ")") for c in expression), default=0)
    solved = len(expression) <= MAX_EXPRESSION_LENGTH and deepest <= DEEPEST
    solved = solved and [text.strip(SPACE) for text in stated] in ([], [f"{problem.target}"])
    try:
        solved = solved and evaluate(expression) == (problem.target, sorted(problem.numbers))
    except (SyntaxError, ZeroDivisionError):
        solved = False
    return {"format": 0.1 * well_formed, "correct": 1.0 * solved}


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The value of an expression and its numbers, sorted; SyntaxError for any other text. Run by Python itself, with a
    variable for each number."""
    text, numbers = re.sub(f"[{SPACE}]", " ", expression).strip(" "), re.findall("[0-9]+", expression)
    if re.search(r"[^-+*/() 0-9]|[*]{2}|//|\b0[0-9]|\( *\)", text):
        raise SyntaxError(expression)
    try:
        value = eval(re.sub("([0-9]+)", r"n\1", text), {f"n{number}": Fraction(number) for number in numbers})
    except TypeError:  # 2(3)
        raise SyntaxError(expression) from None
    return value, sorted(map(int, numbers))


def random_expression(rng: random.Random, numbers: list[int]) -> str:
    """A random expression that uses each number once, with all manner of signs, parentheses and white space."""
    parts = [rng.choice(FORMS).format(number) for number in numbers]
    while len(parts) > 1:
        i, gaps = rng.randrange(1, len(parts)), rng.choices(["", " ", " ", "  ", "\n", "\t"], k=2)
        joined = parts[i - 1] + gaps[0] + rng.choice("+-*/") + gaps[1] + parts[i]
        parts[i - 1 : i + 1] = [rng.choice(FORMS).format(joined)]
    return parts[0]


def mutate(rng: random.Random, text: str, times: int) -> str:
    """Small edits: cut, double, move, replace or wrap a stretch, or slip a piece in."""
    for _ in range(times):
        i, length = rng.randint(0, len(text)), rng.choice([0, 1, 2, 4, rng.randint(0, len(text))])
        head, stretch, tail = text[:i], text[i : i + length], text[i + length :]
        piece = rng.choice([rng.choice(PIECES), rng.choice("0123456789+-*/()= ")])
        middle = rng.choice(["", stretch * 2, piece, piece + stretch, f"{piece}{stretch})"])
        text = rng.choice([head + tail + stretch, *[head + middle + tail] * 5])
    return text


def hostile_response(rng: random.Random) -> tuple[str, bool, Problem]:
    """(response, truncated, problem): a good response, a damaged one, tags and pieces in any order, a very long one."""
    numbers = [rng.randint(1, rng.choice([3, 20, 20, 999])) for _ in range(rng.randint(2, 6))]
    expression, kind, value = random_expression(rng, numbers), rng.random(), Fraction(1)
    with suppress(ZeroDivisionError):  # then no answer may earn a reward
        value, _ = evaluate(expression)
    if (value.denominator > 1 or value <= 0) and rng.random() < 0.9:
        return hostile_response(rng)  # most problems can be solved
    target = max(1, rng.choice([round, floor, ceil])(value)) + (rng.random() < 0.1)
    if 0.4 < kind < 0.45:
        depth = rng.choice([100, DEEPEST - 5, DEEPEST, DEEPEST + 1])
        expression = rng.choice(["(" * depth + expression + ")" * depth, rng.choice("+-") * 2 * depth + expression])
    expression += rng.choice(["", "", f" = {target}", f"=\n{target}"])
    expression = mutate(rng, expression, rng.randint(1, 3) * (kind < 0.43))
    if kind > 0.97:
        expression += "".join(rng.choices(PIECES, k=2)) * rng.choice([30, 100, 1000, 3000])
    gap = rng.choice(["\n", "\n", " ", "\n\n", "", "\xa0", "so ", "\t\f\v\r"])
    response = f"{rng.choice(THOUGHTS)}</think>{gap}<answer> {expression} </answer>"
    response = mutate(rng, response, rng.randint(1, 4) * (0.5 < kind < 0.75))
    if 0.75 < kind < 0.95:
        pieces = [expression, *TAGS, *rng.choices(PIECES, k=rng.choice([1, 1, 60]))]
        response = "".join(rng.choices(pieces, k=rng.randint(1, len(pieces) + 2)))
    return response, rng.random() < 0.2, Problem(tuple(rng.sample(numbers, len(numbers))), target)


def graded(*case: Any) -> dict[str, float]:
    """`grade`, in linear time: 10 s of the CPU are hundreds of times what it needs."""
    began = time.process_time()
    reward = grade(*case)
    assert time.process_time() - began < 10, f"slow, {len(case[0])} characters: {case!r:.500}"
    return reward


def fuzz(count: int, seed: int) -> Counter[str]:
    """Grade `count` hostile responses. Raises AssertionError with the response that breaks a promise."""
    rng, seen = random.Random(seed), Counter()
    for case in (hostile_response(rng) for _ in range(count)):
        reward = graded(*case)
        assert reward == oracle(*case), f"grade says {reward}, the oracle another: {case!r}"
        solved, length = reward["correct"] > 0, len(case[0])
        seen.update(formed=reward["format"] > 0, solved=solved, deep=solved and length > 300, long=length > 20_000)
    return seen


if __name__ == "__main__":
    print(fuzz(*map(int, [*sys.argv[1:], "0"][:2])))
