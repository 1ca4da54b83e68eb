"""The Countdown task: the question put to the model, the reward for its answer, and the problems.

A problem is a few numbers and a target: from [3, 7, 12] make 33, using each number once: `12 + 7 * 3`.
Finding an expression takes search, arithmetic and checking; judging one takes the small program below. That
is all the reward this trainer needs: no reward model, no judge, no labelled steps.

    question_text, ASSISTANT_PREFIX     how a problem is put to the model
    grade                               what a response earns: format 0.1, correctness 1.0
    load_problems, Settings             problems from parquet files, and which of them to keep
    problem_key                         which problems are copies of each other

What the model writes is hostile input: millions of samples pushed towards whatever `grade` says yes to. So nothing is
ever run: Python's parser turns an expression into a syntax tree, after its alphabet, its length and its numbers have
been checked, and only the four operations are read from that tree.

Left out: credit for near misses (the policy would learn to come close instead of solving) and the television game's
rule that some numbers may stay unused (the public data set does not have it).
"""

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from data_types import DataSettings, setting
from plumbing.tasks import read_problems
from plumbing.terminal import UserError

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
        f"Using the numbers {list(problem.numbers)}, write an expression that equals {problem.target}. "
        "Use each number exactly once. You may use + - * / and parentheses. Think inside <think> </think>, "
        "then give only the expression inside <answer> </answer>, for example "
        "<answer>(210 + 330) / 180</answer>."
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
    well_formed = not truncated and not WHITE_SPACE.sub("", between + after)
    return {"format": 0.1 * well_formed, "correct": 1.0 * _is_solution(answer, problem)}


def _is_solution(answer: str, problem: Problem) -> bool:
    """Whether the text is an expression that solves the problem, with or without "= target" after it."""
    expression, equals, stated = answer.partition("=")
    if equals and stated.strip(" \t\n\r\v\f") != str(problem.target):
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
    except (SyntaxError, ZeroDivisionError, MemoryError, RecursionError):  # nested too deep
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


# ---- Problems from parquet -----------------------------------------------------------------------------------

MAX_NUMBER = 1_000_000  # of numbers and target; more is a mistake in the data, not a puzzle


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """The task, where its problems are, and which of them to keep."""

    most_numbers: int = setting(6, "problems with at most so many numbers", at_least=2, at_most=6)
    target_high: int = setting(1_000_000, "problems with a target of at most this", at_least=1)
    columns: str = setting("nums/numbers,target/goal", "the two columns' names", "[^,]+,[^,]+")


def load_problems(data: Settings) -> list[Problem]:
    """The problems of the parquet files at `data.path` that pass the filters in `data`.

    The files hold the columns `nums` (lists of 2 to 6 positive integers) and `target` (positive integers), or others
    that `data.columns` names. Raises UserError when a file cannot be read or no problem is left.
    """
    problems = read_problems(data, data.columns, problem_from_row)
    kept = [p for p in problems if len(p.numbers) <= data.most_numbers and p.target <= data.target_high]
    if not kept:
        raise UserError(f"{data.path}: no problem passes data.most_numbers and data.target_high: raise them")
    return kept


def problem_from_row(numbers: Any, target: Any) -> Problem | None:
    """The problem of a row of parquet, None where it is not one."""
    if not isinstance(numbers, list) or not 2 <= len(numbers) <= 6:
        return None
    # one empty cell is enough for pandas to write a whole column as floats
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in (*numbers, target)]
    if {*map(type, values)} != {int} or not 1 <= min(values) <= max(values) <= MAX_NUMBER:
        return None
    return Problem(tuple(values[:-1]), values[-1])


def problem_key(problem: Problem) -> str:
    """The same for the same target and the same numbers in any order."""
    return f"{sorted(problem.numbers)} {problem.target}"
