"""evaluate.py and plot.py on a short run: figures that agree with a count by hand, one line where input is wrong."""

import itertools
import json
import math
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from short_run import ROOT, run

import evaluate
import plot
from countdown_task import Problem
from data_types import Sampling
from task import grade
from train import make_generator

SMALL = ["data.held_out=12", "train.threads=1", "rollout.max_new_tokens=48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    done = run(tmp_path_factory.mktemp("runs") / "one", "train.steps=2", "eval.every=1")
    assert (done.status, done.complaints) == (0, [])
    return done.folder


@pytest.fixture
def ask(capsys):
    """Runs evaluate.py; its status and what it prints, on stdout and on stderr."""

    def ask(*words: object) -> tuple[int, str, str]:
        status = evaluate.main([*map(str, words)])
        return status, *capsys.readouterr()

    return ask


def test_best_of_k_is_the_mean_over_all_choices_of_k():
    """The naive estimate 1 - (1 - c/n)^k is biased: for c = 2, n = 3, k = 2 it says 0.89, and no pair misses."""
    assert evaluate.best_of(2, [1.0, 0.0, 1.0]) == 1.0
    for values in ([0.0, 1.0, 0.0, 0.0, 1.0], [-3.0, 0.5, 0.5, 7.0]):
        for k in range(1, len(values) + 1):
            expected = fmean(max(chosen) for chosen in itertools.combinations(values, k))
            assert evaluate.best_of(k, values) == pytest.approx(expected)


def test_the_figures_are_those_of_the_responses(folder, ask):
    """Held-out problems, settings and length limit are those of the run that the model belongs to."""
    status, printed, _ = ask(folder / "final", *SMALL, "--samples", 4, "--json")
    figures = json.loads(printed)
    agent = evaluate.load_agent(str(folder / "final"), folder / "config.yml", SMALL)
    responses = evaluate.respond(agent, 4, 1.0, 0)
    correct = [[float(grade(agent.task, e)["correct"]) for e in group] for group in responses]
    rates = [sum(group) / 4 for group in correct]
    sampled = figures["sampled"]
    assert (status, figures["problems"], len(agent.held_out), agent.config.train.seed) == (0, 12, 12, 9)
    assert sampled["correct"] == pytest.approx(sum(rates) / 12)
    spread = math.sqrt(sum((rate - sum(rates) / 12) ** 2 for rate in rates) / 12)
    assert sampled["standard error"] == pytest.approx(spread / math.sqrt(12))
    assert sampled["pass@4"] == fmean(max(group) for group in correct)
    lengths = [len(e.response_ids) for group in responses for e in group]
    assert sampled["tokens per response"] == pytest.approx(sum(lengths) / 48)
    assert {key for key in sampled if key.startswith("pass")} == {"pass@1", "pass@2", "pass@4"}


def test_kinds_of_problems_are_reported_apart(tmp_path, ask, monkeypatch):
    monkeypatch.setattr("countdown_task.problem_kind", lambda problem: "even" if problem.target % 2 == 0 else "odd")
    figures = json.loads(ask(ROOT / "tiny", f"data.path={ROOT}/tiny/problems.parquet", *SMALL, "--json")[1])
    counts = {key: value for key, value in figures["greedy"].items() if key.startswith(("even", "odd"))}
    sizes = [int(key.partition("(")[2].rstrip(")")) for key in counts]
    assert sum(sizes) == 12
    weighed = sum(size * share for size, share in zip(sizes, counts.values(), strict=True)) / 12
    assert weighed == pytest.approx(figures["greedy"]["correct"])


def test_two_models_are_compared_problem_by_problem(folder, ask):
    """A model beside itself differs by nothing; unpaired standard errors would call most differences noise."""
    status, printed, _ = ask("--compare", ROOT / "tiny", folder / "final", *SMALL, "--samples", 2, "--json")
    figures = json.loads(printed)["greedy"]
    agents = [evaluate.load_agent(str(m), folder / "config.yml", SMALL) for m in (ROOT / "tiny", folder / "final")]
    before, after = ([grade(a.task, e)["correct"] for (e,) in evaluate.respond(a, 1, 0.0, 0)] for a in agents)
    pairs = [y - x for x, y in zip(before, after, strict=True)]
    error = math.sqrt(fmean((pair - fmean(pairs)) ** 2 for pair in pairs) / 12)
    assert (status, figures["difference"], figures["standard error"]) == (0, fmean(pairs), pytest.approx(error))
    same = json.loads(ask("--compare", folder / "final", f"{folder}/./final", *SMALL, "--samples", 1, "--json")[1])
    assert [same[kind]["difference"] for kind in ("greedy", "sampled")] == [0, 0]
    assert same["greedy"]["beyond noise (2 standard errors)"] == "no"


def test_a_streamed_response_is_the_one_that_the_sampler_gives(folder, ask):
    """Shown token by token, it must not become another one, lose its last line, or go on after its end."""
    agent = evaluate.load_agent(str(folder / "final"), folder / "config.yml", SMALL)
    problem = Problem((3, 7, 12), 33)
    for heat in (0.0, 1.0):
        uniforms = torch.rand(1, 48, generator=make_generator(5, "evaluation", 0))
        (expected,) = agent.generate([agent.encode_prompt(problem)], uniforms, Sampling(heat))
        text = agent.tokenizer.decode(expected.text_ids)
        question = ["--numbers", 3, 7, 12, "--target", 33, "--seed", 5, "--temperature", heat]
        status, printed, _ = ask(folder / "final", *SMALL, *question)
        assert status == 0
        assert agent.task.ASSISTANT_PREFIX + text + "\n\nreward" in printed
        assert f"({len(expected.ids)} tokens" in printed.splitlines()[-1]


@pytest.mark.parametrize(("words", "named"), [
    ([], "--compare"), (["a", "b"], "--compare"), (["--compare", "a"], "--compare"), (["nowhere"], "model.path"),
    (["--samples", "0", "a"], "--samples"), (["a", "train.sed=1"], "train.seed"), (["a", "--numbers", "3"], "target"),
    (["a", "--config", "none.yml"], "none.yml"), (["--compare", "a", "a"], "twice"), (["a", "train.beta1=2"], "beta1"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(words, named, ask):
    words = [str(ROOT / "tiny") if word == "a" else word for word in words]
    status, _, complaint = ask(*words)
    assert (status, complaint.count("\n")) == (2, 1)
    assert named in complaint


def test_curves_are_drawn_into_the_runs_folder(folder, tmp_path, monkeypatch, capsys):
    """The picture of a run used to overwrite the README's."""
    assert (
        plot.main([str(folder)])
        == plot.main([str(folder), str(folder), "--minutes", "--out", f"{tmp_path}/b.png"])
        == 0
    )
    twin = tmp_path / folder.name
    twin.symlink_to(folder)
    drawn = plot.draw
    monkeypatch.setattr(plot, "draw", lambda runs, x: names.append([*runs]) or drawn(runs, x))
    names: list[list[str]] = []
    assert plot.main([str(folder), str(twin), "--out", f"{tmp_path}/c.png"]) == 0
    assert names == [[str(folder), str(twin)]], "two runs of one name are two runs"
    for picture in (folder / "curves.png", tmp_path / "b.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    metrics = plot.read_run(folder)
    assert metrics.minutes.is_monotonic_increasing
    assert metrics.minutes.iloc[-1] * 60 == pytest.approx(metrics.step_seconds.sum())
    (tmp_path / "metrics.jsonl").write_text("{}")
    capsys.readouterr()
    for wrong, named in ((ROOT / "tiny", "no run"), (tmp_path, "metrics.jsonl"), (tmp_path / "none", "no run")):
        assert plot.main([str(wrong)]) == 2
        assert named in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(folder)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
