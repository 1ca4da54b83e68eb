"""What a run trains on: a task is one file that makes the problems, asks the question and grades the response.

`data.task: countdown` in the config names countdown_task.py; the fields of `Task` are what such a file defines.

    task = load_task("countdown")
    problem = task.load_problems(config.data)[0]            # Problem(numbers=(1, 1, 9), target=10)
    task.question_text(problem)                             # "Using the numbers [1, 1, 9], write an expression ..."
    task.grade("1 + 9 = 10</think> ...", False, problem)    # {"format": 0.0, "correct": 0.0}

The rest of the program handles problems without looking into them: all it needs is a `repr` that tells them apart.
"""

import gc
import hashlib
import importlib
import math
import random
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from heapq import nsmallest
from pathlib import Path
from textwrap import shorten
from typing import Any

import pyarrow.parquet

from data_types import DataSettings, Episode
from plumbing.model_folder import find_folder
from plumbing.terminal import UserError, say, warn

PLACES = (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[1] / "examples")


@dataclass(frozen=True)
class Task:
    """What a task file defines; what has a default may be left out."""

    load_problems: Callable[[Any], list[Any]]  # from the settings of the section `data`
    question_text: Callable[[Any], str]  # the user's message
    grade: Callable[[str, bool, Any], dict[str, float]]  # (response, truncated, problem): the parts of the reward
    SCORE: str  # the part that evaluations report
    ASSISTANT_PREFIX: str = ""  # opens the assistant's turn and is part of the prompt
    Settings: type[DataSettings] = DataSettings  # with the task's own settings added
    Problem: Any = None  # a dataclass of texts, numbers and tuples of them, for evaluate.py to ask one question
    problem_key: Callable[[Any], str] = repr  # problems with the same key are copies of one problem


def load_task(name: str) -> Task:
    """The task of NAME_task.py, which stands beside train.py or in examples/."""
    files = {path.name.removesuffix("_task.py"): path for place in PLACES for path in place.glob("*_task.py")}
    if name not in files:
        raise UserError(f"data.task is {name}, but there is no {name}_task.py; there are {', '.join(sorted(files))}")
    sys.path += [str(place) for place in PLACES if str(place) not in sys.path]
    module = vars(importlib.import_module(f"{name}_task"))
    missing = [field.name for field in fields(Task) if field.default is MISSING and field.name not in module]
    if missing:
        raise UserError(f"{name}_task.py does not define {' and '.join(missing)}: see plumbing/tasks.py")
    return Task(**{field.name: module[field.name] for field in fields(Task) if field.name in module})


def grade(task: Task, episode: Episode) -> dict[str, float]:
    """The parts of a response's reward; UserError where the task returns anything but finite numbers by name."""
    parts: Any = task.grade(episode.text, episode.truncated, episode.problem)
    with suppress(AttributeError, TypeError, ValueError, OverflowError):
        numbers = {str(name): float(value) for name, value in parts.items()}
        if task.SCORE in numbers and "std" not in numbers and all(map(math.isfinite, numbers.values())):
            return numbers  # reward_std is a metric of its own
    raise UserError(f"the task's grade returned {parts!r:.80}; it must return numbers by name, {task.SCORE} among them")


def split_problems(task: Task, data: DataSettings) -> tuple[list[Any], list[Any]]:
    """The task's problems as (train, held out): `held_out` different ones of which training has no copy.

    Problems are held out in the order of their keys' hashes, whatever their own order, so that a filter, too, moves as
    few of them as it can from one side to the other. Of several copies the one with the first `repr` is held out.
    """
    gc.disable()  # what is made here stays: to search it for garbage again and again takes longer than to make it
    problems, by_key = task.load_problems(data), dict[str, Any]()
    gc.enable()
    keys = [task.problem_key(problem) for problem in problems]
    for key, problem in zip(keys, problems, strict=True):
        by_key[key] = min(by_key[key], problem, key=repr) if key in by_key else problem
    if len(by_key) <= data.held_out:
        raise UserError(f"{len(by_key)} different problems, too few for data.held_out={data.held_out}: lower it")
    chosen = nsmallest(data.held_out, by_key, lambda key: hashlib.sha256(key.encode()).digest())
    held_out = [by_key.pop(key) for key in chosen]  # those that are left are trained on
    return [p for key, p in zip(keys, problems, strict=True) if key in by_key], held_out


def problem_order(count: int, seed: int, begin: int, end: int) -> list[int]:
    """Which of `count` problems come at places `begin` to `end`: each epoch goes through all in an order of its own."""
    return [epoch_order(count, seed, place // count)[place % count] for place in range(begin, end)]


@lru_cache(maxsize=2)  # a step may go from one epoch into the next
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeded by a text: (1, 23) and (12, 3) stay apart
    return order


# ---- Problems from parquet files ---------------------------------------------------------------------------------

TRAIN = re.compile("(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)  # in the names of a split: data/train-00000.parquet


def find_parquet(data: DataSettings) -> dict[str, Path]:
    """The parquet files at data.path, by name: those that data.files matches, or those of a train split, or all."""
    path = find_folder(data)
    if path.is_file():
        return {path.name: path}
    found = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob(data.files or "*.parquet"))}
    files = {name: file for name, file in found.items() if not re.search(r"(^|/)[._]", name)}  # hidden ones
    return {name: file for name, file in files.items() if data.files or TRAIN.search(name)} or files


def read_problems(data: DataSettings, columns: str, make: Callable[..., Any]) -> list[Any]:
    """What `make(*row)` returns for the rows of a parquet file, or of those in a folder that `data.files` chooses.

    columns: such as "nums/numbers,target", where a file may have either name of the first. Rows for which `make`
    returns None are dropped, counted and the first is shown. Raises UserError when a file cannot be read or no problem
    is found.
    """
    rows, files = [], find_parquet(data) if data.path else {}
    for file in files.values():
        try:
            table = pyarrow.parquet.ParquetFile(file).read()
        except Exception as error:  # a damaged file comes out as almost any kind of error
            raise UserError(f"{file}: damaged, or not a parquet file") from error
        there = table.column_names
        chosen = [next(filter(there.__contains__, names.split("/")), "") for names in columns.split(",")]
        if any(there.count(name) != 1 for name in chosen):
            raise UserError(f"{file}: needs columns {columns}, has {', '.join(there):.300}: set data.columns")
        rows += list(zip(*(table[name].to_pylist() for name in chosen), strict=True))
    made = [make(*row) for row in rows]
    dropped = [row for row, problem in zip(rows, made, strict=True) if problem is None]
    if len(dropped) == len(rows):
        raise UserError(f"data.path={data.path}: no problem in columns {columns} of a .parquet file there")
    if dropped:
        warn(f"{data.path}: dropped {len(dropped)} of {len(rows)} rows, such as {dropped[0]!a:.80}")
    say(f"data    {data.path}: {len(rows):,} rows of {shorten(', '.join(files), 200)}")
    return [problem for problem in made if problem is not None]
