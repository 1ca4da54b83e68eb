"""What README and docs say is so: their commands run, shortened; links, metrics and worked numbers are right."""

import importlib
import json
import math
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter

from countdown_task import ASSISTANT_PREFIX, Problem, grade, question_text
from data_types import Episode
from grpo import assign_advantages, assign_token_weights
from plumbing.config import load_config
from plumbing.memory import GIB, plan_memory
from short_run import ROOT, small_world
from tokenizer import Tokenizer
from tools import benchmark, cost_model

PAGES = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in ("grpo", "runs", "task", "speed", "gpu"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", TEXT, re.M | re.S)
LINES = [line for _, language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = [line.partition("  #")[0].strip() for line in LINES] + re.findall(r"^\| `(python [^`]+)` \|", TEXT, re.M)
LINK = r"\[`?([^\]`]+)`?\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)"
SHORT = ["train.steps=1", "train.threads=1", "rollout.questions_per_step=2"]
ON_A_CPU = ["model.device=cpu", "model.dtype=float32", "train.optimizer=master", "rollout.group_size=2"]


def run(command: str, world: list[str]) -> None:
    """A command of ours, shortened; a smaller model and its problems take the place of those of a config."""
    module, *words = shlex.split(re.sub(r"^python (-m )?|\.py", "", command))
    settings = [*SHORT, *world, *([] if "config_tiny.yml" in words else ON_A_CPU)]
    if "--config" in words:  # the command's own settings come later and win, but for those that take long
        name = ["--name", re.sub(r"\W", "", command)] if module == "train" else ["--rounds", "1"]
        words = [*name, *settings, *words, world[0], "data.held_out=4"]
    elif module in ("evaluate", "tools.make_tiny"):
        words += ["train.threads=1", "rollout.max_new_tokens=24", *(["--samples=2"] if module == "evaluate" else [])]
    with suppress(SystemExit if "--help" in words else ()):
        assert importlib.import_module(module).main(words) == 0, command


def test_every_command_runs_and_logs_the_metrics_in_its_table(tmp_path, monkeypatch, capsys):
    """In the order of the pages, in one folder: what a command needs, an earlier one has made."""
    for path in (*ROOT.glob("config*.yml"), ROOT / "tiny", ROOT / "benchmarks"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(benchmark.SHAPES, "3B", (32, 48, 2, 4, 2, True, 231))
    world = small_world(tmp_path / "world")
    exec(next(text for _, language, text in BLOCKS if "mine.parquet" in text and language == "python"))
    for command in filter(None, COMMANDS):
        if command.startswith("python ") and " -c " not in command:  # test_benchmark.py has all parts
            run(command.replace("--everything", "--part memory").replace("benchmarks/", ""), world)
        else:
            assert command.split()[0] in ("pip", "pytest", "tmux", "git", "python", "python3", "torchrun")
    assert len(list(tmp_path.glob("runs/*/metrics.jsonl"))) > 12
    last = json.loads((tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()[-1])
    named = {name for row in rows("metric", "meaning", "in the demo") for name in re.findall("`([^`]+)`", row[0])}
    named |= {"eval_greedy_se", "eval_sampled_se"}
    assert named - {"..._se"} == last.keys() - {"step"}


def test_the_recipes_in_the_head_of_config_yml_fit_their_cards_with_the_figures_given_there():
    head = re.sub(r"[\s#\\]+", " ", (ROOT / "config.yml").read_text().partition("\nrollout:")[0])
    figures = r"(\d+) GB(?:(?!python).)*? Plan: ([\d.]+) GiB while .*?, ([\d.]+) in the update.*? Disk: (\d+) GB"
    recipes = re.findall(figures + r".*?python train.py --config config.yml((?: [\w.]+=\S+)*)", head)
    assert len(recipes) == head.count("train.py") >= 4
    for card, sampling, update, disk, overrides in recipes:
        config, available = load_config(ROOT / "config.yml", overrides.split()), int(card) * benchmark.USABLE
        size = re.search("Qwen2.5-(.*)-Instruct", config.model.path)[1]
        shape, real = benchmark.shape_config(size), ROOT.parent / f"shared/qwen2.5/configs/{size}.json"
        known = json.loads(real.read_text()) if real.exists() else {}
        shape = replace(shape, **{name: value for name, value in known.items() if hasattr(shape, name)})
        plan = plan_memory(config, shape, benchmark.PROMPT_TOKENS, available)
        planned = [f"{peak / GIB:.1f}" for peak in plan.peaks]
        assert (max(plan.peaks) <= available, *planned) == (True, sampling, update)
        weight, state = {"split": (2, 6), "offload": (2, 12), "master": (4, 8)}[config.train.optimizer]  # bytes
        total = 2 + 2 * weight + 2 * (weight + state)  # the download, best and final weights, two checkpoints
        assert round(cost_model.parameters(shape)[0] * total / 1e9) == int(disk)


def test_every_file_and_function_it_names_is_there():
    every = [*PAGES, *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"]
    links = [(page, *link) for page in every for link in re.findall(LINK, page.read_text())]
    assert [(str(page), path) for page, _, path in links if not (page.parent / path).exists()] == []
    for path in re.findall(r"(?:python|pytest) ([\w/]+\.py)", re.sub(r"-m\s+tools\.(\w+)", r"tools/\1.py", TEXT)):
        assert (ROOT / path).exists(), path
    for _, name, path in links:
        if path.endswith(".py") and re.fullmatch(r"[A-Za-z_.]+", name) and name not in path:
            assert attrgetter(name)(importlib.import_module(path.removeprefix("../").removesuffix(".py")))
    loop = next(text for _, language, text in BLOCKS if language == "python" and "run.steps()" in text)
    assert "".join("    " + line for line in loop.splitlines(True)) in (ROOT / "train.py").read_text()


def rows(*head: str) -> list[list[str]]:
    """The cells of the table whose first row has these cells."""
    _, found = TEXT.split("| " + " | ".join(head) + " |\n")
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in found.split("\n\n")[0].splitlines()[1:]
    ]


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
    assert f"The sum is the loss, {sum(parts):.4f}" in TEXT


def test_its_rewards_are_what_grade_says_and_its_prompt_is_what_the_model_sees():
    problem = Problem((3, 7, 12), 33)
    for response, reward, why in rows("response, after `<think>`", "reward", "why"):
        text = re.match("`(.*)`", response)[1]
        assert math.isclose(sum(grade(text, "truncated" in response, problem).values()), float(reward)), (response, why)
    ids = (tokenizer := Tokenizer(ROOT / "tiny")).encode_prompt(question_text(problem), ASSISTANT_PREFIX)
    assert tokenizer.decode(ids) in [text.removesuffix("\n") for _, language, text in BLOCKS if language == "text"]
