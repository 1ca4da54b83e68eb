"""Two numbers: the easiest Countdown, for a real model of 0.5B parameters on a CPU. A task can be as short as this.

    python train.py --config examples/two_numbers.yml

All 654 problems of two numbers up to 20 that have a solution. The question is Countdown's without its example, which
a model of this size copies instead of solving the problem: docs/real_model/README.md has the measurement.
"""

from itertools import combinations_with_replacement

from countdown_task import ASSISTANT_PREFIX, SCORE, Problem, grade, problem_key
from data_types import DataSettings as Settings

# what comes from Countdown is part of this task
__all__ = [
    "ASSISTANT_PREFIX",
    "SCORE",
    "Problem",
    "Settings",
    "grade",
    "load_problems",
    "problem_key",
    "question_text",
]


def load_problems(data: Settings) -> list[Problem]:
    pairs = combinations_with_replacement(range(1, 21), 2)
    return [Problem((a, b), target) for a, b in pairs for target in targets(a, b)]


def targets(a: int, b: int) -> list[int]:
    """The positive integers that a and b, the larger, make."""
    made = {a + b, a * b, b - a} | ({b // a} if b % a == 0 else set())
    return sorted(made - {0})


def question_text(problem: Problem) -> str:
    return (
        f"Using the numbers {list(problem.numbers)}, write an expression that equals {problem.target}. "
        "Use each number exactly once. You may use + - * / and parentheses. Think inside <think> </think>, "
        "then give only the expression inside <answer> </answer>."
    )
