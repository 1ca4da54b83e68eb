"""A task of one's own, in one file, that differs from Countdown in all it can; and its mistakes."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest

import closest_task
import train
import two_numbers_task
from data_types import Episode
from plumbing import tasks
from plumbing.terminal import UserError
from short_run import Done, resume, run, small_world

PARITY = '''"""An odd sum wants an odd length. The words of the question are Countdown's."""
from dataclasses import dataclass
from countdown_task import ASSISTANT_PREFIX, Problem as Numbers, question_text as words
from data_types import DataSettings, setting
SCORE = "right"
@dataclass(frozen=True, kw_only=True)
class Settings(DataSettings):
    largest: int = setting(9, "numbers below this", at_least=3)
load_problems = lambda data: [[a, b, 7] for a in range(data.largest) for b in range(data.largest)]
question_text = lambda problem: words(Numbers(tuple(problem), 20))
def grade(response, truncated, problem):
    right = 2.5 if len(response) % 2 == sum(problem) % 2 else -1.5
    return {"right": right, "length": -len(response) / 30} | ({"end": -0.25} if truncated else {})
'''
OWN = ("data.task=parity", "data.path=", "data.largest=12", "train.schedule=constant", "rollout.max_new_tokens=12")
FILES = {"parity": PARITY, "bare": PARITY.replace("Settings(", "Own(").replace("data.largest", "9"),
         "ungraded": PARITY.replace("def grade", "def rate"), "unscored": PARITY.replace("SCORE", "score")}  # fmt: skip


@pytest.fixture(autouse=True)
def _task_files(tmp_path, monkeypatch):
    for name, text in FILES.items():
        Path(tmp_path, f"{name}_task.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{name}_task", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tasks, "PLACES", (*tasks.PLACES, tmp_path))


def test_a_task_in_one_file_trains_is_measured_by_its_own_numbers_and_resumes(tmp_path, monkeypatch):
    """A score taken for 0 or 1, a success rate, p (1 - p) for a variance: right for Countdown and for nothing else."""
    graded, grade = [], train.grade
    monkeypatch.setattr(train, "grade", lambda *of: graded.append(grade(*of)) or graded[-1])
    whole = run(tmp_path / "whole", *OWN, model := small_world(tmp_path / "small")[0])
    assert "largest: 12" in (whole.folder / "config.yml").read_text()
    before, *steps = whole.metrics()
    for kind, parts in (("greedy", graded[:8]), ("sampled", graded[8:16])):
        scores, found = [each["right"] for each in parts], (before[f"eval_{kind}"], before[f"eval_{kind}_se"])
        assert found == pytest.approx((fmean(scores), pstdev(scores) / 8**0.5))
    for number, m in enumerate(steps, start=1):
        parts = graded[16 * number :][:16]
        totals = [sum(each.values()) for each in parts]
        assert (m["reward"], m["reward_std"]) == pytest.approx((fmean(totals), pstdev(totals)))
        for name in ("right", "length", "end"):  # truncated ones alone have the last
            assert m.get(f"reward_{name}", 0.0) == pytest.approx(fmean(each.get(name, 0.0) for each in parts))
    assert not re.search("success|correct|format", (whole.folder / "metrics.jsonl").read_text())
    assert run(tmp_path / "half", *OWN, model, "train.steps=2").status == 0
    half = resume(tmp_path / "half", "train.steps=3")
    assert (half.tensors("final"), half.samples()) == (whole.tensors("final"), whole.samples())


def complaint(done: Done) -> str:
    assert (done.status, len(done.complaints)) == (2, 1), done
    return done.complaints[0]


def test_what_is_not_numbers_by_name_is_no_reward(tmp_path, monkeypatch):
    """A forgotten return, or a nan that would reach every weight."""
    episode, task = Episode(None, [1], [2], [0.0], False, "text"), tasks.load_task("countdown")
    scores = [{"correct": score} for score in ("right", None, [1.0], math.nan, 10**400)]
    for value in [1.0, None, [1.0], "1.0", {}, {"format": 0.1}, {"correct": 1.0, "format": math.inf}, *scores]:
        with pytest.raises(UserError, match="grade"):
            tasks.grade(replace(task, grade=lambda *_, value=value: value), episode)
    monkeypatch.setattr("countdown_task.grade", lambda *_: None)
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
    assert run(tmp_path / "run", f"data.task={old}", "train.steps=1", "rollout.max_new_tokens=2").status == 0
    assert "data." in complaint(resume(tmp_path / "run", f"data.task={new}", "train.steps=2"))


def test_the_second_task_measures_nearness():
    """From 0 for a value as far from the target as 0 is to 1 for the target, whatever is negative or undefined."""
    problem, good = closest_task.Problem((3, 7, 12), 300), "</think><answer>3*7*12</answer>"
    nearness = {"3*7*12": 0.84, "12+7+3": 22 / 300, "3-7-12": 0.0, "7/(12-12)": 0.0, "3*7": 0.0, "nonsense": 0.0}
    for answer, value in nearness.items():
        reward = closest_task.grade(f"3*7=21 no\n{good.replace('3*7*12', answer)}", False, problem)
        assert reward == {"format": 0.1, "nearness": pytest.approx(value)}, answer
    for response, truncated in ((good.removeprefix("</think>"), False), (good + " so", False), (good, True)):
        assert sum(closest_task.grade(response, truncated, problem).values()) == 0
    targets = [problem.target for problem in closest_task.load_problems(closest_task.Settings(problems=50))]
    assert sum(100 <= target <= 300 for target in targets) == 50
    every = two_numbers_task.load_problems(two_numbers_task.Settings())
    right = {p for p in every for a, b in [p.numbers] if p.target in {a + b, b - a, a * b, b / a}}
    assert len(right) == len(every) == 654
