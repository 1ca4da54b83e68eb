"""Hostile answers for the grader: what a policy, pushed by a reward, may come to write.

    python tests/fuzz_grader.py 1000000 [SEED]

Each answer is graded by `countdown_task.grade` and by the independent oracle below, which finds the blocks
with `str` methods and leaves the expression to Python's own parser. The run stops at the first answer on
which the grader raises, disagrees with the oracle, or takes more than 10 ms per 10 kB in each of three tries.
"""

import ast
import operator
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from countdown_task import MAX_EXPRESSION_DEPTH, MAX_EXPRESSION_LENGTH, Reward, grade  # noqa: E402
from data_types import Problem  # noqa: E402

WHITE_SPACE = " \t\n\r\v\f"
OPERATORS = {
    "+": (ast.Add, operator.add),
    "-": (ast.Sub, operator.sub),
    "*": (ast.Mult, operator.mul),
    "/": (ast.Div, operator.truediv),
}
BINARY = dict(OPERATORS.values())

# ------------------------------------------------------------------------------------------ the oracle


def oracle(response: str, ended: bool, problem: Problem) -> Reward:
    """What `grade` should say, found another way."""
    text = "<think>" + response
    places = [text.find(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    counts = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if counts != [1, 1, 1, 1] or places != sorted(places):
        return Reward(0.0, 0.0)
    between = text[places[1] + len("</think>") : places[2]]
    answer = text[places[2] + len("<answer>") : places[3]]
    well_formed = ended and text.endswith("</answer>") and between != "" and set(between) <= set(WHITE_SPACE)
    return Reward(0.1 * well_formed, 1.0 * solves(answer, problem))


def solves(answer: str, problem: Problem) -> bool:
    if answer.count("=") > 1:
        return False
    expression, *stated = answer.split("=")
    if stated and stated[0].strip(WHITE_SPACE) != f"{problem.target}":
        return False
    expression = expression.strip(WHITE_SPACE)
    if len(expression) > MAX_EXPRESSION_LENGTH or set(expression) - set("0123456789+-*/()" + WHITE_SPACE):
        return False
    for space in WHITE_SPACE:  # Python ends a statement at a line break; the task does not
        expression = expression.replace(space, " ")
    bare = expression.replace(" ", "")
    if re.search(r"(?:^|[(*/])[-+]{2}|[-+]{3}", bare):  # Python allows many signs, the task one
        return False
    depth = deepest = 0
    for character in bare:
        depth += {"(": 1, ")": -1}.get(character, 0)
        deepest = max(depth, deepest)
    if deepest > MAX_EXPRESSION_DEPTH:
        return False
    try:
        tree = ast.parse(expression, mode="eval").body
        used: list[int] = []
        return value_of(tree, used) == problem.target and sorted(used) == sorted(problem.numbers)
    except (SyntaxError, TypeError, ZeroDivisionError):
        return False


def value_of(node: ast.AST, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant):
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        value = value_of(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return BINARY[type(node.op)](value_of(node.left, used), value_of(node.right, used))
    raise TypeError(f"{type(node).__name__} is no part of the task's expressions")  # a call, a power, //


# ------------------------------------------------------------------------------------ random expressions


def random_expression(rng: random.Random, numbers: list[int]) -> tuple[str, Fraction | None]:
    """A random expression that uses each number once, and its value (None: it divides by zero).

    The value is computed along the tree, the text printed with the brackets the tree needs, random needless
    ones, random signs and random spaces.
    """
    text, value, _ = random_tree(rng, numbers)
    return text, value


def random_tree(rng: random.Random, numbers: list[int]) -> tuple[str, Fraction | None, str]:
    """Also returns the last operation, or "" for what needs no brackets anywhere."""
    if len(numbers) == 1:
        text, value, last = str(numbers[0]), Fraction(numbers[0]), ""
    else:
        cut = rng.randrange(1, len(numbers))
        left, a, left_last = random_tree(rng, numbers[:cut])
        right, b, right_last = random_tree(rng, numbers[cut:])
        last = rng.choice("+-*/")
        if last in "*/" and left_last in ("+", "-"):
            left = f"({left})"
        if (last in "*/" and right_last in ("+", "-")) or (last in "-/" and right_last):
            right = f"({right})"
        spaces = [rng.choice(["", "", " ", " ", "  ", "\n", "\t"]) for _ in range(2)]
        text = left + spaces[0] + last + spaces[1] + right
        if a is None or b is None or (last == "/" and b == 0):
            value = None
        else:
            value = OPERATORS[last][1](a, b)
    if rng.random() < 0.15:
        text, last = f"({text})", ""
    if rng.random() < 0.15:
        sign = rng.choice("+-")
        text = f"({sign}({text}))" if last or text[0] in "+-" else f"({sign}{text})"
        last = ""
        if sign == "-" and value is not None:
            value = -value
    return text, value, last


def random_puzzle(rng: random.Random) -> tuple[Problem, str]:
    """A problem and an expression for it, which solves it most of the time."""
    while True:
        numbers = [rng.randint(1, 20 if rng.random() < 0.7 else 999) for _ in range(rng.randint(2, 6))]
        text, value = random_expression(rng, numbers)
        if value is None:
            continue
        solvable = value.denominator == 1 and value > 0
        if not solvable and rng.random() < 0.8:
            continue
        target = int(value) if solvable else abs(round(value)) + 1
        if rng.random() < 0.1:
            target += 1
        return Problem(tuple(rng.sample(numbers, len(numbers))), target), text


# ---------------------------------------------------------------------------------------- hostile answers

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = TAGS * 3 + """
    <ANSWER> < answer> <answer > </ answer> <answer/> <answ er> <|im_end|> <|im_start|> <|endoftext|> <b> </b>
    ( ) (( )) () + - * / ** // % ^ = == != , . ; : _ & | ~ ! # @ \\ ' " ` { } [ ] $ 0 1 2 3 7 12 007 -1 +1
    1.0 .5 1e3 1_000 0x1F 1j 9999999999999999999999 10**99 9**9**9 True None x lambda:0 __import__('os')
    int(3) ١٢ ３ ² ½ Ⅷ ⅓ × ÷ − ＋ （ ） ＝ ∕ ⁄ é 数 🙂 Let's try so that is too much hit \\boxed{3} \\frac{1}{2}
""".split() + [" ", "  ", "\n", "\t", "\r\n", "\v", "\f", "\x00", "\x1b[31m", "\x1c", "\x85", "\xa0",
               "\u2028", "\u200b", "\ufeff", "\u202e", "\ud800", "1 2", "# comment\n"]  # fmt: skip
THOUGHTS = [
    "",
    "1 + 2 = 3, no",
    "\n12 - 7 = 5, 5 * 3 = 15. too low.\n12 + 7 * 3 = 33. that is it!\n",
    "We need the numbers to make the target. Try (a + b) * c first; then a * b - c < 10 > 4.",
]


def mutate(rng: random.Random, text: str) -> str:
    """One small edit: cut, double, move or replace a stretch, or slip a piece in."""
    i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
    if rng.random() < 0.7:
        j = min(j, i + rng.randint(0, 4))
    edits = (
        lambda: text[:i] + text[j:],
        lambda: text[:j] + text[i:],
        lambda: text[:i] + text[j:] + text[i:j],
        lambda: text[:i] + rng.choice(PIECES) + text[j:],
        lambda: text[:i] + rng.choice(PIECES) + text[i:],
        lambda: text[:i] + rng.choice("0123456789+-*/()= ") + text[i:],
        lambda: text[:i] + rng.choice("()+-") + text[i:j] + rng.choice("()") + text[j:],
    )
    return rng.choice(edits)()


def hostile_answer(rng: random.Random) -> tuple[str, bool, Problem]:
    """(response, ended, problem).

    A good answer, one damaged in its expression or anywhere, a salad of pieces, tags in any order, or pieces
    repeated thousands of times.
    """
    problem, expression = random_puzzle(rng)
    if rng.random() < 0.3:
        expression += rng.choice([" = ", "=", "=\n"]) + str(problem.target)
    kind = rng.random()
    if kind < 0.4:
        for _ in range(rng.randint(1, 3)):
            expression = mutate(rng, expression)
    if kind > 0.97:
        pieces = [rng.choice(PIECES) for _ in range(rng.randint(1, 3))]
        expression = rng.choice(["", expression]) + "".join(pieces) * rng.choice([30, 1000, 3000])
    gap = rng.choice(["\n", "\n", " ", "\n\n", "", "\xa0", "so ", "\t\f\v\r"])
    response = f"{rng.choice(THOUGHTS)}</think>{gap}<answer> {expression} </answer>"
    if 0.5 < kind < 0.75:
        for _ in range(rng.randint(1, 4)):
            response = mutate(rng, response)
    elif 0.75 < kind < 0.85:
        response = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 60)))
    elif 0.85 < kind < 0.95:
        blocks = [expression, rng.choice(PIECES), *TAGS]
        response = "".join(rng.choice(blocks) for _ in range(rng.randint(1, 8)))
    return response, rng.random() < 0.8, problem


def seconds(response: str, ended: bool, problem: Problem) -> float:
    """How long one grading takes."""
    start = time.perf_counter()
    grade(response, ended, problem)
    return time.perf_counter() - start


def time_limit(response: str) -> float:
    """10 ms for each 10 kB begun."""
    return 0.010 * max(1.0, len(response) / 10_000)


def fuzz(count: int, seed: int) -> dict[str, float]:
    """Grade `count` hostile answers. Raises AssertionError with the answer that breaks a promise."""
    rng = random.Random(seed)
    seen = {"answers": count, "solved": 0, "well formed": 0, "both": 0, "slowest ms": 0.0, "longest": 0}
    for _ in range(count):
        case = hostile_answer(rng)
        reward, expected, took = grade(*case), oracle(*case), seconds(*case)
        assert reward == expected, f"grade says {reward}, the oracle {expected}: {case!r}"
        if took > time_limit(case[0]):  # the machine may have been busy elsewhere
            took = min(seconds(*case) for _ in range(3))
        assert took <= time_limit(case[0]), f"{took * 1000:.1f} ms, {len(case[0])} characters: {case!r:.500}"
        seen["solved"] += reward.correct == 1.0
        seen["well formed"] += reward.format == 0.1
        seen["both"] += reward.total == 1.1
        seen["slowest ms"] = max(seen["slowest ms"], took * 1000)
        seen["longest"] = max(seen["longest"], len(case[0]))
    return seen


if __name__ == "__main__":
    started = time.perf_counter()
    for name, value in fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0).items():
        print(f"{name:>12}: {value:,.6g}")
    print(f"{'seconds':>12}: {time.perf_counter() - started:,.0f}")
