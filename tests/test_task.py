"""A task of one's own, in one file, that differs from Countdown in all it can; and its mistakes."""

import math
import re
import sys
from pathlib import Path
from statistics import fmean, pstdev

import pytest
from short_run import Done, resume, run

import closest_task
import train
from config import load_config

PARITY = '''"""An odd sum wants an odd length. The words are Countdown's, or the tiny model would never end."""
from dataclasses import dataclass
from countdown_task import ASSISTANT_PREFIX, Problem as Numbers, question_text as words
from data_types import DataSettings, setting
SCORE = "right"
@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    """The numbers."""
    largest: int = setting(9, "numbers below this", at_least=3)
load_problems = lambda data: [[a, b, 7] for a in range(data.largest) for b in range(data.largest)]
question_text = lambda problem: words(Numbers(tuple(problem), 20))
def grade(response, truncated, problem):
    right = 2.5 if len(response) % 2 == sum(problem) % 2 else -1.5
    return {"right": right, "length": -len(response) / 30} | ({"end": -0.25} if truncated else {})
'''
OWN = ("data.task=parity", "data.path=", "data.largest=12", "train.schedule=constant", "rollout.max_new_tokens=32")


@pytest.fixture(autouse=True)
def _task_files(tmp_path, monkeypatch):
    bare = PARITY.replace("Settings(", "Own(").replace("data.largest", "9")
    ungraded, unscored = PARITY.replace("def grade", "def rate"), PARITY.replace("SCORE", "score")
    for name, text in {"parity": PARITY, "bare": bare, "ungraded": ungraded, "unscored": unscored}.items():
        Path(tmp_path, f"{name}_task.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{name}_task", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_task_in_one_file_trains_is_measured_by_its_own_numbers_and_resumes(tmp_path, monkeypatch):
    """A score taken for 0 or 1, a success rate, p (1 - p) for a variance: right for Countdown and for nothing else."""
    graded, grade = [], train.grade
    monkeypatch.setattr(train, "grade", lambda *of: graded.append(grade(*of)) or graded[-1])
    whole = run(tmp_path / "whole", *OWN)
    assert (whole.status, load_config(whole.folder / "config.yml").data.largest) == (0, 12)
    before, *steps = whole.metrics()
    for kind, parts in (("greedy", graded[:8]), ("sampled", graded[8:16])):
        scores = [each["right"] for each in parts]
        found, expected = (before[f"eval_{kind}"], before[f"eval_{kind}_se"]), (fmean(scores), pstdev(scores) / 8**0.5)
        assert found == pytest.approx(expected)
    for number, m in enumerate(steps, start=1):
        parts = graded[16 * number :][:16]
        totals = [sum(each.values()) for each in parts]
        assert (m["reward"], m["reward_std"]) == pytest.approx((fmean(totals), pstdev(totals)))
        for name in ("right", "length", "end"):  # only truncated ones have the last
            assert m[f"reward_{name}"] == pytest.approx(fmean(each.get(name, 0.0) for each in parts))
    assert not re.search("success|correct|format", (whole.folder / "metrics.jsonl").read_text())
    assert run(tmp_path / "half", *OWN, "train.steps=2").status == 0
    half = resume(tmp_path / "half", "train.steps=3")
    assert (half.tensors("final"), half.samples()) == (whole.tensors("final"), whole.samples())


def complaint(done: Done) -> str:
    assert (done.status, len(done.complaints)) == (2, 1), done
    return done.complaints[0]


NONSENSE = [1.0, None, [1.0], "1.0", {}, {"format": 0.1}, {"correct": "right"}, {"correct": None}, {"correct": [1.0]},
            {"correct": math.nan}, {"correct": 1.0, "format": math.inf}, {"correct": 10**400}]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: f"{value!s:.20}")
def test_what_is_not_numbers_by_name_is_no_reward(value, tmp_path, monkeypatch):
    """A forgotten return, or a nan that would reach every weight: named at once, not hours later somewhere else."""
    monkeypatch.setattr("countdown_task.grade", lambda *_: value)
    assert "grade" in complaint(run(tmp_path / "run"))


@pytest.mark.parametrize(("overrides", "words"), [
    ("data.task=nowhere", "nowhere_task.py countdown"), ("data.task=ungraded", "ungraded_task.py grade"),
    ("data.task=unscored", "unscored_task.py SCORE"), ("data.task=parity data.largst=3", "data.largst data.largest"),
    ("data.task=parity data.largest=1", "data.largest"), ("data.task=parity data.target_low=3", "data.target_low"),
    ("data.largest=3", "data.largest"),
])  # fmt: skip
def test_a_task_that_is_not_whole_or_a_setting_that_is_not_its_own_is_named(overrides, words, tmp_path):
    line = complaint(run(tmp_path / "run", *overrides.split()))
    assert [word for word in words.split() if word not in line] == []


@pytest.mark.parametrize(("old", "new"), [("bare", "countdown"), ("parity", "countdown"), ("bare", "parity")])
def test_a_run_keeps_its_task(old, new, tmp_path):
    """Each has settings that the other does not know."""
    assert run(tmp_path / "run", f"data.task={old}", "train.steps=1").status == 0
    assert "data." in complaint(resume(tmp_path / "run", f"data.task={new}", "train.steps=2"))


def test_the_second_task_measures_nearness():
    """From 0 for a value as far from the target as 0 is to 1 for the target, whatever is negative or undefined."""
    problem, answers = closest_task.Problem((3, 7, 12), 300), {"3*7*12": 0.84, "12+7+3": 22 / 300, "3-7-12": 0.0}
    for answer, nearness in (answers | {"7/(12-12)": 0.0, "3*7": 0.0, "nonsense": 0.0}).items():
        reward = closest_task.grade(f"3*7=21 no\n</think>\n<answer>{answer}</answer>", False, problem)
        assert reward == {"format": 0.1, "nearness": pytest.approx(nearness)}, answer
    for response in ("<answer>3*7*12</answer>", "</think><answer>3*7*12</answer> so"):
        assert sum(closest_task.grade(response, False, problem).values()) == 0
    assert sum(closest_task.grade("</think><answer>3*7*12</answer>", True, problem).values()) == 0
    problems = closest_task.load_problems(closest_task.Settings(problems=50))
    assert len(problems) == 50
    assert all(100 <= p.target <= 300 for p in problems)
