"""What the README says is so: its commands run, shortened; its functions, files, metrics and worked numbers exist."""

import ast
import json
import math
import re
import shlex

import pytest
import torch
from short_run import ROOT

import benchmark
import evaluate
import plot
import train
from config import load_config
from countdown_task import ASSISTANT_PREFIX, Problem, grade, question_text
from data_types import Episode
from grpo import assign_advantages, assign_token_weights
from tokenizer import Tokenizer

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", README, re.M | re.S)
LINES = [line for _, language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = [line.partition("  #")[0].strip() for line in LINES]
SHORT = ["train.steps=1", "train.threads=1", "data.held_out=4"]
SHORT += ["rollout.questions_per_step=2", "rollout.max_new_tokens=24"]
TINY = "model.path=tiny model.device=cpu model.dtype=float32 train.optimizer=master data.path=tiny/problems.parquet"
TINY_MODEL = [*TINY.split(), "data.most_numbers=6", "data.target_high=100", "rollout.group_size=2"]
PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "plot": plot.main, "benchmark": benchmark.main}


def run(command: str) -> None:
    """A command of ours, shortened; the configs of a GPU train the tiny model instead."""
    program, *words = shlex.split(command.removeprefix("python "))
    short = [word for word in SHORT if not any(given.startswith(word.partition("=")[0] + "=") for given in words)]
    if program == "train.py" and "--config" in words:
        words += [] if "--name" in words else ["--name", f"of-{words[1]}"]  # two in one second would be one folder
        words += short if "config_tiny.yml" in words else [*short, *TINY_MODEL]
    if program == "evaluate.py":
        words += ["train.threads=1", "data.held_out=4", "rollout.max_new_tokens=24", "--samples", "2"]
    if program == "benchmark.py":
        words += ["--rounds", "1", *short, "--no-transformers", *([] if "--fits" in words else TINY_MODEL)]
    assert PROGRAMS[program.removesuffix(".py")](words) == 0, command


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    """In the README's order, in one folder: what a command needs, an earlier one has made."""
    for path in (*ROOT.glob("config*.yml"), ROOT / "tiny", ROOT / "benchmarks"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setitem(benchmark.SHAPES, "3B", (32, 48, 2, 4, 2, True, 231))
    commands = [command for command in COMMANDS if command.startswith("python ") and " -c " not in command]
    assert len(commands) > 15
    for command in commands:
        if "--help" in command:
            with pytest.raises(SystemExit, match=r"^0$"):
                train.main(["--help"])
        elif "--json" in command:  # into the repository it would go; all its parts are in test_benchmark.py
            run(command.replace("--everything", "--part memory").replace("benchmarks/", ""))
        else:
            run(command)
    others = {line.split()[0] for line in COMMANDS if line and not line.startswith("python ")}
    assert others <= {"pip", "pytest", "tmux", "git", "torchrun"}  # torchrun: test_ranks.py


def test_every_file_and_function_it_names_is_there():
    links = re.findall(r"\[`?([^\]`]+)`?\]\((?!https?:)([^)#]+)\)", README)
    inline = re.findall(r"(?:python|pytest) ([\w/]+\.py)", README)
    for path in {path for _, path in links} | set(inline):
        assert (ROOT / path).exists(), path
    functions = [(name, path) for name, path in links if re.fullmatch(r"[A-Za-z_.]+", name) and name not in path]
    assert len(functions) >= 9
    for name, path in functions:
        tree = ast.parse((ROOT / path).read_text())
        for part in name.split("."):
            tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    loop = next(text for _, language, text in BLOCKS if language == "python" and "run.steps()" in text)
    assert "".join("    " + line for line in loop.splitlines(True)) in (ROOT / "train.py").read_text()


def rows(*head: str) -> list[list[str]]:
    """The cells of the table whose first row has these cells."""
    found = README.split("| " + " | ".join(head) + " |\n")
    assert len(found) == 2, head
    lines = found[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_its_group_of_four_is_what_grpo_computes():
    config = load_config(ROOT / "config_tiny.yml", ["rollout.group_size=4", "rollout.max_new_tokens=64"])
    table = rows("response", "reward", "advantage", "tokens", "sum of logprobs", "its part of the loss")
    numbers = [[float(cell) for cell in row[1:]] for row in table]
    episodes = [Episode(None, [0], [1] * int(n), [], False, "", {"reward": reward}) for reward, _, n, _, _ in numbers]
    assign_advantages(episodes, config)
    assign_token_weights(episodes, config)
    parts = [-e.token_weight * e.advantage * row[3] for e, row in zip(episodes, numbers, strict=True)]
    assert [round(e.advantage, 3) for e in episodes] == [row[1] for row in numbers]
    assert [round(part, 4) for part in parts] == [row[4] for row in numbers]
    assert f"The\nsum is the loss, {sum(parts):.4f}" in README


def test_its_rewards_are_what_grade_says_and_its_prompt_is_what_the_model_sees():
    problem = Problem((3, 7, 12), 33)
    for response, reward, why in rows("response, after `<think>`", "reward", "why"):
        text = re.match("`(.*)`", response)[1]
        assert math.isclose(sum(grade(text, "truncated" in response, problem).values()), float(reward)), (response, why)
    tokenizer = Tokenizer(ROOT / "tiny")
    prompt = tokenizer.decode(tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX))
    assert prompt in [text.removesuffix("\n") for _, language, text in BLOCKS if language == "text"]


def test_its_metrics_are_those_of_a_run(tmp_path):
    arguments = ["--config", f"{ROOT}/config_tiny.yml", "--name", "run", f"output.folder={tmp_path}", *SHORT]
    assert train.main([*arguments, f"model.path={ROOT}/tiny", f"data.path={ROOT}/tiny/problems.parquet"]) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    named = {name for row in rows("metric", "meaning", "in the demo") for name in re.findall("`([^`]+)`", row[0])}
    named |= {"eval_greedy_se", "eval_sampled_se", "rollout_tokens_per_second", "update_tokens_per_second"}
    assert named - {"..._se", "..._tokens_per_second"} == last.keys() - {"step"}
