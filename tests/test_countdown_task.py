"""The Countdown task: the reward clause by clause, hostile answers, problems, their files and their split."""

import errno
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from fuzz_grader import fuzz, random_expression, seconds, time_limit
from small_hub import small_hub

import hub
from countdown_task import (
    ASSISTANT_PREFIX,
    MAX_EXPRESSION_DEPTH,
    MAX_EXPRESSION_LENGTH,
    evaluate_expression,
    grade,
    load_problems,
    problem_order,
    question_text,
    split_problems,
)
from data_types import Problem, UserError
from make_tiny import generate_problems, reachable_values

ROOT = Path(__file__).resolve().parents[1]
PUZZLE = Problem((3, 7, 12), 33)  # 12 + 7 * 3
SOLUTION = "12 + 7 * 3"


# ------------------------------------------------------------------------------------------ the question


def test_the_question_names_the_problem_and_nothing_else_has_digits():
    """A digit elsewhere would cost the tiny tokenizer a token, and an example with numbers is copied."""
    text = question_text(PUZZLE)
    assert re.fullmatch(r"\D*\[3, 7, 12\]\D{1,30}33\D*", text)
    for needed in ("+ - * /", "exactly once", "<think> </think>", "<answer> </answer>"):
        assert needed in text
    other = question_text(Problem((15, 2), 100))
    assert text.replace("[3, 7, 12]", "[15, 2]").replace("33", "100") == other
    assert "\n" not in text and len(text) < 400


def test_the_assistant_opens_the_think_block():
    assert ASSISTANT_PREFIX == "Let me solve this step by step.\n<think>"


# ---------------------------------------------------------------------------------- the reward, by clause


def answered(answer: str) -> str:
    return f"12 - 7 is 5, too low</think>\n<answer>{answer}</answer>"


FORMAT_CASES = [  # what was sampled after "<think>", whether it ended, format, correct
    ("all in order", answered(SOLUTION), True, 0.1, 1.0),
    ("the answer need not be right", answered("3 + 7"), True, 0.1, 0.0),
    ("nor an expression", answered("I give up"), True, 0.1, 0.0),
    ("nor be there", answered(""), True, 0.1, 0.0),
    ("no thoughts at all", f"</think> <answer>{SOLUTION}</answer>", True, 0.1, 1.0),
    ("any white space between", f"</think>\r\n \t\n<answer>{SOLUTION}</answer>", True, 0.1, 1.0),
    ("no white space between", f"</think><answer>{SOLUTION}</answer>", True, 0.0, 1.0),
    ("words between", f"</think> so: <answer>{SOLUTION}</answer>", True, 0.0, 1.0),
    ("a no-break space is not white space", f"</think>\xa0<answer>{SOLUTION}</answer>", True, 0.0, 1.0),
    ("truncated after the answer", answered(SOLUTION), False, 0.0, 1.0),
    ("text after the answer", answered(SOLUTION) + " done", True, 0.0, 1.0),
    ("a line break after the answer", answered(SOLUTION) + "\n", True, 0.0, 1.0),
    ("an end token written out", answered(SOLUTION) + "<|im_end|>", True, 0.0, 1.0),
    ("truncated in the answer", f"</think>\n<answer>{SOLUTION}", False, 0.0, 0.0),
    ("truncated in the closing tag", f"</think>\n<answer>{SOLUTION}</answer", False, 0.0, 0.0),
    ("the answer block is left open", f"</think>\n<answer>{SOLUTION}", True, 0.0, 0.0),
    ("the answer block is never opened", f"</think>\n{SOLUTION}</answer>", True, 0.0, 0.0),
    ("the think block is left open", f"so <answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("no tags", SOLUTION, True, 0.0, 0.0),
    ("nothing", "", True, 0.0, 0.0),
    ("the answer inside the thoughts", f"<answer>{SOLUTION}</answer></think>", True, 0.0, 0.0),
    ("the answer before the thoughts close", f"<answer>{SOLUTION}</answer></think>\n", True, 0.0, 0.0),
    ("half in the thoughts", f"<answer></think>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("two answers, both right", answered(SOLUTION) + f"\n<answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("two answers, the first right", answered(SOLUTION) + "<answer>3</answer>", True, 0.0, 0.0),
    ("two answers, the last right", answered("3") + f"<answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("an answer in thought", f"<answer>3</answer></think>\n<answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("nested answers", answered(f"<answer>{SOLUTION}</answer>"), True, 0.0, 0.0),
    ("a second opening tag", answered(f"<answer>{SOLUTION}"), True, 0.0, 0.0),
    ("a second closing tag", answered(SOLUTION) + "</answer>", True, 0.0, 0.0),
    ("thoughts in the answer", answered(f"<think>{SOLUTION}</think>"), True, 0.0, 0.0),
    ("the think tag repeated", f"<think></think>\n<answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("the think block closed twice", f"</think></think>\n<answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("two think blocks", f"</think><think></think>\n<answer>{SOLUTION}</answer>", True, 0.0, 0.0),
    ("a think block after", answered(SOLUTION) + "<think></think>", True, 0.0, 0.0),
    ("the closing tag first", f"</think></answer>{SOLUTION}<answer>", True, 0.0, 0.0),
    ("tags are written small", f"</think>\n<ANSWER>{SOLUTION}</ANSWER>", True, 0.0, 0.0),
    ("almost tags do not count",
     f"< think> <answer > <Answer> </ think></think>\n<answer>{SOLUTION}</answer>",
     True, 0.1, 1.0),
    ("nor do sums in the thoughts",
     f"3 + 7 = 10 == 9 ** 9</think>\n<answer>{SOLUTION}</answer>", True, 0.1, 1.0),
    ("the solution only in the thoughts", f"{SOLUTION} = 33</think>\n<answer>3 + 7</answer>", True, 0.1, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("case", FORMAT_CASES, ids=[case[0] for case in FORMAT_CASES])
def test_format(case):
    _, response, ended, form, correct = case
    reward = grade(response, ended, PUZZLE)
    assert (reward.format, reward.correct, reward.total) == (form, correct, form + correct)


EXPRESSION_CASES = [  # numbers, target, the answer's text, whether it is right
    ((3, 7, 12), 33, "12 + 7 * 3", True),
    ((12, 3, 7), 33, "7*3+12", True),
    ((3, 7, 12), 33, "\n\t( 12 + (7) * 3 )\r\n", True),
    ((3, 7, 12), 57, "(12 + 7) * 3", True),
    ((3, 7, 12), 33, "12 + 7 * 3 = 33", True),
    ((3, 7, 12), 33, "12 + 7 * 3=33", True),
    ((3, 7, 12), 33, "12 + 7 * 3 =\n33\n", True),
    # numbers: each of them, once, and no other
    ((3, 7, 12), 36, "12 * 3", False),
    ((3, 7, 12), 45, "12 + 7 * 3 + 12", False),
    ((3, 7, 12), 33, "12 + 7 + 7 + 7", False),
    ((3, 7, 12), 33, "33", False),
    ((3, 7, 12), 33, "12 + 7 * 3 + 0", False),
    ((3, 7, 12), 33, "12 + 7 * 3 * 1", False),
    ((3, 7, 12), 33, "1 * 2 + 7 * 3 + 10", False),
    ((1, 2, 12), 15, "12 + 1 + 2", True),
    ((1, 2, 12), 15, "12 + 12 / 12 + 2", False),
    ((1, 2), 12, "12", False),
    ((1, 2), 12, "1 2", False),
    ((5, 5, 5), 30, "5 * 5 + 5", True),
    ((5, 5, 5), 25, "5 * 5", False),
    ((5, 5), 15, "5 + 5 + 5", False),
    ((3, 7, 12), 33, "12 + 07 * 3", False),
    ((3, 7, 12), 33, "12 + 7 * 3.0", False),
    ((3, 7, 12), 33, "12. + 7 * 3", False),
    ((3, 7, 12), 33, "12 + 7 * 3e0", False),
    ((3, 7, 12), 33, "1_2 + 7 * 3", False),
    ((3, 7, 12), 33, "0xC + 7 * 3", False),
    ((3, 7, 12), 33, "12 + 7 * ３", False),  # a full-width digit: int() and \d read it as 3
    ((3, 7, 12), 33, "12 + 7 * ٣", False),
    ((3, 7, 12), 33, "12 + 7 * ³", False),
    # exactly the target, in exact arithmetic
    ((3, 7, 12), 33, "12 + 7 + 3", False),
    ((3, 7, 12), 33, "12 - 7 * 3", False),
    ((1, 7, 49, 49), 8, "1 / 49 * 49 + 7", True),  # 1 / 49 * 49 is 0.9999999999999999 in floats
    ((1, 3, 3), 1, "1 / 3 * 3", True),
    ((3, 3, 8, 8), 24, "8 / (3 - 8 / 3)", True),
    ((1, 3, 10**6, 10**6, 10**6), 10**18, "1000000 * 1000000 * 1000000 + 1 / 3", False),  # is, in floats
    ((2, 7), 3, "7 / 2", False),
    ((2, 7), 4, "7 / 2", False),
    ((3, 7), -4, "3 - 7", True),
    ((3, 7), 4, "3 - 7", False),
    # precedence and association
    ((2, 3, 4), 20, "2 + 3 * 4", False),
    ((2, 3, 4), 14, "2 + 3 * 4", True),
    ((2, 3, 10), 5, "10 - 3 - 2", True),
    ((2, 3, 10), 9, "10 - 3 - 2", False),
    ((2, 4, 16), 2, "16 / 4 / 2", True),
    ((2, 4, 16), 8, "16 / 4 / 2", False),
    ((2, 4, 16), 8, "16 / 4 * 2", True),
    # signs: one before a number or a bracket
    ((3, 7), 4, "-3 + 7", True),
    ((3, 7), 10, "+3 + +7", True),
    ((3, 7), 10, "3 - -7", True),
    ((3, 7), 21, "-3 * -7", True),
    ((3, 7), 4, "-(3 - 7)", True),
    ((3, 7), 4, "- (3 + (-7))", True),
    ((3, 7), 10, "-(-(3 + 7))", True),
    ((3, 7), 10, "--3 + 7", False),
    ((3, 7), 10, "3 - - - 7", False),
    ((3, 7), 10, "3 + 7 -", False),
    ((3, 7), 10, "3 + 7 +", False),
    ((3, 7), 10, "-", False),
    # other operations and other languages
    ((2, 3), 8, "2 ** 3", False),
    ((2, 3), 8, "2 ^ 3", False),
    ((2, 7), 3, "7 // 2", False),
    ((2, 7), 1, "7 % 2", False),
    ((3, 7), 21, "3 × 7", False),
    ((3, 7), 21, "3 \\times 7", False),
    ((3, 7), 21, "3(7)", False),
    ((3, 7), 21, "(3)(7)", False),
    ((3, 7), 21, "3 x 7", False),
    ((3, 7), 4, "7 − 3", False),  # a minus sign that is not the keyboard's
    ((3, 7), 10, "__import__('os').getpid() * 0 + 3 + 7", False),
    ((3, 7), 10, "3 + 7 # easy", False),
    ((3, 7), 10, "3 + 7;", False),
    ((3, 7), 10, "3 + 7, 3 + 7", False),
    ((3, 7), 10, "3 + 7\n3 + 7", False),
    ((3, 7), 10, "$3 + 7$", False),
    ((3, 7), 10, "3 +\xa07", False),
    ((3, 7), 10, "3 +\x007", False),
    ((3, 7), 10, "ten", False),
    ((3, 7), 10, "", False),
    ((3, 7), 10, "  ", False),
    # brackets
    ((3, 7), 10, "(3 + 7", False),
    ((3, 7), 10, "3 + 7)", False),
    ((3, 7), 10, ")3 + 7(", False),
    ((3, 7), 10, "3 + () 7", False),
    ((3, 7), 10, "[3 + 7]", False),
    # dividing by zero is no answer, and no crash
    ((3, 3, 7), 7, "7 / (3 - 3)", False),
    ((3, 3, 7), 0, "(3 - 3) / (7 - 7)", False),
    ((3, 3, 7), 0, "(3 - 3) / 7", True),
    # the equals sign
    ((3, 7), 10, "3 + 7 = 11", False),
    ((3, 7), 11, "3 + 7 = 11", False),
    ((3, 7), 10, "10 = 3 + 7", False),
    ((3, 7), 10, "3 + 7 = 10 = 10", False),
    ((3, 7), 10, "3 + 7 == 10", False),
    ((3, 7), 10, "3 + 7 =", False),
    ((3, 7), 10, "= 10", False),
    ((3, 7), 10, "= 3 + 7", False),
    ((3, 7), 10, "3 + 7 = 5 + 5", False),
    ((3, 7), 10, "3 + 7 = 10.0", False),
    ((3, 7), 10, "3 + 7 = 010", False),
    ((3, 7), 10, "3 + 7 = 1 0", False),
    ((3, 7), 10, "3 = 3 + 7", False),
    # length and depth have a bound
    ((3, 7), 10, "(" * MAX_EXPRESSION_DEPTH + "3 + 7" + ")" * MAX_EXPRESSION_DEPTH, True),
    ((3, 7), 10, "(" * (MAX_EXPRESSION_DEPTH + 1) + "3 + 7" + ")" * (MAX_EXPRESSION_DEPTH + 1), False),
    ((3, 7), 10, "3 +" + " " * (MAX_EXPRESSION_LENGTH - 4) + "7", True),
    ((3, 7), 10, "3 +" + " " * (MAX_EXPRESSION_LENGTH - 3) + "7", False),
    ((3, 7), 10, " " * 10_000 + "3 + 7" + " " * 10_000, True),
]  # fmt: skip


@pytest.mark.parametrize("case", EXPRESSION_CASES, ids=[case[2][:40] for case in EXPRESSION_CASES])
def test_expression(case):
    """The format part is earned either way: what stands in the answer is no matter of format."""
    numbers, target, answer, right = case
    reward = grade(f"</think>\n<answer>{answer}</answer>", True, Problem(numbers, target))
    assert (reward.format, reward.correct) == (0.1, 1.0 if right else 0.0)


# ------------------------------------------------------------------------- the reward, by the ten thousand


def test_ten_thousand_random_expressions_have_the_value_of_their_tree():
    """The oracle computed each value while it built the tree; the walker has only the printed text."""
    rng = random.Random(0)
    outcomes = Counter()
    for _ in range(10_000):
        numbers = [rng.randint(1, rng.choice([3, 30])) for _ in range(rng.randint(1, 6))]
        text, value = random_expression(rng, numbers)
        assert evaluate_expression(text, rng.sample(numbers, len(numbers))) == value, text
        target = round(value) if value is not None else 1
        for goal in (target, target + 1):
            reward = grade(f"</think>\n<answer>{text}</answer>", True, Problem(tuple(numbers), goal))
            assert reward.correct == (value == goal), text
        outcomes["no value" if value is None else "whole" if value.denominator == 1 else "fraction"] += 1
    assert outcomes["whole"] > 2000 and outcomes["fraction"] > 2000 and outcomes["no value"] > 50


def test_hostile_answers_agree_with_the_oracle_in_bounded_time():
    """`python tests/fuzz_grader.py 1000000` is the long form."""
    seen = fuzz(20_000, seed=1)
    assert seen["solved"] > 1000 and seen["well formed"] > 2000 and seen["longest"] > 20_000


MONSTERS = {  # a million characters each, after a good beginning
    "opening brackets": ("(", ""),
    "nested brackets": ("(", ")"),
    "signs": ("-", "3"),
    "one digit string": ("9", ""),
    "numbers": ("3 + ", "7"),
    "powers": ("9**", "9"),
    "spaces": (" ", ""),
    "spaces and a letter": (" ", "x"),
    "equals signs": ("=", "33"),
    "answer tags": ("<answer>", "</answer>"),
    "half tags": ("<", "answer>"),
    "unclosed tags": ("</answe", "r"),
    "think tags": ("<think>", "</think>"),
    "full-width digits": ("３", ""),
    "astral characters": ("🙂", ""),
    "lone surrogates": ("\ud800", ""),
    "null bytes": ("\x00", ""),
}


PLACES = {
    "answer": "</think>\n<answer>{}</answer>",
    "thoughts": "{}</think>\n<answer>12 + 7 * 3</answer>",
    "between": "</think>{}<answer>12 + 7 * 3</answer>",
    "after": "</think>\n<answer>12 + 7 * 3</answer>{}",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MONSTERS)
def test_monsters_neither_raise_nor_take_long(name, place):
    """A quadratic regular expression or a deep recursion would need hours or overflow the stack here."""
    piece, close = MONSTERS[name]
    times = 1_000_000 // len(piece + close)
    monster = piece * times + close * (times if close == ")" else 1)
    case = (PLACES[place].format(monster), True, PUZZLE)
    assert any(seconds(*case) <= time_limit(case[0]) for _ in range(3))
    has_tags = name in ("answer tags", "half tags", "think tags")
    assert grade(*case).correct == (0.0 if place == "answer" or has_tags else 1.0)


# ----------------------------------------------------------------------------------- problems from nothing


def values_by_pairs(values: tuple[Fraction, ...]) -> set[Fraction]:
    """Another brute force: replace any two values by the result of an operation until one is left."""
    if len(values) == 1:
        return set(values)
    found = set()
    for i, j in itertools.permutations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
        for result in [a + b, a - b, a * b] + ([a / b] if b else []):
            found |= values_by_pairs((result, *rest))
    return found


@pytest.mark.parametrize("numbers", [(5,), (1, 2), (7, 7), (3, 7, 12), (5, 5, 5), (3, 3, 8, 8), (1, 4, 9, 6)])
def test_reachable_values(numbers):
    expected = values_by_pairs(tuple(map(Fraction, numbers)))
    assert reachable_values(numbers) == expected
    assert (3, 3, 8, 8) != numbers or 24 in expected  # 8 / (3 - 8 / 3) goes through a third


def test_generated_problems():
    problems = generate_problems(3, 1, 15, 10, 100)
    assert len(problems) == len(set(problems)) == 5947
    assert problems == sorted(problems, key=lambda p: (p.numbers, p.target))
    for problem in problems:
        assert len(problem.numbers) == 3 and list(problem.numbers) == sorted(problem.numbers)
        assert 1 <= problem.numbers[0] and problem.numbers[-1] <= 15 and 10 <= problem.target <= 100
        assert type(problem.target) is int
    of_2_2, of_2_3, of_3_3 = [0, 1, 4], [-1, 1, 5, 6], [0, 1, 6, 9]
    assert [p.target for p in generate_problems(2, 2, 3, -9, 9)] == of_2_2 + of_2_3 + of_3_3
    hands = itertools.combinations_with_replacement(range(1, 5), 4)
    solvable = [four for four in hands if 24 in values_by_pairs(tuple(map(Fraction, four)))]
    assert [p.numbers for p in generate_problems(4, 1, 4, 24, 24)] == solvable


# ---------------------------------------------------------------------------------- problems from parquet


def write(file: Path, nums: object, target: object) -> Path:
    """A real parquet file with these two columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"target": target, "nums": nums}), file)
    return file


def message_of(*args: object, **options: object) -> str:
    """What load_problems says when it refuses: one line."""
    with pytest.raises(UserError) as caught:
        load_problems(*args, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


def test_load_a_file_as_the_public_data_set_has_it(tmp_path, capsys):
    file = write(tmp_path / "train.parquet", [[44, 19, 35], [63, 95, 96, 2]], [98, 28])
    problems = load_problems(str(file))
    assert problems == [Problem((44, 19, 35), 98), Problem((63, 95, 96, 2), 28)]
    assert all(type(n) is int for p in problems for n in (*p.numbers, p.target))  # not numpy's
    assert question_text(problems[0]).count("[44, 19, 35]") == 1
    assert capsys.readouterr().err == ""


def test_load_a_file_written_by_pandas_with_other_columns(tmp_path):
    frame = pandas.DataFrame({
        "note": ["a", "b"], "target": numpy.array([10, 20], dtype=numpy.int16),
        "nums": [numpy.array([3, 7], dtype=numpy.uint8), [4, 5, 6]],
    }, index=[7, 9])  # fmt: skip
    frame.to_parquet(tmp_path / "a.parquet")
    assert load_problems(str(tmp_path / "a.parquet")) == [Problem((3, 7), 10), Problem((4, 5, 6), 20)]


def test_load_a_folder_in_the_order_of_names(tmp_path):
    write(tmp_path / "data" / "train-1.parquet", [[3, 4]], [12])
    write(tmp_path / "data" / "train-0.parquet", [[1, 2]], [3])
    write(tmp_path / "a" / "deep" / "er.parquet", [[5, 6]], [11])
    (tmp_path / "README.md").write_text("no parquet")
    assert [p.target for p in load_problems(str(tmp_path))] == [11, 3, 12]


BAD_ROWS = [  # nums, target, what is said about it
    (None, 10, "nums is not a list of 2 to 6 numbers but None"),
    ([], 10, "nums is not a list of 2 to 6 numbers"),
    ([5], 10, "nums is not a list of 2 to 6 numbers"),
    ([1, 2, 3, 4, 5, 6, 7], 10, "nums is not a list of 2 to 6 numbers"),
    ([3, None], 10, "nums holds nan, not a whole number from 1 to 1,000,000"),
    ([3, 0], 10, "nums holds 0, not a whole number"),
    ([3, -7], 10, "nums holds -7, not a whole number"),
    ([3, 1_000_001], 10, "nums holds 1000001, not a whole number"),
    ([3, 2**63 - 1], 10, "nums holds 9223372036854775807, not a whole number"),
    ([3, 7], None, "target holds nan, not a whole number"),
    ([3, 7], 0, "target holds 0, not a whole number"),
    ([3, 7], 10**15, "target holds 1000000000000000, not a whole number"),
]


@pytest.mark.parametrize("nums, target, reason", BAD_ROWS, ids=[c[2][:45] for c in BAD_ROWS])
def test_a_bad_row_is_dropped_and_named(tmp_path, capsys, nums, target, reason):
    """The good rows around it survive, even though one hole makes pandas read the column as floats."""
    file = write(tmp_path / "a.parquet", [[3, 7], nums, [4, 5]], [10, target, 9])
    assert load_problems(str(file)) == [Problem((3, 7), 10), Problem((4, 5), 9)]
    said = capsys.readouterr().out
    if target == 10**15:
        said = said.replace("1000000000000000.0", "1000000000000000")
    assert said.startswith(f"{file}: dropped 1 of 3 rows: row 1: {reason}") and said.count("\n") == 1


def test_of_many_bad_rows_all_are_counted_and_three_named(tmp_path, capsys):
    file = write(tmp_path / "a.parquet", [[3, 7]] * 12, [0] * 5 + [10, 10] + [-1] * 5)
    assert load_problems(str(file)) == [Problem((3, 7), 10)] * 2
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: dropped 10 of 12 rows: row 0: ")
    assert re.findall(r"row (\d+): ", said) == ["0", "1", "2"]


BAD_COLUMNS = [  # nums, target (whole columns), what is said of the first row
    (["[3, 7]"], [10], "row 0: nums is not a list of 2 to 6 numbers but '[3, 7]'"),
    ([3], [10], "row 0: nums is not a list of 2 to 6 numbers but 3"),
    ([["3", "7"]], [10], "row 0: nums holds '3', not a whole number"),
    ([[[3], [7]]], [10], "row 0: nums holds array([3]), not a whole number"),
    ([[True, True]], [10], "row 0: nums holds True, not a whole number"),
    ([[3.5, 7.0]], [10], "row 0: nums holds 3.5, not a whole number"),
    ([[float("nan"), 7.0]], [10], "row 0: nums holds nan, not a whole number"),
    ([[float("inf"), 7.0]], [10], "row 0: nums holds inf, not a whole number"),
    ([{"a": 3, "b": 7}], [10], "row 0: nums is not a list of 2 to 6 numbers but {'a': 3, 'b': 7}"),
    ([[3, 7]], ["10"], "row 0: target holds '10', not a whole number"),
    ([[3, 7]], ["\x1b[31m\n"], "row 0: target holds '\\x1b[31m\\n', not a whole number"),
    ([[3, 7]], [[10]], "row 0: target holds array([10]), not a whole number"),
    ([[3, 7]], [float("nan")], "row 0: target holds nan, not a whole number"),
    ([[3, 7]], [10.5], "row 0: target holds 10.5, not a whole number"),
    ([[3, 7]], [1e300], "row 0: target holds 1000000000000000"),
    ([[3, 7]], [True], "row 0: target holds True, not a whole number"),
    ([[3, 7]] * 5, [0] * 5, "row 2: target holds 0, not a whole number from 1 to 1,000,000"),
]


@pytest.mark.parametrize("nums, target, reason", BAD_COLUMNS, ids=[c[2][:50] for c in BAD_COLUMNS])
def test_a_file_of_bad_rows_only_is_refused(tmp_path, nums, target, reason):
    file = write(tmp_path / "a.parquet", nums, target)
    text = message_of(str(file))
    assert text.startswith(f"{file}: holds no problem: row 0: ") and reason in text


def test_whole_floats_are_integers(tmp_path):
    file = write(tmp_path / "a.parquet", [[3.0, 7.0]], [10.0])
    (problem,) = load_problems(str(file))
    assert problem == Problem((3, 7), 10) and type(problem.numbers[0]) is int and type(problem.target) is int


def test_unreadable_files_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "good.parquet", [[3, 7]] * 500, list(range(1, 501))).read_bytes()

    def said_of(content: bytes) -> str:
        (tmp_path / "bad.parquet").write_bytes(content)
        return message_of("bad.parquet")

    no_parquet = "bad.parquet: not a readable parquet file with columns 'nums' and 'target' ("
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
    for content in (b"", b"PAR1", b"nums,target\n", pointer, good[:-1], good[: len(good) // 2], good[4:]):
        assert said_of(content).startswith(no_parquet)
    assert load_problems(str(tmp_path / "good.parquet"))[0] == Problem((3, 7), 1)

    for columns in ({"nums": [[3, 7]]}, {"target": [10]}, {"Nums": [[3, 7]], "target": [10]}):
        pyarrow.parquet.write_table(pyarrow.table(columns), "bad.parquet")
        assert message_of("bad.parquet").startswith(no_parquet)
    twice = pyarrow.Table.from_arrays([pyarrow.array([[3, 7]]), pyarrow.array([1]), pyarrow.array([2])],
                                      names=["nums", "target", "target"])  # fmt: skip
    pyarrow.parquet.write_table(twice, "bad.parquet")
    assert message_of("bad.parquet").startswith(no_parquet)
    integers = pyarrow.int64()
    write(Path("bad.parquet"), pyarrow.array([], pyarrow.list_(integers)), pyarrow.array([], integers))
    assert message_of("bad.parquet") == "bad.parquet: holds no problem: it has no rows"


def test_flipped_bytes_give_problems_or_one_line(tmp_path, capsys):
    """Damage anywhere, the footer included: either the rows still make sense, or a UserError."""
    file = write(tmp_path / "a.parquet", [[3, 7, n] for n in range(1, 200)], list(range(1, 200)))
    good, rng, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            problems = load_problems(str(file))
        except UserError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
        else:
            assert all(1 <= n <= 10**6 for p in problems for n in (*p.numbers, p.target))
    assert refused > 50


NO_PATHS = ["none", "/none/at/all", "./no", "../no", "a/b/c", "no/such.parquet", "", "a b", "x" * 400, "a\0b"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_a_path_that_is_nothing(path):
    """It may not be taken for a hub id, and a name that the system itself refuses gives the same line."""
    shown = str(UserError(path))  # without control characters
    assert message_of(path) == (
        f"{shown}: no such file or folder, nor a hub data set (owner/name): set data.path")


def test_an_empty_folder_is_refused(tmp_path):
    assert message_of(str(tmp_path)) == (
        f"{tmp_path}: holds no .parquet file: give a file, a folder or a data set that has one")


def test_filters(tmp_path):
    file = str(write(tmp_path / "a.parquet", [[1, 2], [1, 2, 3], [1, 2, 3, 4], [5, 6, 7]], [3, 6, 10, 18]))

    def targets(**filters: object) -> list[int]:
        return [p.target for p in load_problems(file, **filters)]

    assert targets() == [3, 6, 10, 18]
    assert targets(number_counts=(3,)) == [6, 18]
    assert targets(number_counts=[2, 4]) == [3, 10]
    assert targets(target_low=6) == [6, 10, 18]
    assert targets(target_high=6) == [3, 6]
    assert targets(number_counts=(3, 4), target_low=7, target_high=10) == [10]
    assert message_of(file, number_counts=(5,), target_high=9) == (
        f"{file}: none of its 4 problems passes the filters: widen data.number_counts ([5]), "
        "data.target_low (None) or data.target_high (9)")


# ---------------------------------------------------------------------------------------- the hub, for real

ASK_FOR = """
import json, sys
from countdown_task import load_problems
from data_types import UserError
for name, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps([p.target for p in load_problems(name, revision)]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask_hub(wanted: list, endpoint: str, home: Path, **environment: str) -> list:
    """What load_problems gives, or says, for each (data set, revision).

    In a process of its own, as huggingface_hub reads its environment when it is imported.
    """
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-c", ASK_FOR, json.dumps(wanted)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_data_sets_of_the_hub(tmp_path):
    """Downloaded once, then read from the cache without a network; every refusal is one line with advice."""
    parquet = write(tmp_path / "a.parquet", [[3, 7], [4, 5]], [10, 9]).read_bytes()
    others = [(name, None) for name in ("no/such", "gated/set", "broken/hub", "a--b/c")]
    home = tmp_path / "home"
    with small_hub({"README.md": b"not wanted", "data/train-00000.parquet": parquet}) as endpoint:
        answers = ask_hub([("lab/countdown", None), ("lab/countdown", "v9"), *others], endpoint, home)
    assert answers[0] == [10, 9]
    assert not list(home.rglob("README.md"))  # only what is needed
    get = "cannot get this data set from the hub"
    assert answers[1] == (f"lab/countdown at revision v9: {get}: it has no such revision: "
                          "set data.revision to a branch, tag or commit of it")  # fmt: skip
    assert answers[2] == (f"no/such: {get}: no folder here, no data set there you may see: "
                          "check data.path, set HF_TOKEN")  # fmt: skip
    assert answers[3] == (f"gated/set: {get}: its owner asks for consent: accept the terms on its page, "
                          "then set HF_TOKEN")  # fmt: skip
    unreachable = (f"{get}: no folder here, not cached, no way to the hub: "
                   "check data.path, network, HF_ENDPOINT, HF_HUB_OFFLINE")  # fmt: skip
    assert answers[4] == f"broken/hub: {unreachable}"
    assert answers[5].startswith(f"a--b/c: {get}: HFValidationError: ")

    for offline in ("0", "1"):  # the server is gone: first found out, then told
        wanted = [("lab/countdown", None), ("no/such", None)]
        assert ask_hub(wanted, endpoint, home, HF_HUB_OFFLINE=offline) == [[10, 9], f"no/such: {unreachable}"]


def test_a_full_disk_is_told_as_such(monkeypatch):
    """Stands in for the download only: a full disk cannot be had in a test."""

    def download(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert message_of("lab/countdown") == (
        "lab/countdown: cannot get this data set from the hub: the disk is full: "
        "free some space or set HF_HOME to a folder on another disk"
    )


# ------------------------------------------------------------------------------------ the split and the order


def keys(problems: list[Problem]) -> set[tuple]:
    return {(tuple(sorted(p.numbers)), p.target) for p in problems}


def test_train_and_held_out_share_no_problem():
    """The public data set has the same problem in many rows and orders: a split by rows would leak."""
    rng = random.Random(0)
    problems = generate_problems(3, 1, 9, 10, 50)
    rows = [Problem(tuple(rng.sample(p.numbers, 3)), p.target) for p in problems * 3]
    rng.shuffle(rows)
    train, held_out = split_problems(rows, 100)
    assert len(held_out) == len(keys(held_out)) == 100
    assert not keys(train) & keys(held_out)
    assert keys(train) | keys(held_out) == keys(rows)
    train_set = set(train)
    assert train == [p for p in rows if p in train_set] and set(held_out) <= set(rows)
    assert len(train) == len(rows) - 3 * 100  # no other row was lost


def test_the_split_does_not_depend_on_the_order_of_rows():
    rng = random.Random(1)
    problems = generate_problems(3, 1, 9, 10, 50)
    rows = [Problem(tuple(rng.sample(p.numbers, 3)), p.target) for p in problems * 2]
    train, held_out = split_problems(rows, 64)
    train_too, held_out_too = split_problems(rng.sample(rows, len(rows)), 64)
    assert held_out == held_out_too and Counter(train) == Counter(train_too)


def test_a_filter_moves_no_problem_into_training():
    """Those held out before and still there stay held out. (And the hash favours no targets.)"""
    problems = generate_problems(3, 1, 12, 10, 100)
    _, before = split_problems(problems, 300)
    kept = [p for p in problems if p.target <= 60]
    _, after = split_problems(kept, 300)
    assert {p for p in before if p.target <= 60} <= set(after)
    mean, mean_before = (sum(p.target for p in some) / len(some) for some in (problems, before))
    assert abs(mean - mean_before) < 5


def test_the_split_is_the_same_in_every_process_and_version():
    """A checkpoint trained on one split and judged on another would have seen its questions."""
    _, held_out = split_problems(generate_problems(3, 1, 9, 10, 50), 3)
    assert held_out == [Problem((7, 7, 9), 14), Problem((2, 7, 9), 25), Problem((6, 6, 7), 29)]


def test_too_few_problems_to_split():
    problems = [Problem((1, 2), 3), Problem((2, 1), 3), Problem((1, 3), 4)]
    assert [len(side) for side in split_problems(problems, 1)] in ([1, 1], [2, 1])
    for held_out in (2, 3, 512):
        said = f"^2 different problems are too few to hold out {held_out} and .*data.held_out"
        with pytest.raises(UserError, match=said):
            split_problems(problems, held_out)


def test_the_order_is_a_function_of_seed_and_epoch():
    state = random.getstate()
    orders = [tuple(problem_order(50, seed, epoch)) for seed in range(15) for epoch in range(15)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == len(orders)  # (1, 12) is not (11, 2)
    assert random.getstate() == state  # nobody else's randomness is touched
    random.seed(5)
    assert problem_order(10, 7, 2) == [1, 2, 0, 8, 4, 6, 3, 9, 7, 5]  # nor it this order, in any process
    assert problem_order(0, 1, 1) == []
