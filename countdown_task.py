"""The Countdown task: the question put to the model, the reward for its answer, and the problems.

A problem is a few numbers and a target: from [3, 7, 12] make 33, using each number once: `12 + 7 * 3`.
Finding an expression takes search, arithmetic and checking; judging one takes the small program below. That
is all the reward this trainer needs: no reward model, no judge, no labelled steps.

    question_text, ASSISTANT_PREFIX     how a problem is put to the model
    grade                               a response's Reward: format 0.1, correctness 1.0
    load_problems                       problems from parquet files and hub data
    split_problems, problem_order       what is held out, and in which order the rest is trained on

What the model writes is hostile input: millions of samples pushed towards whatever `grade` says yes to. So nothing is
ever run: Python's parser turns an expression into a syntax tree, after its alphabet, its length and its numbers have
been checked, and only the four operations are read from that tree.

Left out: credit for near misses (the policy would learn to come close instead of solving) and the television game's
rule that some numbers may stay unused (the public data set does not have it).
"""

import ast
import hashlib
import operator
import os
import random
import re
import string
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pandas

from data_types import DataSettings, Problem, Reward, UserError
from hub import HUB_ID, download, one_line
from terminal import say

# ---- The question ----------------------------------------------------------------------------------------------------

# Opens the assistant's turn and is part of the prompt: what the model samples goes on right after `<think>`.
ASSISTANT_PREFIX = "Let me solve this step by step.\n<think>"


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


def grade(response: str, truncated: bool, problem: Problem) -> Reward:
    """Grade what was sampled after `ASSISTANT_PREFIX` (the whole answer is "<think>" + response).

    `truncated` says whether the length limit cut it: then it earns no format reward, but a right answer still counts.
    The end token is not part of `response`. Never raises, whatever the text, and takes time linear in its length.

    >>> grade("3 + 4 = 7, no. 12 + 21 = 33</think> <answer>12 + 7 * 3</answer>", False, Problem((3, 7, 12), 33))
    Reward(format=0.1, correct=1.0)
    """
    text = "<think>" + response
    # Each tag once and in this order, or the response earns nothing: a second answer, a tag inside another's block or
    # an answer given while still thinking are ways to hedge, and hedging must not pay.
    if TAG.findall(text) != TAGS_IN_ORDER:
        return Reward(format=0.0, correct=0.0)
    _, _thoughts, between, answer, after = TAG.split(text)
    well_formed = not truncated and not WHITE_SPACE.sub("", between) and not after
    return Reward(format=0.1 if well_formed else 0.0, correct=1.0 if _is_solution(answer, problem) else 0.0)


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


def find_problems(data: DataSettings) -> Path:
    """The file or folder `data.path`, or for a hub id ("owner/name") the hub's copy, fetched if need be."""
    path = Path(data.path)
    if os.path.isfile(path) or os.path.isdir(path):
        return path
    if not HUB_ID.fullmatch(data.path) or path.suffix == ".parquet":
        raise UserError(f"{data.path}: no such file or folder, nor a hub data set (owner/name): set data.path")
    return download("data", data.path, data.revision, ["*.parquet"])


def load_problems(data: DataSettings) -> list[Problem]:
    """The problems of a parquet file, of all parquet files in a folder, or of a hub data set ("owner/name").

    The files hold the columns `nums` (lists of 2 to 6 positive integers) and `target` (positive integers). Rows that
    break this are dropped, counted and the first is shown. What passes the filters in `data` is kept. Raises UserError
    when a file cannot be read or no row is left.
    """
    path = find_problems(data)
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
        say(str(UserError(f"{file}: dropped {len(rows) - len(problems)} of {len(rows)} rows, such as {bad}")))
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


# ---- The split and the order -----------------------------------------------------------------------------------------


def split_problems(problems: list[Problem], held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Split into (train, held out): `held_out` different problems of which training has no copy.

    Rows with the same target and the same numbers in any order are one problem, named by its key. Keys are
    held out in the order of their hashes, whatever the order of the rows, so that a filter, too, moves as few
    problems as it can from one side to the other.
    """
    by_key: dict[str, Problem] = {}
    for problem in problems:
        twin = by_key.setdefault(_key(problem), problem)
        if problem.numbers < twin.numbers:
            by_key[_key(problem)] = problem
    if len(by_key) <= held_out:
        cures = "lower data.held_out, widen the data's filters or use more data"
        raise UserError(f"{len(by_key)} different problems are too few to hold out {held_out} of them: {cures}")
    chosen = sorted(by_key, key=lambda key: hashlib.sha256(key.encode()).digest())[:held_out]
    taken = set(chosen)
    return [p for p in problems if _key(p) not in taken], [by_key[key] for key in chosen]


def _key(problem: Problem) -> str:
    return f"{sorted(problem.numbers)} {problem.target}"


def problem_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count): the order in which an epoch visits the problems."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeded by a text: (1, 23) and (12, 3) stay apart
    return order
