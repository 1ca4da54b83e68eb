"""evaluate.py and plot.py on a short run: figures that agree with a count by hand, one line where input is wrong."""

import itertools
import json
import math
import sys
from pathlib import Path
from statistics import fmean, pstdev

import pandas
import pytest

import evaluate
import plot
from countdown_task import Problem, grade
from short_run import ROOT, run, small_world
from train import make_generator

SMALL = ["data.held_out=12", "train.threads=1", "rollout.max_new_tokens=48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    pandas.read_parquet(ROOT / "tiny/problems.parquet")[70::100].to_parquet(place / "few.parquet")
    done = run(place / "one", "train.steps=2", "eval.every=1", f"data.path={place}/few.parquet")
    assert done.status == 0, done.complaints
    return done.folder


@pytest.fixture
def ask(capsys):
    """Runs evaluate.py; its status and what it prints, on stdout and on stderr."""
    return lambda *words: (capsys.readouterr(), evaluate.main([*map(str, words)]), *capsys.readouterr())[1:]


def respond(model: Path, folder: Path, count: int, temperature: float) -> tuple[list[list[float]], float]:
    """Scores of a model's responses, by problem, and their mean length; with the settings of the run in the folder."""
    agent = evaluate.load_agent(str(model), folder / "config.yml", SMALL)
    assert (len(agent.held_out), agent.config.train.seed) == (12, 9)
    groups = evaluate.respond(agent, count, temperature, 0)
    scores = [[grade(e.text, e.truncated, e.problem)["correct"] for e in group] for group in groups]
    return scores, fmean(len(e.response_ids) for group in groups for e in group)


def test_best_of_k_is_the_mean_over_all_choices_of_k():
    """The naive estimate 1 - (1 - c/n)^k is biased: for c = 2, n = 3, k = 2 it says 0.89, and no pair misses."""
    for values in ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 1.0], [-3.0, 0.5, 0.5, 7.0]):
        for k in range(1, len(values) + 1):
            expected = fmean(max(chosen) for chosen in itertools.combinations(values, k))
            assert evaluate.best_of(k, values) == pytest.approx(expected)


def test_the_figures_are_those_of_the_responses(folder, ask):
    """Held-out problems, settings and length limit are those of the run that the model belongs to."""
    status, printed, _ = ask(folder / "final", *SMALL, "--samples", 4, "--json")
    by_problem, length = respond(folder / "final", folder, 4, 1.0)
    rates, sampled = [*map(fmean, by_problem)], json.loads(printed)["sampled"]
    assert (status, json.loads(printed)["problems"]) == (0, 12)
    assert sampled["correct"] == pytest.approx(fmean(rates))
    assert sampled["standard error"] == pytest.approx(pstdev(rates) / math.sqrt(12))
    assert (sampled["pass@4"], sampled["tokens per response"]) == (fmean(map(max, by_problem)), pytest.approx(length))
    assert {key for key in sampled if key.startswith("pass")} == {"pass@1", "pass@2", "pass@4"}


def test_two_models_are_compared_problem_by_problem(folder, ask, tmp_path):
    """A model compared with itself differs by nothing; unpaired standard errors would call most differences noise."""
    small_world(tmp_path / "world")
    models = ROOT / "tiny", tmp_path / "world/model"
    status, printed, _ = ask("--compare", *models, "--config", folder / "config.yml", *SMALL, "--samples", 2, "--json")
    figures = [*json.loads(printed)["greedy"].values()][2:]
    before, after = (respond(model, folder, 1, 0.0)[0] for model in models)
    pairs = [theirs - mine for (mine,), (theirs,) in zip(before, after, strict=True)]
    assert (status, figures) == (0, [fmean(pairs), pytest.approx(pstdev(pairs) / math.sqrt(12)), "yes"])
    same = json.loads(ask("--compare", folder / "final", f"{folder}/./final", *SMALL, "--samples", 1, "--json")[1])
    assert [*same["greedy"].values()][2:] == [*same["sampled"].values()][2:] == [0, 0, "no"]


def test_every_problem_of_a_file_and_from_another_folder(folder, ask, tmp_path, monkeypatch):
    """A test split has no problems to hold out, and may have fewer than data.held_out."""
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame({"numbers": [[3, 7, 12]] * 3, "goal": [33, 22, 33]}).to_parquet("test-0.parquet")
    split = ["--all", f"data.path={tmp_path}", "data.files=test-*"]
    for words in ([folder / "final", *split], ["tiny", "data.held_out=3"]):
        status, printed, _ = ask(*words, "rollout.max_new_tokens=8", "--samples", 1, "--json")
        assert (status, json.loads(printed)["problems"]) == (0, 3)
    for numbers, target, told in (((1, 1), 9, True), ((1, 5, 5, 5), 24, False), ((8, 3, 8, 3), 24, False)):
        status, printed, _ = ask("tiny", "--target", target, "--numbers", *numbers, "rollout.max_new_tokens=8")
        assert (status, "(8 tokens" in printed, "no expression" in printed) == (0, True, told)


def test_a_streamed_response_is_the_one_that_the_sampler_gives(folder, ask):
    """Shown token by token, it must not become another one, lose its last line, or go on after its end."""
    sampler = evaluate.load_agent(str(folder), folder / "config.yml", SMALL).sampler
    for temperature in (0.0, 1.0):
        (expected,) = sampler.rollout([Problem((3, 7, 12), 33)], 1, temperature, make_generator(5, "evaluation", 0))
        question = ["--numbers", 3, 7, 12, "--target", 33, "--seed", 5, "--temperature", temperature]
        status, printed, _ = ask(folder / "final", *SMALL, *question)
        assert (status, f"({len(expected.response_ids)} tokens" in printed.splitlines()[-1]) == (0, True)
        assert sampler.task.ASSISTANT_PREFIX + expected.text + "\n\nreward" in printed


@pytest.mark.parametrize(("words", "named"), [
    ("", "--compare"), ("A B", "--compare"), ("--compare A", "--compare"), ("B", "model.path"), ("--compare A A", "A"),
    ("A --samples 0", "--samples"), ("A --temperature -1", "--temperature"), ("A --config none.yml", "none.yml"),
    ("A --numbers 3", "give --target"),
    ("A --numbers 3 -7 --target 4", "from 1"), ("A --target 3 train.seed=2", "give --numbers"),
    ("--compare A B --target 3", "--compare"), ("A train.sed=1", "train.seed"), ("A train.beta1=2", "train.beta1"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(words, named, ask):
    status, _, complaint = ask("train.threads=1", *words.replace("A", f"{ROOT}/tiny").split())
    assert (status, complaint.count("\n"), named.replace("A", "tiny") in complaint) == (2, 1, True), complaint


def test_curves_are_drawn_into_the_runs_folder(folder, tmp_path, monkeypatch, capsys):
    """The picture of a run used to overwrite the README's."""
    drawn, draw, twin = [], plot.draw, tmp_path / folder.name
    twin.symlink_to(folder)
    monkeypatch.setattr(plot, "draw", lambda runs, *how: drawn.extend(runs) or draw(runs, *how))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(folder.parent)  # where a run is found by its name
    assert plot.main([folder.name]) == 0
    assert plot.main([str(folder), str(twin), "--minutes", "--panels", "loss", "--out", f"{tmp_path}/b.png"]) == 0
    assert drawn == [folder.name, str(folder), str(twin)], "two runs of one name are two runs"
    curves = (folder / "curves.png").read_bytes()
    assert plot.main([str(folder), str(twin)]) == 0
    for picture in (folder / "curves.png", tmp_path / "b.png", folder / "compared.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert curves == (folder / "curves.png").read_bytes(), "a comparison is another picture"
    metrics = plot.read_run(folder)
    assert [*metrics.minutes * 60] == pytest.approx([*metrics.step_seconds.fillna(0).cumsum()])
    (tmp_path / "metrics.jsonl").write_text("{}")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for place, named in ((ROOT / "tiny", "no run"), (tmp_path, "metrics.jsonl"), (folder, "install matplotlib")):
        assert plot.main([str(place)]) == 2
        assert named in capsys.readouterr().err
