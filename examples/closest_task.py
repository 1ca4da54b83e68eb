"""Closest: come as close to the target as you can. The second task, and a pattern for one of your own.

    python train.py --config config_tiny.yml --name closest data.task=closest data.path=

The targets are large, and often nothing equals them, so a response earns how near it comes: from [3, 7, 12] to 300,
3 * 7 * 12 = 252 earns 252 / 300. That is no success or failure, but any number from 0 to 1. The problems are made here:
there is no file. The question is Countdown's, word for word, because the tiny model knows no other.
"""

import random
import re
from dataclasses import dataclass

from countdown_task import ASSISTANT_PREFIX, Problem, evaluate_expression, question_text
from data_types import DataSettings, setting
from plumbing.terminal import UserError

# the first, second and last of these come from Countdown and are part of this task
__all__ = ["ASSISTANT_PREFIX", "SCORE", "Problem", "Settings", "grade", "load_problems", "question_text"]

SCORE = "nearness"  # the part of the reward that evaluations report
FORMAT = re.compile(r"[^<]*</think>\s*<answer>([^<]*)</answer>")


@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """The task and its problems."""

    problems: int = setting(4000, "problems to make", at_least=2, at_most=10**6)
    target_low: int = setting(100, "targets from this", at_least=1)
    target_high: int = setting(300, "targets up to this", at_least=1)


def load_problems(data: Settings) -> list[Problem]:
    """Three numbers up to 15 and a target each, the same ones every time."""
    if data.target_low > data.target_high:
        raise UserError(
            f"data.target_low is {data.target_low}, more than data.target_high: {data.target_high}"
        )
    rng = random.Random(0)
    numbers = [tuple(sorted(rng.randint(1, 15) for _ in range(3))) for _ in range(data.problems)]
    return [Problem(chosen, rng.randint(data.target_low, data.target_high)) for chosen in numbers]


def grade(response: str, truncated: bool, problem: Problem) -> dict[str, float]:
    """0.1 for the format, and from 1 for the target itself down to 0 for a value as far from it as 0 is."""
    found = FORMAT.fullmatch(response)
    if truncated or not found:
        return {"format": 0.0, SCORE: 0.0}
    value = evaluate_expression(found[1], problem.numbers)
    if value is None:
        return {"format": 0.1, SCORE: 0.0}
    return {"format": 0.1, SCORE: max(0.0, 1.0 - float(abs(value - problem.target)) / problem.target)}
