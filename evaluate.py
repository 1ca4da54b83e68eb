"""Asks a model: how it scores on held-out problems, whether it beats another, what it answers to a question of yours.

    python evaluate.py runs/NAME/final                                # a table; with --json one line
    python evaluate.py runs/NAME/final --numbers 3 7 12 --target 33   # one answer, as it is sampled, and its grade
    python evaluate.py --compare tiny runs/NAME/final                 # two models on the same problems, some answers
    python evaluate.py runs/NAME/final --all data.files='test-*'      # every problem of a data set's test split

Any Qwen2.5 folder or hub id works. The settings (task, problems, length limit, device) are those of the run that a
model belongs to, else of config_tiny.yml; --config and SETTING=VALUE choose others. Relative paths may also be those of
this program's folder.

The held-out problems are those that training with these settings never sees: a model that was trained with others may
have seen them. Standard errors are over problems.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, get_args, get_type_hints

import torch

import countdown_task
from data_types import Episode
from plumbing.config import load_config
from plumbing.run import Agent, set_up
from plumbing.tasks import grade, load_task
from plumbing.terminal import UserError, exit_status, run_program, say
from rollout import Decoder, KVCache
from train import make_generator, mean_and_error

ROOT = Path(__file__).resolve().parent
ROWS = 256  # responses sampled at a time; fewer where memory runs out
OVERRIDE = re.compile(r"[a-z_]+\.[a-z0-9_]+=")
Figures = dict[str, Any]  # as --json prints them


def load_agent(model: str, config_path: Path, overrides: list[str], everything: bool = False) -> Agent:
    """A model, ready to answer, with the settings of a config; its held-out problems may be `everything` there is."""
    own = [] if model == load_config(config_path).model.path else ["model.revision=main"]
    model = beside_program(f"{model}/final" if (Path(model) / "final").is_dir() else model)  # a run's folder
    more = ["data.held_out=1"] if everything else []
    config = load_config(config_path, ["model.device=auto", *own, *overrides, *more, f"model.path={model}"])
    config = replace(config, data=replace(config.data, path=beside_program(config.data.path)))
    agent = set_up(config, max_rows=ROWS)
    if everything:
        agent.held_out += agent.training
    return agent


def beside_program(path: str) -> str:
    """A relative path that is only there from this program's folder, as it is from here; any other as it is."""
    return str(ROOT / path) if path and not os.path.exists(path) and os.path.exists(ROOT / path) else path


def find_config(words: list[str]) -> Path:
    """The file after --config, the config.yml of the run that one of the words is a folder of, or the tiny model's."""
    if "--config" in words[:-1]:
        return Path(words[words.index("--config") + 1])
    folders = [
        folder for word in words for folder in (Path(word), *Path(word).parents[:2]) if Path(word).is_dir()
    ]
    found = [folder / "config.yml" for folder in folders if (folder / "metrics.jsonl").is_file()]
    return [*found, ROOT / "config_tiny.yml"][0]


# ---- Scores ----------------------------------------------------------------------------------------------------


def respond(agent: Agent, count: int, temperature: float, seed: int) -> list[list[Episode]]:
    """`count` graded responses to each held-out problem; the same random numbers for every model."""
    generator = make_generator(seed, "evaluation", 0)
    episodes = agent.sampler.rollout(agent.held_out, count, temperature, generator)
    for episode in episodes:
        episode.rewards = grade(agent.sampler.task, episode)
    return [episodes[first : first + count] for first in range(0, len(episodes), count)]


def scores(agent: Agent, responses: list[list[Episode]]) -> list[list[float]]:
    """By problem and response."""
    return [[episode.rewards[agent.sampler.task.SCORE] for episode in group] for group in responses]


def best_of(k: int, values: list[float]) -> float:
    """The expected best of k of these n scores, drawn without replacement: unbiased for any k up to n.

    For scores of 0 and 1 that is pass@k (arXiv 2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k) with c successes.
    """
    ways = [math.comb(place, k - 1) for place in range(len(values))]  # to draw k - 1 of the scores below it
    return sum(way * value for way, value in zip(ways, sorted(values), strict=True)) / math.comb(
        len(values), k
    )


def describe(agent: Agent, responses: list[list[Episode]]) -> Figures:
    """The score, its standard error, and means over all responses."""
    score, error = mean_and_error([fmean(group) for group in scores(agent, responses)])
    episodes = [episode for group in responses for episode in group]
    parts = {name: fmean(e.rewards.get(name, 0.0) for e in episodes) for name in episodes[0].rewards}
    return {
        agent.sampler.task.SCORE: score,
        "standard error": error,
        "reward": fmean(e.reward for e in episodes),
        **{f"reward_{name}": value for name, value in parts.items() if name != agent.sampler.task.SCORE},
        "tokens per response": fmean(len(e.response_ids) for e in episodes),
        "truncated": fmean(e.truncated for e in episodes),
    }


def evaluate(agent: Agent, count: int, temperature: float, seed: int) -> Figures:
    """Greedy and sampled scores, and the best of k."""
    greedy, sampled = respond(agent, 1, 0.0, seed), respond(agent, count, temperature, seed)
    columns = {"greedy": describe(agent, greedy), "sampled": describe(agent, sampled)}
    by_problem = scores(agent, sampled)
    binary = {score for group in by_problem for score in group} <= {0.0, 1.0}
    for k in (2**power for power in range(count.bit_length())):
        name = f"pass@{k}" if binary else f"best of {k}"
        columns["sampled"][name] = fmean(best_of(k, group) for group in by_problem)
    return {"problems": len(agent.held_out), "samples": count, "temperature": temperature, **columns}


def table(columns: dict[str, Figures]) -> Iterator[str]:
    """Lines of a table: a column for each of `columns`, a row for each of their names."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    width, widths = max(map(len, names)), [max(10, len(title)) for title in columns]
    yield " " * width + "".join(f"  {title:>{w}}" for title, w in zip(columns, widths, strict=True))
    for name in names:
        values = [column.get(name, "") for column in columns.values()]
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
        yield f"{name:{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))


# ---- Two models ------------------------------------------------------------------------------------------------


def compare(agents: dict[str, Agent], count: int, temperature: float, seed: int) -> tuple[Figures, list[str]]:
    """The difference of two models' scores, problem by problem, and a few greedy answers that differ."""
    (first, one), (second, other) = agents.items()
    figures: Figures = {}
    lines: list[str] = []
    for kind in ("greedy", "sampled"):
        how = (1, 0.0, seed) if kind == "greedy" else (count, temperature, seed)
        before, after = respond(one, *how), respond(other, *how)
        pairs = list(zip(scores(one, before), scores(other, after), strict=True))
        difference, error = mean_and_error([fmean(theirs) - fmean(mine) for mine, theirs in pairs])
        figures[kind] = {
            first: fmean(fmean(mine) for mine, _ in pairs),
            second: fmean(fmean(theirs) for _, theirs in pairs),
            "difference": difference,
            "standard error": error,
            "beyond noise (2 standard errors)": "yes" if abs(difference) > 2 * error else "no",
        }
        if kind == "greedy":
            better = [i for i, (mine, theirs) in enumerate(pairs) if theirs > mine]
            worse = [i for i, (mine, theirs) in enumerate(pairs) if theirs < mine]
            for i in better[:2] + worse[:1]:
                lines += ["", one.sampler.task.question_text(one.held_out[i])]
                for name, (episode,) in ((first, before[i]), (second, after[i])):
                    reward = f"---- {name}, reward {episode.reward:.2f}:"
                    lines += [reward, one.sampler.task.ASSISTANT_PREFIX + episode.text]
    return figures, lines


# ---- One question ----------------------------------------------------------------------------------------------


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """The values of all Countdown expressions that use each number once, without their signs."""
    if len(numbers) == 1:
        return {*numbers}
    found: set[Fraction] = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [number for place, number in enumerate(numbers) if place not in (i, j)]
        quotients = [up / down for up, down in ((a, b), (b, a)) if down]
        for value in {a + b, abs(a - b), a * b, *quotients}:
            found |= reachable((*rest, value))
    return found


def is_unsolvable(problem: Any) -> bool:
    """Whether a Countdown problem of up to four numbers has no solution; with more the search takes too long."""
    if len(problem.numbers) > 4:
        return False
    return abs(problem.target) not in reachable(tuple(map(Fraction, problem.numbers)))


def check_question(task: str, problem: Any) -> None:
    """UserError for numbers that no problem of Countdown has; says if there is no solution."""
    if not isinstance(problem, countdown_task.Problem):
        return
    if countdown_task.problem_from_row([*problem.numbers], problem.target) is None:
        most = f"{countdown_task.MAX_NUMBER:,}"
        raise UserError(f"not a problem of this task: give 2 to 6 numbers and a target, all from 1 to {most}")
    if task == "countdown" and is_unsolvable(problem):
        say(f"(no expression of {list(problem.numbers)} equals {problem.target})")


def count_unsolvable(task: str, problems: list[Any]) -> None:
    """Say how many of Countdown's problems have no solution: of all of them, or of the first 200."""
    some = [problem for problem in problems[:200] if task == "countdown" and is_unsolvable(problem)]
    if some:
        example = f"{list(some[0].numbers)} to {some[0].target}"
        say(f"{len(some)} of {len(problems[:200])} problems have no solution, such as {example}")


def problem_options(task_problem: Any) -> dict[str, dict[str, Any]]:
    """What argparse is to know of each field of a task's Problem, such as --numbers 3 7 12."""
    options: dict[str, dict[str, Any]] = {}
    for name, kind in get_type_hints(task_problem).items() if task_problem else ():
        several = get_args(kind)
        options[name] = {"type": several[0] if several else kind, "nargs": "+" if several else None}
    return options


@torch.inference_mode()
def stream(agent: Agent, problem: Any, temperature: float, seed: int) -> Episode:
    """Print one response while it is sampled; the same one that `Sampler.rollout` gives."""
    sampler, policy, limit = agent.sampler, agent.sampler.policy, agent.sampler.max_new_tokens
    prompt = sampler.encode_prompt(problem)
    if len(prompt) + limit > policy.config.max_position_embeddings:
        raise UserError(
            f"a prompt of {len(prompt)} tokens is too long for this model: lower rollout.max_new_tokens"
        )
    uniforms = torch.rand(1, limit, generator=make_generator(seed, "evaluation", 0)).to(policy.head.device)
    cache = KVCache(policy, [len(prompt)], group=1, max_new=limit)
    decoder = Decoder(policy, cache, uniforms, sampler.tokenizer.end_ids, temperature)
    decoder.prefill([prompt])
    shown = ""
    while True:
        ((ids, logprobs, truncated),) = decoder.responses()
        text = sampler.tokenizer.decode(ids if truncated else ids[:-1])
        if not text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # half of a character: the next token may complete it
            say(text.removeprefix(shown), end="")
            shown = text
        if not truncated or len(ids) == limit:
            break
        decoder.step(1, cache.prompt_columns + len(ids))
    say(text.removeprefix(shown))
    return Episode(problem, prompt, ids, logprobs, truncated, text)


def ask(agent: Agent, values: Figures, temperature: float, seed: int) -> Figures:
    """Put one problem to the model and grade its response."""
    try:
        problem = agent.sampler.task.Problem(**values)
        question = agent.sampler.task.question_text(problem)
    except (TypeError, ValueError) as error:
        raise UserError(f"not a problem of this task: {error}") from None
    check_question(agent.config.data.task, problem)
    say(f"{question}\n\n{agent.sampler.task.ASSISTANT_PREFIX}", end="")
    episode = stream(agent, problem, temperature, seed)
    try:
        parts, tokens = grade(agent.sampler.task, episode), len(episode.response_ids)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"the task cannot grade this: {error}") from None
    terms = " + ".join(f"{name} {value:g}" for name, value in parts.items())
    cut = ", truncated" if episode.truncated else ""
    say(f"\nreward {sum(parts.values()):g} = {terms} ({tokens} tokens{cut})")
    return {"response": episode.text, **parts, "tokens": tokens, "truncated": episode.truncated}


# ---- The command line ------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return exit_status("evaluate.py", partial(run, sys.argv[1:] if argv is None else argv))


def run(words: list[str]) -> None:
    config_path = find_config(words)
    overrides = [word for word in words if OVERRIDE.match(word)]
    problem_type = load_task(load_config(config_path, overrides).data.task).Problem
    options = problem_options(problem_type)
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", metavar="MODEL or SETTING=VALUE", nargs="*", help="a folder or a hub id")
    parser.add_argument("--compare", action="store_true", help="two models on the same problems")
    parser.add_argument("--config", help="its settings instead of those of the run that a model belongs to")
    parser.add_argument(
        "--samples", type=int, default=8, help="responses per problem, for sampled scores and pass@k"
    )
    parser.add_argument("--temperature", type=float, help="default: 1, and 0 (greedy) for a problem of yours")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--all", action="store_true", help="all problems of the data, not the held-out ones")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    for name, option in options.items():
        parser.add_argument(f"--{name}", help="of the problem to ask about", **option)
    arguments = parser.parse_intermixed_args([word for word in words if word not in overrides])
    models = arguments.words
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    check_arguments(arguments, models, given, problem_type)
    temperature = arguments.temperature if arguments.temperature is not None else 0.0 if given else 1.0
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        agents = {model: load_agent(model, config_path, overrides, arguments.all) for model in models}
        if not given:
            count_unsolvable(agents[models[0]].config.data.task, agents[models[0]].held_out)
    agent, seed = agents[models[0]], arguments.seed
    if given:
        question = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
            figures, lines = ask(agent, question, temperature, seed), []
    elif arguments.compare:
        figures, answers = compare(agents, arguments.samples, temperature, seed)
        lines = [*table(figures), *answers]
    else:
        figures = evaluate(agent, arguments.samples, temperature, seed)
        lines = [*table({name: figures[name] for name in ("greedy", "sampled")})]
    if arguments.json:
        say(json.dumps({"models": models, "task": agent.config.data.task, **figures}))
    elif lines:
        kind = "problems" if arguments.all else "held-out problems"
        say(f"{agent.config.data.task}: {len(agent.held_out)} {kind}, settings of {config_path}")
        say("\n".join(lines))


def check_arguments(
    arguments: argparse.Namespace, models: list[str], question: Figures, problem_type: Any
) -> None:
    """UserError for arguments that do not go together, or are missing."""
    if arguments.compare and question:
        raise UserError("--compare does not go with a question of yours")
    needed = [field.name for field in fields(problem_type) if field.default is MISSING] if question else []
    missing = [f"--{name}" for name in needed if name not in question]
    if missing:
        raise UserError(f"a question of yours needs more: give {' and '.join(missing)}")
    if len(models) != (2 if arguments.compare else 1):
        raise UserError(
            "name one model, such as runs/NAME/final, or two after --compare; --help shows examples"
        )
    if len({*models}) < len(models):
        raise UserError(f"{models[0]} is named twice")
    if arguments.samples < 1 or (arguments.temperature or 0) < 0:
        raise UserError("--samples must be at least 1 and --temperature at least 0")


if __name__ == "__main__":
    run_program(main)
