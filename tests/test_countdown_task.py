"""The Countdown task: the reward rule by rule, hostile responses, problems and their files, the split and the order."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy
import pandas
import pyarrow.parquet
import pytest

import countdown_task as task
from countdown_task import Problem, Settings, grade, load_problems, question_text
from fuzz_grader import DEEPEST, fuzz, graded
from plumbing import tasks
from plumbing.tasks import load_task, problem_order, split_problems
from plumbing.terminal import UserError
from tools.make_tiny import generate_problems

PUZZLE, X = Problem((3, 7, 12), 33), "12 + 7 * 3"  # and its solution


def test_the_question_names_the_problem_and_shows_the_form_in_digits():
    """With letters in its example, real models wrote `(7 + 14) / a`; numbers as in a problem would get copied."""
    text = question_text(PUZZLE)
    example = re.fullmatch(r"\D*\[3, 7, 12\]\D{1,40}33\D*<answer>(.*)</answer>\D*", text)[1]
    numbers = tuple(map(int, re.findall(r"\d+", example)))
    assert min(numbers) > 100
    assert task.evaluate_expression(example, numbers) is not None
    assert all(part in text for part in ("+ - * /", "exactly once", "<think> </think>", "<answer> </answer>"))
    assert task.ASSISTANT_PREFIX.endswith("<think>")  # so what is sampled goes on inside the block


GOOD = f"12 - 7 is 5, too low</think>\n<answer>{X}</answer>"
# blocks that stay open, lie inside each other or in another order, and two answers: hedging must not pay
NOTHING = """X </think><ANSWER>X</ANSWER> </think><answer>X </think><answer>X</answer </think>X</answer>
    <answer>X</answer> <answer>X</answer></think> <answer></think>X</answer> </think></answer>X<answer>
    </think><answer><think>X</think></answer> <think></think><answer>X</answer> </think></think><answer>X</answer>
    </think><think></think><answer>X</answer> </think><answer>X</answer><think></think>
    </think><answer>X</answer><answer>X</answer> </think><answer>X</answer><answer>3</answer>
    </think><answer><answer>X</answer></answer> <answer>3</answer></think><answer>X</answer>
    </think><answer>X</answer></answer> </think><answer>3</answer><answer>X</answer>
    </think><answer><answer>X</answer>"""
RESPONSES = {  # (format, correct): what was sampled after "<think>"; almost tags are text
    (0.1, 1.0): [GOOD, *(f"</think>{gap}<answer>{X}</answer>" for gap in ("", " ", "\r\n \t\n")), f"3 = 9 ** 9{GOOD}",
                 GOOD + "\n", GOOD + "\r\n \t", f"< think> <answer > <Answer> </ think></think>\n<answer>{X}</answer>"],
    # the format does not depend on what the answer is
    (0.1, 0.0): [*(GOOD.replace(X, answer) for answer in ("3 + 7", "I give up", "")), X + GOOD.replace(X, "3 + 7")],
    # white space between the blocks and after them, and nothing else
    (0.0, 1.0): [*(f"</think>{gap}<answer>{X}</answer>" for gap in (" so: ", "\xa0")), GOOD + " done", GOOD + "\n."],
    (0.0, 0.0): ["", *(text.replace("X", X) for text in NOTHING.split())],
}  # fmt: skip


@pytest.mark.parametrize("reward", RESPONSES)
def test_format(reward):
    for response in RESPONSES[reward]:
        assert tuple(grade(response, False, PUZZLE).values()) == reward, response
        assert grade(response, True, PUZZLE) == {"format": 0.0, "correct": reward[1]}  # truncated: no format


LONGEST = "-" * (task.MAX_EXPRESSION_LENGTH - 5) + "(3+7)"
EXPRESSIONS = [  # numbers, target, right answers, wrong answers
    ((3, 7, 12), 33, ["12 + 7 * 3", "7*3+12", "\n\t( 12 + (7) * 3 )\r\n", "12 + 7 * 3 = 33", "12 + 7 * 3 =\n33\n"],
     ["33", "12 + 7 + 7 + 7", "1 * 2 + 7 * 3 + 10", "12 + 7 + 3", "12 - 7 * 3"]),
    # each number once, as it is written, and no other
    ((3, 7, 12), 36, [], ["12 * 3"]), ((3, 7, 12), 45, [], ["12 + 7 * 3 + 12"]), ((5, 5, 5), 30, ["5 * 5 + 5"], []),
    ((3, 7, 12), 33, [], ["12 + 7 * 3 + 0", "12 + 7 * 3 * 1", "12 + 07 * 3", "12 + 7 * 3.0", "12. + 7 * 3",
     "12 + 7 * 3e0", "1_2 + 7 * 3", "0xC + 7 * 3", "12 + 7 * \uff13", "12 + 7 * \u0663", "12 + 7 * \u00b3"]),
    # exactly the target: in floats 1 / 49 * 49 is 0.9999999999999999, and 10**18 + 1/3 is 10**18
    ((1, 7, 49, 49), 8, ["1 / 49 * 49 + 7"], []), ((3, 3, 8, 8), 24, ["8 / (3 - 8 / 3)"], []),
    ((1, 3, 10**6, 10**6, 10**6), 10**18, [], ["1000000 * 1000000 * 1000000 + 1 / 3"]), ((1, 2), 12, [], ["12", "1 2"]),
    ((2, 7), 3, [], ["7 / 2", "7 // 2"]), ((2, 7), 4, [], ["7 / 2"]), ((3, 7), -4, ["3 - 7"], []),
    # precedence, association, signs, other operations and languages, division by zero
    ((2, 3, 4), 20, ["(2 + 3) * 4"], ["2 + 3 * 4"]), ((2, 3, 10), 5, ["10 - 3 - 2"], ["10 - (3 - 2)"]),
    ((2, 4, 16), 2, ["16 / 4 / 2"], ["16 / 4 * 2"]), ((3, 7), 4, ["-3 + 7", "- (3 + (-7))"], ["3 - 7", "7 \u2212 3"]),
    ((3, 7), 10, ["+3 + +7", "3 - -7", "-(-(3 + 7))", "--3 + +-+ -7"], ["3 - - - 7", "3 + 7 -", "3 + 7 +", "-"]),
    ((3, 7), 21, ["-3 * -7"], ["3 \xd7 7", "3 \\times 7", "3(7)", "(3)(7)", "3 x 7"]), ((2, 7), 1, [], ["7 % 2"]),
    ((2, 3), 8, [], ["2 ** 3", "2 ^ 3"]), ((3, 7), 10, [], ["(3 + 7", "3 + 7)", ")3 + 7(", "3 + () 7", "[3 + 7]"]),
    ((3, 7), 10, [], ["__import__('os').getpid() * 0 + 3 + 7", "3 + 7 # easy", "3 + 7;", "3 + 7, 3 + 7", "$3 + 7$"]),
    ((3, 7), 10, [], ["3 + 7\n3 + 7", "3 +\xa07", "\xa03 + 7", "3 + 7\u2028", "3 +\x007", "\ud800", "ten", "", "  "]),
    ((3, 3, 7), 7, [], ["7 / (3 - 3)"]), ((3, 3, 7), 0, ["(3 - 3) / 7"], ["(3 - 3) / (7 - 7)"]),
    # "= target" may follow, and nothing else
    ((3, 7), 10, ["3 + 7 = 10"], ["3 + 7 = 11", "10 = 3 + 7", "3 + 7 = 10 = 10", "3 + 7 == 10", "3 + 7 =", "= 10",
     "= 3 + 7", "3 + 7 = 5 + 5", "3 + 7 = 10.0", "3 + 7 = 010", "3 + 7 = 1 0"]),
    # bounded length and depth: Python's parser must neither raise nor overflow the stack
    ((3, 7), -10, [LONGEST], [f"--{LONGEST}", "-" * 500, LONGEST[:-1]]),
    ((3, 7), 10, ["(" * DEEPEST + "3 + 7" + ")" * DEEPEST, " " * 10_000 + "3 +" + " " * 10_000 + "7"],
     ["(" * n + "3 + 7" + ")" * n for n in (DEEPEST + 1, 300)]),
    ((3, 7), 10, [], ["(" * 490 + "3 + 7", "3 + 7" + ")" * 490, "(-" * 240 + "3 + 7", "3(" * 9 + "7" + "()" * 230]),
]  # fmt: skip


@pytest.mark.parametrize(("numbers", "target", "right", "wrong"), EXPRESSIONS)
def test_expression(numbers, target, right, wrong):
    for answer in right + wrong:
        reward = grade(f"</think>\n<answer>{answer}</answer>", False, Problem(numbers, target))
        assert reward == {"format": 0.1, "correct": float(answer in right)}, answer


def test_hostile_responses_agree_with_the_oracle_in_bounded_time():
    seen = fuzz(4000, seed=1)  # the long form: see fuzz_grader.py
    assert all(seen[kind] > least for kind, least in {"solved": 200, "deep": 20, "formed": 400, "long": 4}.items())


MONSTERS = [  # a million characters: the first text again and again, then the second
    ("(", ""), ("(\n", ")" * 500_000), ("-", "3"), ("9", ""), ("3 + ", "7"), (" ", "x"), ("=", "33"), ("\uff13", ""),
    ("<answer>", "</answer>"), ("<think>", "</think>"), ("<", "answer>"), ("</answe", "r"), ("\ud800", ""),
]  # fmt: skip


@pytest.mark.parametrize("place", ["</think>\n<answer>{}</answer>", "{}" + GOOD, GOOD.replace("\n", "{}"), GOOD + "{}"])
def test_monsters_neither_raise_nor_take_long(place):
    """A quadratic regular expression or a deep recursion would need hours or overflow the stack here."""
    for piece, end in MONSTERS:
        reward = graded(place.format(piece * (1_000_000 // len(piece)) + end), False, PUZZLE)
        assert reward["correct"] == float(X in place and not end.endswith(("answer>", "think>")))


def write(file: Path, nums: object, target: object) -> Path:
    """A real parquet file with these two columns."""
    pyarrow.parquet.write_table(pyarrow.table({"target": target, "nums": nums}), file)
    return file


def load(path: Path, **filters: int | str) -> list[Problem]:
    return load_problems(Settings(path=str(path), **filters))


def check_refusal(path: Path, words: str = "nums", **filters: int) -> None:
    """One line that names the path."""
    with pytest.raises(UserError, match=f"{path}.*{words}") as caught:
        load(path, **filters)
    assert str(caught.value).isprintable()


def test_parquet_files_as_others_write_them(tmp_path, capsys):
    """pandas with other integers and columns, and beside what is no parquet; whole floats."""
    (tmp_path / "README.md").write_text("not parquet")
    small, target = [numpy.array([3, 7], dtype=numpy.uint8), [4, 5, 6]], numpy.array([10, 20], dtype=numpy.int16)
    frame = pandas.DataFrame({"note": ["a", "b"], "target": target, "nums": small}, index=[7, 9])
    frame.to_parquet(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [[3.0, 7.0]], [10.0])
    expected = [((3, 7), 10), ((4, 5, 6), 20), ((3, 7), 10)]
    assert repr(load(tmp_path)) == repr([Problem(*row) for row in expected])  # Python's integers, not numpy's
    assert capsys.readouterr() == (f"data    {tmp_path}: 3 rows of a.parquet, b.parquet\n", "")


NUMBERS = [None, [], [5], [1, 2, 3, 4, 5, 6, 7], [3, None], [3, 0], [3, -7], [3, 10**6 + 1], [3, 2**63 - 1]]
NAN, INF = float("nan"), float("inf")
BAD_COLUMNS = [
    *(([n], [10]) for n in ("[3, 7]", 3, ["3", "7"], [[3]], [True] * 2, [3.5, 7.0], {"a": 3}, [NAN, 7.0], [INF, 7.0])),
    *(([[3, 7]], [target]) for target in ("10", "\x1b[31m\n", [10], -4, NAN, INF, 10.5, 1e300, True)),
    ([[3, 7]] * 5, [0] * 5), (pyarrow.array([], pyarrow.list_(pyarrow.int64())), pyarrow.array([], pyarrow.int64())),
]  # fmt: skip


def test_a_bad_row_is_dropped_counted_and_shown(tmp_path, capsys):
    """The good rows around it survive, even though one hole makes pandas read the whole column as floats."""
    for nums, target in [*((nums, 10) for nums in NUMBERS), *(([3, 7], target) for target in (None, 0, 10**15))]:
        file = write(tmp_path / "a\x1b[31m.parquet", [[3, 7], nums, nums, [4, 5]], [10, target, target, 9])
        assert load(file) == [Problem((3, 7), 10), Problem((4, 5), 9)]
        said = capsys.readouterr().err.removesuffix("\n")
        assert all(part in said for part in (str(UserError(str(file))), "2 of 4"))
        assert said.isprintable()  # one harmless line


def test_a_file_without_a_good_row_or_the_columns_or_cut_is_refused_by_name(tmp_path):
    for nums, target in BAD_COLUMNS:
        check_refusal(write(tmp_path / "a.parquet", nums, target))
    file = write(tmp_path / "a.parquet", [[3, 7]], [10])
    for content in (b"", b"PAR1", b"nums,target\n", file.read_bytes()[:-1], file.read_bytes()[4:]):
        (tmp_path / "b.parquet").write_bytes(content)
        check_refusal(tmp_path / "b.parquet", "not a parquet file$")
    for names in (["nums", "tarjet"], ["Nums", "target"], ["nums", "target", "target"]):
        columns = [pyarrow.array([[3, 7]]), pyarrow.array([10]), pyarrow.array([11])][: len(names)]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names), file)
        check_refusal(file, f"has {', '.join(names)}.* data.columns")


def test_columns_of_any_type_and_name(tmp_path):
    """A null is one row less, and what pandas says about dtypes that NumPy does not know is ignored."""
    meta = {"pandas": '{"columns": [{"name": "nums", "numpy_type": "list<item: int64>[pyarrow]"}]}'}
    plain, two = pyarrow.list_(pyarrow.uint64()), ["nums", "target"]
    kinds = [*map(pyarrow.list_, (pyarrow.int8(), pyarrow.float32())), pyarrow.large_list(pyarrow.int16())]
    named = [(["numbers", "goal"], {}), (["a b", "n"], {"columns": "a b,n"})]
    for kind, names, settings in [*((kind, two, {}) for kind in kinds), *((plain, *row) for row in named)]:
        columns = [pyarrow.array([[3, 7], None, [4, 5]], kind), pyarrow.array([10, 11, 9])]
        table = pyarrow.Table.from_arrays(columns, names).replace_schema_metadata(meta)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert load(tmp_path, **settings) == [Problem((3, 7), 10), Problem((4, 5), 9)]


def test_the_train_split_is_read_where_there_is_one_or_what_is_chosen(tmp_path, capsys):
    """A test split beside it was trained on without a word."""
    splits = [  # files of a folder, data.files, those that are read
        ("data/train-0-of-1 data/test-0-of-1", "", "data/train-0-of-1"), ("a/train-0 a/test-0", "test-*", "a/test-0"),
        ("train/0 validation/0", "", "train/0"), ("a_TRAIN train1 strain", "", "a_TRAIN train1"),
        ("b test", "", "b test"), ("._a a .cache/b", "", "a"), ("data/x data/y", "data/x*", "data/x"),
    ]  # fmt: skip
    for number, (there, pattern, read) in enumerate(splits):
        for name in there.split():
            file = tmp_path / f"{number}" / f"{name}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, [[3, 7]], [10])
        assert len(load(tmp_path / f"{number}", files=pattern)) == len(read.split())
        assert capsys.readouterr().out.split(" of ")[1] == f"{read.replace(' ', '.parquet, ')}.parquet\n"


def test_filters(tmp_path):
    file = write(tmp_path / "a.parquet", [[1, 2], [1, 2, 3], [1, 2, 3, 4], [5, 6, 7]], [3, 6, 10, 18])
    assert [p.target for p in load(file, most_numbers=3)] == [3, 6, 18]
    assert [p.target for p in load(file, target_high=10)] == [3, 6, 10]
    check_refusal(file, "data.most_numbers", target_high=2)


def split(rows: list[Problem], held_out: int) -> tuple[list[Problem], list[Problem]]:
    return split_problems(replace(load_task("countdown"), load_problems=lambda data: rows), Settings(held_out=held_out))


def test_train_and_held_out_share_no_problem_whatever_the_order_of_rows():
    """The public data set has the same problem in many rows and orders: a split by rows would leak."""
    rng = random.Random(0)
    rows = [Problem(tuple(rng.sample(p.numbers, 3)), p.target) for p in generate_problems(3, 1, 7, 10, 50) * 3]
    rng.shuffle(rows)
    train, held_out = split(rows, 100)
    held_keys = {(*sorted(p.numbers), p.target) for p in held_out}
    assert (len(held_out), len(held_keys), {*held_out} - {*rows}) == (100, 100, set())
    assert train == [p for p in rows if (*sorted(p.numbers), p.target) not in held_keys]  # and no other row is lost
    train_too, held_out_too = split(rng.sample(rows, len(rows)), 100)
    assert (held_out, Counter(train)) == (held_out_too, Counter(train_too))


def test_the_split_is_the_same_in_every_process_and_version_and_a_filter_moves_no_problem_into_training():
    """A checkpoint trained on one split and judged on another would have seen its questions. No target is favoured."""
    problems = generate_problems(3, 1, 9, 10, 50)
    _, before = split(problems, 300)
    _, after = split([p for p in problems if p.target <= 30], 300)
    assert before[:3] == [Problem((7, 7, 9), 14), Problem((2, 7, 9), 25), Problem((6, 6, 7), 29)]
    assert {p for p in before if p.target <= 30} <= set(after)
    assert abs(fmean(p.target for p in problems) - fmean(p.target for p in before)) < 3
    with pytest.raises(UserError, match=r"^2 .*data\.held_out=2"):  # copies count once
        split([Problem((1, 2), 3), Problem((2, 1), 3), Problem((1, 3), 4)], 2)


def test_the_order_is_a_function_of_seed_and_place():
    """Each epoch takes every problem once, in an order of its own, and steps may go from one epoch into the next."""
    state = random.getstate()
    orders = [tuple(problem_order(50, seed, 50 * epoch, 50 * epoch + 50)) for seed in range(15) for epoch in range(15)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == len(orders)  # (1, 12) is not (11, 2)
    whole = problem_order(50, 3, 0, 500)
    assert all(problem_order(50, 3, *part) == whole[slice(*part)] for part in ((0, 7), (45, 55), (99, 100), (20, 330)))
    tasks.epoch_order.cache_clear()
    assert [problem_order(50, 3, at, at + 3) for at in range(90)] == [whole[at : at + 3] for at in range(90)]
    assert tasks.epoch_order.cache_info().misses == 2  # half a million problems take a second to shuffle
    assert random.getstate() == state  # nobody else's randomness is touched
    assert problem_order(10, 7, 20, 30) == [1, 2, 0, 8, 4, 6, 3, 9, 7, 5]  # in every process and version
