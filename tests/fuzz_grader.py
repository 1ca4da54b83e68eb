"""Hostile responses for the grader: what a policy, pushed by a reward, may come to write.

    PYTHONPATH=. python tests/fuzz_grader.py 1000000 [SEED]

Each is graded by `countdown_task.grade` and by an independent oracle, which finds the blocks with `str` methods and
leaves the expression to Python's own parser. The first one on which the grader raises, disagrees or is slow stops it.
"""

import ast
import operator
import random
import re
import sys
import time
import timeit
from collections import Counter
from fractions import Fraction
from itertools import accumulate

from countdown_task import MAX_EXPRESSION_DEPTH, MAX_EXPRESSION_LENGTH, grade
from data_types import Problem, Reward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
SPACE = " \t\n\r\v\f"
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
TEXTS = """<ANSWER> < answer> <answer > </ answer> <answer/> <answ er> <|im_end|> <|im_start|> <|endoftext|> <b> </b>
    ( ) (( )) () + - * / ** // % ^ = == != , . ; : _ & | ~ ! # @ \\ ' " ` { } [ ] $ 0 1 2 3 7 12 007 -1 +1
    1.0 .5 1e3 1_000 0x1F 1j 9999999999999999999999 10**99 9**9**9 True None x lambda:0 __import__('os')
    int(3) ١٢ ３ ² ½ Ⅷ ⅓ × ÷ − ＋ （ ） ＝ ∕ ⁄ é 数 🙂 Let's try so that is too much hit \\boxed{3} \\frac{1}{2}"""  # noqa: RUF001
PIECES = [*TAGS * 3, *TEXTS.split(), *SPACE, "  ", "1 2", "# no\n", *"\0\x1b\x1c\x85\xa0\u2028\u200b\ufeff\u202e\ud800"]
THOUGHTS = ["", "1 + 2 = 3, no", "\n12 - 7 = 5. too low.\n12 + 7 * 3 = 33. yes\n", "Try (a + b) * c < 10 > 4"]


def oracle(response: str, truncated: bool, problem: Problem) -> Reward:
    """What `grade` should say, found another way."""
    text = "<think>" + response
    places = [text.find(tag) for tag in TAGS]
    if any(text.count(tag) != 1 for tag in TAGS) or places != sorted(places):
        return Reward(0.0, 0.0)
    between = text[places[1] + len("</think>") : places[2]]
    well_formed = not truncated and text.endswith("</answer>") and between != "" and set(between) <= set(SPACE)
    return Reward(0.1 * well_formed, 1.0 * solves(text[places[2] + len("<answer>") : places[3]], problem))


def solves(answer: str, problem: Problem) -> bool:
    expression, *stated = answer.split("=")
    expression = re.sub(f"[{SPACE}]", " ", expression.strip(SPACE))  # Python ends a statement at a line break
    deepest = max(accumulate((c == "(") - (c == ")") for c in expression), default=0)
    two_signs = re.search(r"(?:^|[(*/])[-+]{2}|[-+]{3}", expression.replace(" ", ""))  # which Python allows
    too_much = len(expression) > MAX_EXPRESSION_LENGTH or deepest > MAX_EXPRESSION_DEPTH or two_signs
    if too_much or set(expression) - set("0123456789+-*/() "):
        return False
    try:
        right = evaluate(expression) == (problem.target, sorted(problem.numbers))
    except (SyntaxError, KeyError, ZeroDivisionError):
        return False
    return right and [text.strip(SPACE) for text in stated] in ([], [f"{problem.target}"])


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The value of an expression, by Python's own parser, and its numbers, sorted; it may raise a SyntaxError."""
    tree = ast.parse(expression, mode="eval").body
    return value_of(tree), sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


def value_of(node: ast.AST) -> Fraction:
    """The value of a tree of numbers and the four operations; KeyError for any other, such as a call or a power."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        return value_of(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    return SIGNS[type(getattr(node, "op", None))](value_of(node.left), value_of(node.right))


def random_expression(rng: random.Random, numbers: list[int]) -> tuple[str, Fraction | None]:
    """A random expression that uses each number once, and its value (None: it divides by zero)."""
    trees: list[ast.expr] = [ast.Constant(number) for number in numbers]
    while len(trees) > 1:
        i, j = rng.randrange(1, len(trees)), rng.randrange(len(trees))
        if rng.random() < 0.2 and not isinstance(trees[j], ast.UnaryOp):
            trees[j] = ast.UnaryOp(rng.choice([ast.UAdd, ast.USub])(), trees[j])
        trees[i - 1 : i + 1] = [ast.BinOp(trees[i - 1], rng.choice(list(SIGNS))(), trees[i])]
    # written with the parentheses that it needs; needless ones and white space are added
    text = re.sub(r"\d+", lambda found: rng.choice([found[0]] * 9 + [f"({found[0]})"]), ast.unparse(trees[0]))
    text = re.sub(" ", lambda _: rng.choice(["", " ", " ", "  ", "\n", "\t"]), text)
    try:
        return text, value_of(trees[0])
    except ZeroDivisionError:
        return text, None


def mutate(rng: random.Random, text: str, times: int) -> str:
    """Small edits: cut, double, move, replace or wrap a stretch, or slip a piece in."""
    for _ in range(times):
        i, length = rng.randint(0, len(text)), rng.choice([0, 1, 2, 4, rng.randint(0, len(text))])
        head, stretch, tail = text[:i], text[i : i + length], text[i + length :]
        piece = rng.choice([rng.choice(PIECES), rng.choice("0123456789+-*/()= ")])
        middles = ["", stretch + stretch, piece, piece + stretch, f"{piece}{stretch})"]
        text = rng.choice([head + tail + stretch, *[head + middle + tail for middle in middles]])
    return text


def hostile_response(rng: random.Random) -> tuple[str, bool, Problem]:
    """(response, truncated, problem): a good response, a damaged one, tags and pieces in any order, a very long one."""
    numbers = [rng.randint(1, 20 if rng.random() < 0.7 else 999) for _ in range(rng.randint(2, 6))]
    expression, value = random_expression(rng, numbers)
    if value is None or ((value.denominator > 1 or value <= 0) and rng.random() < 0.8):
        return hostile_response(rng)  # most problems can be solved
    target, kind = abs(round(value)) + (rng.random() < 0.1), rng.random()
    expression += rng.choice(["", "", f" = {target}", f"=\n{target}"])
    expression = mutate(rng, expression, rng.randint(1, 3) * (kind < 0.4))
    if kind > 0.97:
        expression = rng.choice(["", expression]) + "".join(rng.choices(PIECES, k=2)) * rng.choice([30, 1000, 3000])
    gap = rng.choice(["\n", "\n", " ", "\n\n", "", "\xa0", "so ", "\t\f\v\r"])
    response = f"{rng.choice(THOUGHTS)}</think>{gap}<answer> {expression} </answer>"
    response = mutate(rng, response, rng.randint(1, 4) * (0.5 < kind < 0.75))
    if 0.75 < kind < 0.95:
        pieces = [expression, *TAGS, *rng.choices(PIECES, k=rng.choice([1, 1, 60]))]
        response = "".join(rng.choices(pieces, k=rng.randint(1, len(pieces) + 2)))
    return response, rng.random() < 0.2, Problem(tuple(rng.sample(numbers, len(numbers))), target)


def is_fast(case: tuple[str, bool, Problem]) -> bool:
    """Whether grading takes at most 10 ms of CPU time per 10 kB; other processes do not count."""
    return timeit.timeit(lambda: grade(*case), timer=time.process_time, number=1) <= 1e-6 * max(10_000, len(case[0]))


def fuzz(count: int, seed: int) -> Counter[str]:
    """Grade `count` hostile responses. Raises AssertionError with the response that breaks a promise."""
    rng, seen = random.Random(seed), Counter()
    for _ in range(count):
        case = hostile_response(rng)
        reward = grade(*case)
        assert reward == oracle(*case), f"grade says {reward}, the oracle another: {case!r}"
        assert is_fast(case), f"slow, {len(case[0])} characters: {case!r:.500}"
        seen.update(solved=reward.correct == 1.0, well_formed=reward.format == 0.1, long=len(case[0]) > 20_000)
    return seen


if __name__ == "__main__":
    print(fuzz(*map(int, [*sys.argv[1:], "0"][:2])))
