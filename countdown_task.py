"""The Countdown task: the question put to the model, the reward for its answer, and the problems.

A problem is a few numbers and a target: from [3, 7, 12] make 33, using each number once: `12 + 7 * 3`.
Finding an expression takes search, arithmetic and checking; judging one takes the small program below. That
is all the reward this trainer needs: no reward model, no judge, no labelled steps.

    question_text, ASSISTANT_PREFIX     how a problem is put to the model
    grade                               what a response earns: format 0.1, correctness 1.0
    load_problems, Settings             problems from parquet files, and which of them to keep
    problem_key                         which problems are copies of each other
    problem_kind, examine               what evaluate.py reports

What the model writes is hostile input: millions of samples pushed towards whatever `grade` says yes to. So nothing is
ever run: Python's parser turns an expression into a syntax tree, after its alphabet, its length and its numbers have
been checked, and only the four operations are read from that tree.

Left out: credit for near misses (the policy would learn to come close instead of solving) and the television game's
rule that some numbers may stay unused (the public data set does not have it).
"""

import ast
import operator
import re
import string
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pandas

from data_types import DataSettings, UserError, setting
from hub import one_line
from terminal import warn

# ---- The question ----------------------------------------------------------------------------------------------------

# Opens the assistant's turn and is part of the prompt: what the model samples goes on right after `<think>`.
ASSISTANT_PREFIX = "Let me solve this step by step.\n<think>"


@dataclass(frozen=True)
class Problem:
    """Reach `target` with + - * / and parentheses, using each of `numbers` exactly once."""

    numbers: tuple[int, ...]
    target: int


def question_text(problem: Problem) -> str:
    """The user's message: the same words for every model, tiny or large.

    The example shows the form in digits, since models copy letters; its numbers are larger than usual ones.
    """
    return (
        f"Using the numbers {list(problem.numbers)}, write an expression that equals {problem.target}. Use each number "
        "exactly once. You may use + - * / and parentheses. Think inside <think> </think>, then give only the "
        "expression inside <answer> </answer>, for example <answer>(210 + 330) / 180</answer>."
    )


# ---- The reward ------------------------------------------------------------------------------------------------------

SCORE = "correct"
TAG = re.compile(r"</?(?:think|answer)>")
TAGS_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]
WHITE_SPACE = re.compile(r"\s+", re.ASCII)
EXPRESSION_ALPHABET = re.compile(r"[0-9+\-*/()\s]*", re.ASCII)
NUMBER = re.compile(r"[0-9]+")
OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS: dict[type, Any] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
MAX_EXPRESSION_LENGTH = 500  # characters; six numbers need some 50


def grade(response: str, truncated: bool, problem: Problem) -> dict[str, float]:
    """Grade what was sampled after `ASSISTANT_PREFIX` (the whole answer is "<think>" + response).

    `truncated` says whether the length limit cut it: then it earns no format reward, but a right answer still counts.
    The end token is not part of `response`. Never raises, whatever the text, and takes time linear in its length.

    >>> grade("3 + 4 = 7, no. 12 + 21 = 33</think> <answer>12 + 7 * 3</answer>", False, Problem((3, 7, 12), 33))
    {'format': 0.1, 'correct': 1.0}
    """
    text = "<think>" + response
    # Each tag once and in this order, or the response earns nothing: a second answer, a tag inside another's block or
    # an answer given while still thinking are ways to hedge, and hedging must not pay.
    if TAG.findall(text) != TAGS_IN_ORDER:
        return {"format": 0.0, "correct": 0.0}
    _, _thoughts, between, answer, after = TAG.split(text)
    well_formed = not truncated and not WHITE_SPACE.sub("", between) and not after
    return {"format": 0.1 * well_formed, "correct": 1.0 * _is_solution(answer, problem)}


def _is_solution(answer: str, problem: Problem) -> bool:
    """Whether the text is an expression that solves the problem, with or without "= target" after it."""
    expression, equals, stated = answer.partition("=")
    if equals and stated.strip(string.whitespace) != str(problem.target):
        return False
    return evaluate_expression(expression, problem.numbers) == problem.target


def evaluate_expression(text: str, numbers: tuple[int, ...]) -> Fraction | None:
    """The exact value of an expression that uses each of `numbers` exactly once, or None for any other text."""
    text = WHITE_SPACE.sub(" ", text).strip(" ")
    if len(text) > MAX_EXPRESSION_LENGTH or not EXPRESSION_ALPHABET.fullmatch(text):
        return None
    # Numbers are compared as they are written, before any is read, so neither 9999999999 nor 007 nor a seventh operand
    # can cost anything: what is left to evaluate has as many operations as the problem allows.
    if sorted(NUMBER.findall(text)) != sorted(map(str, numbers)):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, MemoryError, RecursionError):  # the last two: nested too deep
        return None


def _value(node: ast.expr) -> Fraction:
    """The exact value of a syntax tree; SyntaxError where it holds more than + - * / and numbers."""
    match node:
        case ast.Constant(int(value)):
            return Fraction(value)
        case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
            return OPERATIONS[type(operation)](_value(left), _value(right))
        case ast.UnaryOp(operation, operand) if type(operation) in SIGNS:
            return SIGNS[type(operation)](_value(operand))
    raise SyntaxError("not an expression of the task")


# ---- Problems from parquet -------------------------------------------------------------------------------------------

MAX_NUMBER = 1_000_000  # of a problem's numbers and its target; more is a mistake in the data, not a puzzle


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """The task, where its problems are, and which of them to keep."""

    fewest_numbers: int = setting(2, "problems with at least this many numbers", at_least=2, at_most=6)
    most_numbers: int = setting(6, "problems with at most this many numbers", at_least=2, at_most=6)
    target_low: int = setting(1, "problems with a target of at least this", at_least=1)
    target_high: int = setting(1_000_000, "problems with a target of at most this", at_least=1)


def load_problems(data: Settings) -> list[Problem]:
    """The problems of a parquet file, or of all parquet files in a folder.

    The files hold the columns `nums` (lists of 2 to 6 positive integers) and `target` (positive integers). Rows that
    break this are dropped, counted and the first is shown. What passes the filters in `data` is kept. Raises UserError
    when a file cannot be read or no row is left.
    """
    if not data.path:
        raise UserError("data.path is missing: a file, folder or hub id of a data set with the columns nums and target")
    path = Path(data.path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*.parquet") if file.is_file())
    if not files:
        raise UserError(f"{path}: holds no .parquet file: give data.path a file, a folder or a data set that has one")
    problems = [problem for file in files for problem in _read_parquet(file)]
    counts, targets = (data.fewest_numbers, data.most_numbers), (data.target_low, data.target_high)
    kept = [p for p in problems if counts[0] <= len(p.numbers) <= counts[1] and targets[0] <= p.target <= targets[1]]
    if not kept:
        filters = "data.fewest_numbers, data.most_numbers, data.target_low or data.target_high"
        raise UserError(f"{data.path}: none of its {len(problems)} problems passes the filters: widen {filters}")
    return kept


def _read_parquet(file: Path) -> list[Problem]:
    try:
        table = pandas.read_parquet(file, columns=["nums", "target"])
        rows = list(zip(table["nums"].tolist(), table["target"].tolist(), strict=True))
    except Exception as error:  # a damaged file comes out as almost any kind of error
        raise UserError(f"{file}: not a parquet file with columns nums and target ({one_line(error)})") from error
    found = [_problem_from_row(row) for row in rows]
    problems = [problem for problem in found if problem]
    bad = f"row {found.index(None)}, {rows[found.index(None)]!a:.80}" if None in found else "no row"
    if not problems:
        rule = f"nums must be 2 to 6 whole numbers from 1 to {MAX_NUMBER:,}, and target another"
        raise UserError(f"{file}: holds no problem: {rule}; found {bad}")
    if len(problems) < len(rows):
        # as a UserError, which is one line whatever the rows hold
        warn(str(UserError(f"{file}: dropped {len(rows) - len(problems)} of {len(rows)} rows, such as {bad}")))
    return problems


def _problem_from_row(row: tuple[object, object]) -> Problem | None:
    """The problem of a row of parquet, None where it is not one."""
    numbers, target = row
    if not isinstance(numbers, numpy.ndarray) or not 2 <= len(numbers) <= 6:
        return None
    values = [*numbers.tolist(), target]
    # one empty cell is enough for pandas to read a whole column as floats
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    if not all(type(value) is int and 1 <= value <= MAX_NUMBER for value in values):
        return None
    return Problem(tuple(values[:-1]), values[-1])


def problem_key(problem: Problem) -> str:
    """The same for the same target and the same numbers in any order."""
    return f"{sorted(problem.numbers)} {problem.target}"


# ---- For evaluate.py -------------------------------------------------------------------------------------------------


def problem_kind(problem: Problem) -> str:
    return f"{len(problem.numbers)} numbers"


TRY = re.compile(r"N([-+*/])N=N, N([-+*/])N=N (yes|no)".replace("N", r"(\d{1,9})"), re.ASCII)


def examine(texts: list[str], problems: list[Problem]) -> dict[str, float]:
    """How tiny/ and what is trained from it thinks, from lines such as `12*3=36, 36+7=43 no` (make_tiny.py).

    The tries per response, and the shares of right equations and of true claims (`yes` where the target is reached).
    """
    tries = [(found, problem) for text, problem in zip(texts, problems, strict=True) for found in TRY.findall(text)]
    right = [_is_right(*found[i : i + 4]) for found, _ in tries for i in (0, 4)]
    claims = {word: [int(f[7]) == p.target for f, p in tries if f[8] == word] for word in ("yes", "no")}
    return {
        "tries per response": len(tries) / len(texts),
        "equations right": sum(right) / max(1, len(right)),
        "`yes` true": sum(claims["yes"]) / max(1, len(claims["yes"])),
        "`no` true": 1 - sum(claims["no"]) / max(1, len(claims["no"])),
    }


def _is_right(a: str, sign: str, b: str, result: str) -> bool:
    x, y, z = int(a), int(b), int(result)
    return z * y == x and y != 0 if sign == "/" else z == {"+": x + y, "-": x - y, "*": x * y}[sign]
