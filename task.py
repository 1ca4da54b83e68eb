"""What a run trains on: a task is one file that makes the problems, asks the question and grades the response.

`data.task: countdown` in the config names countdown_task.py; the fields of `Task` are what such a file defines.

    task = load_task("countdown")
    problem = task.load_problems(config.data)[0]            # Problem(numbers=(1, 1, 9), target=10)
    task.question_text(problem)                             # "Using the numbers [1, 1, 9], write an expression ..."
    task.grade("1 + 9 = 10</think> ...", False, problem)    # {"format": 0.0, "correct": 0.0}

The rest of the program handles problems without looking into them: all it needs is a `repr` that tells them apart.
"""

import hashlib
import importlib
import random
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from data_types import DataSettings, Episode, UserError


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
    problem_kind: Callable[[Any], str] = lambda problem: "all"  # evaluate.py reports each kind apart
    examine: Callable[[list[str], list[Any]], dict[str, float]] = lambda texts, problems: {}  # for evaluate.py


def load_task(name: str) -> Task:
    """The task of NAME_task.py, which is found like any module: beside train.py."""
    try:
        module = vars(importlib.import_module(f"{name}_task"))
    except ModuleNotFoundError as error:
        if error.name != f"{name}_task":
            raise
        there = sorted(path.name.removesuffix("_task.py") for path in Path(__file__).parent.glob("*_task.py"))
        raise UserError(f"data.task is {name}, but there is no {name}_task.py; there are {', '.join(there)}") from None
    missing = [field.name for field in fields(Task) if field.default is MISSING and field.name not in module]
    if missing:
        raise UserError(f"{name}_task.py does not define {' and '.join(missing)}: see task.py")
    return Task(**{field.name: module[field.name] for field in fields(Task) if field.name in module})


def grade(task: Task, episode: Episode) -> dict[str, float]:
    """The parts of a response's reward; UserError where the task returns anything but finite numbers by name."""
    parts: Any = task.grade(episode.text, episode.truncated, episode.problem)
    try:
        parts = {str(name): float(value + 0.0) for name, value in parts.items()}
        good = task.SCORE in parts and "std" not in parts  # reward_std is a metric of its own
        good = good and all(abs(value) < 1e9 for value in parts.values())  # so no nan either
    except (AttributeError, TypeError, ValueError, OverflowError):
        good = False
    if not good:
        example = f'{{"format": 0.1, "{task.SCORE}": 1.0}}'
        raise UserError(
            f"the task's grade returned {parts!r:.80}; it must be numbers by name, {task.SCORE} among them: {example}"
        )
    return parts


def split_problems(task: Task, problems: Iterable[Any], held_out: int) -> tuple[list[Any], list[Any]]:
    """Split into (train, held out): `held_out` different problems of which training has no copy.

    Problems are held out in the order of their keys' hashes, whatever their own order, so that a filter, too, moves as
    few of them as it can from one side to the other. Of several copies the one with the first `repr` is held out.
    """
    try:
        problems = list(problems)
    except TypeError:
        raise UserError(f"the task's load_problems returned {problems!r:.80}; it must be a list of problems") from None
    by_key: dict[str, Any] = {}
    for problem in problems:
        key = task.problem_key(problem)
        by_key[key] = min(by_key.get(key, problem), problem, key=repr)
    if len(by_key) <= held_out:
        cures = "lower data.held_out, widen the data's filters or use more data"
        raise UserError(f"{len(by_key)} different problems are too few to hold out {held_out} of them: {cures}")
    chosen = sorted(by_key, key=lambda key: hashlib.sha256(key.encode()).digest())[:held_out]
    taken = set(chosen)
    return [p for p in problems if task.problem_key(p) not in taken], [by_key[key] for key in chosen]


def problem_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count): the order in which an epoch visits the problems."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # seeded by a text: (1, 23) and (12, 3) stay apart
    return order
