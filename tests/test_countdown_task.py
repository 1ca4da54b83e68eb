"""The Countdown task: the reward rule by rule, hostile responses, problems and their files, the split and the order."""

import itertools
import random
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow.parquet
import pytest
from fuzz_grader import DEEPEST, fuzz, is_fast
from small_hub import small_hub

import countdown_task as task
import hub
from countdown_task import Problem, Settings, grade, load_problems, question_text
from data_types import UserError
from make_tiny import generate_problems, reachable_values
from task import load_task, problem_order, split_problems

COUNTDOWN, PUZZLE = load_task("countdown"), Problem((3, 7, 12), 33)
X = "12 + 7 * 3"  # its solution


def test_the_question_names_the_problem_and_shows_the_form_in_digits():
    """With letters in its example, real models wrote `(7 + 14) / a`; numbers as in a problem would get copied."""
    text = question_text(PUZZLE)
    example = re.fullmatch(r"\D*\[3, 7, 12\]\D{1,40}33\D*(<answer>.*</answer>)\D*", text)[1]
    numbers = tuple(map(int, re.findall(r"\d+", example)))
    assert min(numbers) > 100
    assert task.evaluate_expression(example.removeprefix("<answer>").removesuffix("</answer>"), numbers) is not None
    assert all(part in text for part in ("+ - * /", "exactly once", "<think> </think>", "<answer> </answer>"))
    assert text.replace("[3, 7, 12]", "[15, 2]").replace(" 33.", " 100.") == question_text(Problem((15, 2), 100))
    assert task.ASSISTANT_PREFIX.endswith("<think>")  # so what is sampled goes on inside the block


# ---- The reward ------------------------------------------------------------------------------------------------

GOOD = f"12 - 7 is 5, too low</think>\n<answer>{X}</answer>"
RESPONSES = {  # (format, correct): what was sampled after "<think>"
    (0.1, 1.0): [
        GOOD, f"</think> <answer>{X}</answer>", f"</think>\r\n \t\n<answer>{X}</answer>", f"3 = 9 ** 9{GOOD}",
        f"</think><answer>{X}</answer>",
        f"< think> <answer > <Answer> </ think></think>\n<answer>{X}</answer>",  # almost tags are text
    ],
    (0.1, 0.0): [  # the format does not depend on what the answer is
        GOOD.replace(X, "3 + 7"), GOOD.replace(X, "I give up"), GOOD.replace(X, ""), X + GOOD.replace(X, "3 + 7"),
    ],
    (0.0, 1.0): [  # white space between the blocks and nothing else, nothing after the answer
        f"</think> so: <answer>{X}</answer>", f"</think>\xa0<answer>{X}</answer>",
        GOOD + " done", GOOD + "\n", GOOD + "<|im_end|>",
    ],
    (0.0, 0.0): [
        "", X, f"</think>\n<ANSWER>{X}</ANSWER>",
        # a block that is never closed or never opened
        f"</think>\n<answer>{X}", f"</think>\n<answer>{X}</answer", f"</think>\n{X}</answer>", f"<answer>{X}</answer>",
        # blocks inside each other, or in another order
        f"<answer>{X}</answer></think>", f"<answer>{X}</answer></think>\n", f"<answer></think>{X}</answer>",
        f"</think></answer>{X}<answer>", f"</think>\n<answer><think>{X}</think></answer>",
        # two answers, whichever is right: hedging must not pay
        f"{GOOD}\n<answer>{X}</answer>", f"{GOOD}<answer>3</answer>", f"</think> <answer><answer>{X}</answer></answer>",
        f"<answer>3</answer></think> <answer>{X}</answer>", f"</think> <answer>3</answer><answer>{X}</answer>",
        f"</think>\n<answer><answer>{X}</answer>", GOOD + "</answer>",
        # a second think block
        f"<think>{GOOD}", f"</think>{GOOD}", f"</think><think>{GOOD}", GOOD + "<think></think>",
    ],
}  # fmt: skip


@pytest.mark.parametrize("reward", RESPONSES)
def test_format(reward):
    for response in RESPONSES[reward]:
        found = grade(response, False, PUZZLE)
        assert found == dict(zip(("format", "correct"), reward, strict=True)), response
        assert grade(response, True, PUZZLE) == {**found, "format": 0.0}  # truncated: nothing for the format


LONGEST = "-" * (task.MAX_EXPRESSION_LENGTH - 5) + "(3+7)"
EXPRESSIONS = [  # numbers, target, right answers, wrong answers
    ((3, 7, 12), 33, ["12 + 7 * 3", "7*3+12", "\n\t( 12 + (7) * 3 )\r\n", "12 + 7 * 3 = 33", "12 + 7 * 3 =\n33\n"],
     ["33", "12 + 7 + 7 + 7", "1 * 2 + 7 * 3 + 10", "12 + 7 + 3", "12 - 7 * 3"]),
    # each number once, as it is written, and no other
    ((3, 7, 12), 36, [], ["12 * 3"]), ((3, 7, 12), 45, [], ["12 + 7 * 3 + 12"]),
    ((3, 7, 12), 33, [], ["12 + 7 * 3 + 0", "12 + 7 * 3 * 1", "12 + 07 * 3", "12 + 7 * 3.0", "12. + 7 * 3"]),
    ((3, 7, 12), 33, [], ["12 + 7 * 3e0", "1_2 + 7 * 3", "0xC + 7 * 3"]),
    ((3, 7, 12), 33, [], ["12 + 7 * \uff13", "12 + 7 * \u0663", "12 + 7 * \u00b3"]),  # int() reads the first two as 3
    ((1, 2, 12), 15, ["12 + 1 + 2"], ["12 + 12 / 12 + 2"]), ((1, 2), 12, [], ["12", "1 2"]),
    ((5, 5, 5), 30, ["5 * 5 + 5"], []), ((5, 5, 5), 25, [], ["5 * 5"]), ((5, 5), 15, [], ["5 + 5 + 5"]),
    # exactly the target: in floats 1 / 49 * 49 is 0.9999999999999999, and 10**18 + 1/3 is 10**18
    ((1, 7, 49, 49), 8, ["1 / 49 * 49 + 7"], []), ((3, 3, 8, 8), 24, ["8 / (3 - 8 / 3)"], []),
    ((1, 3, 10**6, 10**6, 10**6), 10**18, [], ["1000000 * 1000000 * 1000000 + 1 / 3"]),
    ((2, 7), 3, [], ["7 / 2", "7 // 2"]), ((2, 7), 4, [], ["7 / 2"]), ((3, 7), -4, ["3 - 7"], []),
    # precedence and association
    ((2, 3, 4), 20, ["(2 + 3) * 4"], ["2 + 3 * 4"]), ((2, 3, 4), 14, ["2 + 3 * 4"], ["(2 + 3) * 4"]),
    ((2, 3, 10), 5, ["10 - 3 - 2"], ["10 - (3 - 2)"]), ((2, 3, 10), 9, ["10 - (3 - 2)"], ["10 - 3 - 2"]),
    ((2, 4, 16), 2, ["16 / 4 / 2"], ["16 / 4 * 2"]), ((2, 4, 16), 8, ["16 / 4 * 2"], ["16 / 4 / 2"]),
    # any signs before a number or a parenthesis
    ((3, 7), 4, ["-3 + 7", "-(3 - 7)", "- (3 + (-7))"], ["3 - 7", "7 \u2212 3"]),
    ((3, 7), 10, ["+3 + +7", "3 - -7", "-(-(3 + 7))", "--3 + +-+ -7"], ["3 - - - 7", "3 + 7 -", "3 + 7 +", "-"]),
    ((3, 7), 21, ["-3 * -7"], ["3 \xd7 7", "3 \\times 7", "3(7)", "(3)(7)", "3 x 7"]),
    # other operations and other languages
    ((2, 3), 8, [], ["2 ** 3", "2 ^ 3"]), ((2, 7), 1, [], ["7 % 2"]),
    ((3, 7), 10, [], ["__import__('os').getpid() * 0 + 3 + 7", "3 + 7 # easy", "3 + 7;", "3 + 7, 3 + 7", "$3 + 7$"]),
    ((3, 7), 10, [], ["3 + 7\n3 + 7", "3 +\xa07", "\xa03 + 7", "3 + 7\u2028", "3 +\x007", "\ud800", "ten", "", "  "]),
    # parentheses, and division by zero, which is no answer and no crash
    ((3, 7), 10, [], ["(3 + 7", "3 + 7)", ")3 + 7(", "3 + () 7", "[3 + 7]"]),
    ((3, 3, 7), 7, [], ["7 / (3 - 3)"]), ((3, 3, 7), 0, ["(3 - 3) / 7"], ["(3 - 3) / (7 - 7)"]),
    # "= target" may follow, and nothing else
    ((3, 7), 10, ["3 + 7 = 10"], ["3 + 7 = 11", "10 = 3 + 7", "3 + 7 = 10 = 10", "3 + 7 == 10", "3 + 7 =", "= 10"]),
    ((3, 7), 10, [], ["= 3 + 7", "3 + 7 = 5 + 5", "3 + 7 = 10.0", "3 + 7 = 010", "3 + 7 = 1 0", "3 = 3 + 7"]),
    ((3, 7), 11, [], ["3 + 7 = 11"]),
    # bounded length and depth: Python's parser must neither raise nor overflow the stack
    ((3, 7), -10, [LONGEST], [f"--{LONGEST}", "-" * 500, LONGEST[:-1]]),
    ((3, 7), 10, ["(" * DEEPEST + "3 + 7" + ")" * DEEPEST, " " * 10_000 + "3 +" + " " * 10_000 + "7"],
     ["(" * n + "3 + 7" + ")" * n for n in (DEEPEST + 1, 245, 300)]),
    ((3, 7), 10, [], ["(" * 490 + "3 + 7", "3 + 7" + ")" * 490, "(-" * 240 + "3 + 7", "3(" * 9 + "7" + "()" * 230]),
]  # fmt: skip


@pytest.mark.parametrize(("numbers", "target", "right", "wrong"), EXPRESSIONS)
def test_expression(numbers, target, right, wrong):
    for answer in right + wrong:
        reward = grade(f"</think>\n<answer>{answer}</answer>", False, Problem(numbers, target))
        assert reward == {"format": 0.1, "correct": float(answer in right)}, answer


def test_hostile_responses_agree_with_the_oracle_in_bounded_time():
    """And so do expressions, which Python's parser reads for the grader and one written by hand for the oracle."""
    seen = fuzz(10_000, seed=1)  # the long form: see fuzz_grader.py
    least = {"solved": 500, "deep": 50, "well_formed": 1000, "long": 10}
    assert all(seen[kind] > count for kind, count in least.items())


MONSTERS = [  # a million characters: the first text again and again, then the second
    ("(", ""), ("(\n", ")" * 500_000), ("-", "3"), ("9", ""), ("3 + ", "7"), (" ", "x"), ("=", "33"), ("\uff13", ""),
    ("<answer>", "</answer>"), ("<think>", "</think>"), ("<", "answer>"), ("</answe", "r"), ("\ud800", ""),
]  # fmt: skip
PLACES = ["</think>\n<answer>{}</answer>", "{}" + GOOD, GOOD.replace("\n", "{}"), GOOD + "{}"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("piece", "end"), MONSTERS)
def test_monsters_neither_raise_nor_take_long(piece, end, place):
    """A quadratic regular expression or a deep recursion would need hours or overflow the stack here."""
    case = (place.format(piece * (1_000_000 // len(piece)) + end), False, PUZZLE)
    assert is_fast(case)
    assert grade(*case)["correct"] == float(place != PLACES[0] and not end.endswith(("answer>", "think>")))


@cache
def values_by_pairs(values: tuple[Fraction, ...]) -> set[Fraction]:
    """Another brute force: replace any two values by the result of an operation until one is left."""
    found = set(values) if len(values) == 1 else set()
    for i, j in itertools.permutations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = [v for k, v in enumerate(values) if k not in (i, j)]
        for result in [a + b, a - b, a * b] + ([a / b] if b else []):
            found |= values_by_pairs(tuple(sorted([*rest, result])))
    return found


@pytest.mark.parametrize(("count", "low", "high", "least"), [(1, 1, 9, 3), (2, 2, 9, -9), (3, 1, 6, 10), (4, 3, 8, 24)])
def test_generated_problems_are_those_that_have_a_solution(count, low, high, least):
    expected = []
    for numbers in itertools.combinations_with_replacement(range(low, high + 1), count):
        values = values_by_pairs(tuple(map(Fraction, numbers)))
        assert reachable_values(numbers) == values
        whole = sorted(int(value) for value in values if value.denominator == 1 and least <= value <= 30)
        expected += [Problem(numbers, target) for target in whole]
    problems = generate_problems(count, low, high, least, 30)
    assert problems == expected
    assert all(type(problem.target) is int for problem in problems)


# ---- Problems from parquet -----------------------------------------------------------------------------------------


def write(file: Path, nums: object, target: object) -> Path:
    """A real parquet file with these two columns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"target": target, "nums": nums}), file)
    return file


def load(path: str | Path, **filters: Any) -> list[Problem]:
    """As a run does."""
    data = Settings(path=str(path), **filters)
    return load_problems(replace(data, path=str(hub.find_data(data))))


def refusal(path: str | Path, **filters: Any) -> str:
    """What load_problems says when it refuses: one line that names the path."""
    with pytest.raises(UserError) as caught:
        load(path, **filters)
    text = str(caught.value)
    assert str(UserError(str(path))) in text
    assert text.isprintable()
    return text


def test_parquet_files_as_others_write_them(tmp_path, capsys):
    """The public data set, pandas with other integers and columns, whole floats, and a folder in the order of names."""
    write(tmp_path / "b" / "train-1.parquet", [[44, 19, 35], [63, 95, 96, 2]], [98, 28])
    write(tmp_path / "b" / "train-0.parquet", [[3.0, 7.0]], [10.0])
    (tmp_path / "README.md").write_text("not parquet")
    small = [numpy.array([3, 7], dtype=numpy.uint8), [4, 5, 6]]
    target = numpy.array([10, 20], dtype=numpy.int16)
    frame = pandas.DataFrame({"note": ["a", "b"], "target": target, "nums": small}, index=[7, 9])
    frame.to_parquet(tmp_path / "a.parquet")
    expected = [((3, 7), 10), ((4, 5, 6), 20), ((3, 7), 10), ((44, 19, 35), 98), ((63, 95, 96, 2), 28)]
    problems = load(tmp_path)
    assert problems == [Problem(*row) for row in expected]
    assert load(tmp_path / "a.parquet") == problems[:2]
    assert all(type(n) is int for p in problems for n in (*p.numbers, p.target))  # not numpy's
    assert capsys.readouterr() == ("", "")


NUMBERS = [None, [], [5], [1, 2, 3, 4, 5, 6, 7], list(range(1, 60)), [3, None], [3, 0], [3, -7], [3, 10**6 + 1]]
BAD_ROWS = [*((nums, 10) for nums in [*NUMBERS, [3, 2**63 - 1]]), *(([3, 7], target) for target in (None, 0, 10**15))]


@pytest.mark.parametrize(("nums", "target"), BAD_ROWS)
def test_a_bad_row_is_dropped_counted_and_shown(tmp_path, capsys, nums, target):
    """The good rows around it survive, even though one hole makes pandas read the whole column as floats."""
    file = write(tmp_path / "a\x1b[31m.parquet", [[3, 7], nums, nums, [4, 5]], [10, target, target, 9])
    assert load(file) == [Problem((3, 7), 10), Problem((4, 5), 9)]
    said = capsys.readouterr().err.removeprefix("warning: ").removesuffix("\n")
    assert all(part in said for part in (str(UserError(str(file))), "2 of 4 rows", "row 1"))
    assert said.isprintable()  # one harmless line


BAD_COLUMNS = [
    *(([nums], [10]) for nums in ("[3, 7]", 3, ["3", "7"], [[3], [7]], [True, True], [3.5, 7.0], {"a": 3, "b": 7})),
    *(([[bad, 7.0]], [10]) for bad in (float("nan"), float("inf"))),
    *(([[3, 7]], [target]) for target in ("10", "\x1b[31m\n", [10], -4, float("nan"), float("inf"), 10.5, 1e300, True)),
    ([[3, 7]] * 5, [0] * 5),
    (pyarrow.array([], pyarrow.list_(pyarrow.int64())), pyarrow.array([], pyarrow.int64())),
]


@pytest.mark.parametrize(("nums", "target"), BAD_COLUMNS)
def test_a_file_without_a_good_row_is_refused(tmp_path, nums, target):
    assert ("row 0" if len(nums) else "no row") in refusal(write(tmp_path / "a.parquet", nums, target))


def test_unreadable_files_are_refused_by_name(tmp_path):
    file = write(tmp_path / "a.parquet", [[3, 7, n] for n in range(1, 200)], list(range(1, 200)))
    good, rng, refused = file.read_bytes(), random.Random(0), 0
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
    for content in (b"", b"PAR1", b"nums,target\n", pointer, good[:-1], good[: len(good) // 2], good[4:]):
        file.write_bytes(content)
        refusal(file)
    for names, values in [(["nums"], [[[3, 7]]]), (["target"], [[10]]), (["Nums", "target"], [[[3, 7]], [10]]),
                          (["nums", "target", "target"], [[[3, 7]], [1], [2]])]:  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(v) for v in values], names), file)
        assert re.search("nums.*target", refusal(file))
    for _ in range(300):  # damage anywhere, the footer included: the rows still make sense, or one line says no
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            assert all(1 <= n <= 10**6 for p in load(file) for n in (*p.numbers, p.target))
        except UserError:
            refusal(file)
            refused += 1
    assert refused > 50


def test_filters(tmp_path):
    file = write(tmp_path / "a.parquet", [[1, 2], [1, 2, 3], [1, 2, 3, 4], [5, 6, 7]], [3, 6, 10, 18])
    for filters, targets in [
        ({}, [3, 6, 10, 18]), ({"fewest_numbers": 3}, [6, 10, 18]), ({"most_numbers": 3}, [3, 6, 18]),
        ({"target_low": 6}, [6, 10, 18]), ({"target_high": 6}, [3, 6]),
        ({"fewest_numbers": 3, "most_numbers": 3, "target_low": 7, "target_high": 18}, [18]),
    ]:  # fmt: skip
        assert [p.target for p in load(file, **filters)] == targets
    assert "data.fewest_numbers" in refusal(file, fewest_numbers=4, most_numbers=3)


def test_data_sets_of_the_hub(tmp_path, monkeypatch):
    """Downloaded once, then read from the cache; a refusal names the setting to look at."""
    parquet = write(tmp_path / "a.parquet", [[3, 7], [4, 5]], [10, 9]).read_bytes()
    with small_hub({"README.md": b"not wanted", "data/train-00000.parquet": parquet}) as endpoint:
        download = partial(hub.snapshot_download, endpoint=endpoint, cache_dir=tmp_path / "cache", token=False)
        monkeypatch.setattr(hub, "snapshot_download", download)
        assert [p.target for p in load("lab/countdown")] == [10, 9]
        assert "data.revision" in refusal("lab/countdown", revision="v9")
        assert "data.path" in refusal("no/such")
    assert not list(tmp_path.rglob("README.md"))  # only what is needed
    assert len(load("lab/countdown")) == 2  # the server is gone
    assert "network" in refusal("no/such")


# ---- The split and the order -----------------------------------------------------------------------------------------


def keys(problems: list[Problem]) -> set[tuple]:
    return {(tuple(sorted(p.numbers)), p.target) for p in problems}


def test_train_and_held_out_share_no_problem_whatever_the_order_of_rows():
    """The public data set has the same problem in many rows and orders: a split by rows would leak."""
    rng = random.Random(0)
    rows = [Problem(tuple(rng.sample(p.numbers, 3)), p.target) for p in generate_problems(3, 1, 9, 10, 50) * 3]
    rng.shuffle(rows)
    train, held_out = split_problems(COUNTDOWN, rows, 100)
    held_keys = keys(held_out)
    assert len(held_out) == len(held_keys) == 100
    assert set(held_out) <= set(rows)
    assert train == [row for row in rows if not keys([row]) & held_keys]  # and no other row is lost
    train_too, held_out_too = split_problems(COUNTDOWN, rng.sample(rows, len(rows)), 100)
    assert (held_out, Counter(train)) == (held_out_too, Counter(train_too))


def test_a_filter_moves_no_problem_into_training():
    """What was held out before and passes the filter stays held out. (And the hash favours no targets.)"""
    problems = generate_problems(3, 1, 12, 10, 100)
    _, before = split_problems(COUNTDOWN, problems, 300)
    _, after = split_problems(COUNTDOWN, [p for p in problems if p.target <= 60], 300)
    assert {p for p in before if p.target <= 60} <= set(after)
    mean, mean_before = (sum(p.target for p in some) / len(some) for some in (problems, before))
    assert abs(mean - mean_before) < 5


def test_the_split_is_the_same_in_every_process_and_version():
    """A checkpoint trained on one split and judged on another would have seen its questions."""
    _, held_out = split_problems(COUNTDOWN, generate_problems(3, 1, 9, 10, 50), 3)
    assert held_out == [Problem((7, 7, 9), 14), Problem((2, 7, 9), 25), Problem((6, 6, 7), 29)]


def test_too_few_problems_to_split():
    problems = [Problem((1, 2), 3), Problem((2, 1), 3), Problem((1, 3), 4)]
    assert [len(side) for side in split_problems(COUNTDOWN, problems, 1)] in ([1, 1], [2, 1])
    for held_out in (2, 3, 512):
        with pytest.raises(UserError, match=rf"^2 .*{held_out}.*data\.held_out"):
            split_problems(COUNTDOWN, problems, held_out)


def test_the_order_is_a_function_of_seed_and_epoch():
    state = random.getstate()
    orders = [tuple(problem_order(50, seed, epoch)) for seed in range(15) for epoch in range(15)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == len(orders)  # (1, 12) is not (11, 2)
    assert random.getstate() == state  # nobody else's randomness is touched
    assert problem_order(10, 7, 2) == [1, 2, 0, 8, 4, 6, 3, 9, 7, 5]  # in every process and version
