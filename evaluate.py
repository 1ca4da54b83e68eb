"""Asks a model: how it scores on held-out problems, whether it beats another, what it answers to a question of yours.

    python evaluate.py runs/NAME/final                                # a table; with --json one line
    python evaluate.py runs/NAME/final --numbers 3 7 12 --target 33   # one answer, as it is sampled, and its grade
    python evaluate.py --compare tiny runs/NAME/final                 # two models on the same problems, some answers
    python evaluate.py --examine tiny runs/NAME/final                 # what the task measures in how they think

Any Qwen2.5 folder or hub id works. The settings (task, problems, length limit, device) are those of the run that a
model belongs to, else of config_tiny.yml; --config and SETTING=VALUE choose others.

The held-out problems are those that training with these settings never sees: a model that was trained with others may
have seen them. Standard errors are over problems.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any, get_args, get_type_hints

import torch

from config import load_config
from data_types import Episode, Sampling, UserError
from model_folder import find_folder
from rollout import Decoder, KVCache
from run import Agent, memory_in_one_line
from task import Task, grade, load_task
from terminal import complain, run_program, say
from train import make_generator, mean_and_error, sample

ROWS = 256  # responses sampled at the same time; fewer where memory runs out
Figures = dict[str, Any]  # as --json prints them


def load_agent(model: str, config_path: Path, overrides: list[str]) -> Agent:
    """A model, ready to answer, with the settings of a config."""
    if (Path(model) / "final").is_dir():  # a run's folder
        model = f"{model}/final"
    own = [] if model == load_config(config_path).model.path else ["model.revision=main"]
    config = load_config(config_path, ["model.device=auto", *own, *overrides, f"model.path={model}"])
    agent = Agent(config, find_folder(config.model))
    agent.load(ROWS)
    return agent


def find_config(words: list[str]) -> Path:
    """The config.yml of the run that one of the words is a folder of, else the tiny model's."""
    folders = [folder for word in words for folder in (Path(word), *Path(word).parents[:2]) if Path(word).is_dir()]
    found = [folder / "config.yml" for folder in folders if (folder / "metrics.jsonl").is_file()]
    return [*found, Path(__file__).parent / "config_tiny.yml"][0]


# ---- Scores ----------------------------------------------------------------------------------------------------


def respond(agent: Agent, count: int, temperature: float, seed: int) -> list[list[Episode]]:
    """`count` graded responses to each held-out problem; the same random numbers for every model."""
    generator = make_generator(seed, "evaluation", 0)
    episodes = sample(agent, agent.held_out, count, Sampling(temperature), generator)
    for episode in episodes:
        episode.rewards = grade(agent.task, episode)
    return [episodes[first : first + count] for first in range(0, len(episodes), count)]


def scores(agent: Agent, responses: list[list[Episode]]) -> list[list[float]]:
    """By problem and response."""
    return [[episode.rewards[agent.task.SCORE] for episode in group] for group in responses]


def best_of(k: int, values: list[float]) -> float:
    """The expected best of k of these n scores, drawn without replacement: unbiased for any k up to n.

    For scores of 0 and 1 that is pass@k (arXiv 2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k) with c successes.
    """
    ways = [math.comb(place, k - 1) for place in range(len(values))]  # to draw k - 1 of the scores below it
    return sum(way * value for way, value in zip(ways, sorted(values), strict=True)) / math.comb(len(values), k)


def describe(agent: Agent, responses: list[list[Episode]]) -> Figures:
    """The score, its standard error, and means over all responses."""
    score, error = mean_and_error([fmean(group) for group in scores(agent, responses)])
    episodes = [episode for group in responses for episode in group]
    parts = {name: fmean(e.rewards.get(name, 0.0) for e in episodes) for name in episodes[0].rewards}
    return {
        agent.task.SCORE: score,
        "standard error": error,
        "reward": fmean(e.reward for e in episodes),
        **{f"reward_{name}": value for name, value in parts.items() if name != agent.task.SCORE},
        "tokens per response": fmean(len(e.response_ids) for e in episodes),
        "truncated": fmean(e.truncated for e in episodes),
    }


def evaluate(agent: Agent, count: int, temperature: float, seed: int) -> Figures:
    """Greedy and sampled scores, the best of k, and the score by kind of problem."""
    greedy, sampled = respond(agent, 1, 0.0, seed), respond(agent, count, temperature, seed)
    columns = {"greedy": describe(agent, greedy), "sampled": describe(agent, sampled)}
    by_problem = scores(agent, sampled)
    binary = {score for group in by_problem for score in group} <= {0.0, 1.0}
    for k in (2**power for power in range(count.bit_length())):
        name = f"pass@{k}" if binary else f"best of {k}"
        columns["sampled"][name] = fmean(best_of(k, group) for group in by_problem)
    kinds: dict[str, list[int]] = {}
    for number, problem in enumerate(agent.held_out):
        kinds.setdefault(agent.task.problem_kind(problem), []).append(number)
    for kind, members in sorted(kinds.items()) if len(kinds) > 1 else ():
        for name, responses in (("greedy", greedy), ("sampled", sampled)):
            group = scores(agent, [responses[number] for number in members])
            columns[name][f"{kind} ({len(members)})"] = fmean(map(fmean, group))
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
    for kind, number, heat in (("greedy", 1, 0.0), ("sampled", count, temperature)):
        before, after = respond(one, number, heat, seed), respond(other, number, heat, seed)
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
                lines += ["", one.task.question_text(one.held_out[i])]
                for name, (episode,) in ((first, before[i]), (second, after[i])):
                    reward = f"---- {name}, reward {episode.reward:.2f}:"
                    lines += [reward, one.task.ASSISTANT_PREFIX + episode.text]
    return figures, lines


# ---- One question ----------------------------------------------------------------------------------------------


def add_problem_options(parser: argparse.ArgumentParser, task: Task) -> list[str]:
    """An option for each field of the task's Problem, such as --numbers 3 7 12; returns the fields' names."""
    types = get_type_hints(task.Problem) if task.Problem else {}
    for name, kind in types.items():
        several = get_args(kind)
        kind = several[0] if several else kind
        parser.add_argument(f"--{name}", type=kind, nargs="+" if several else None, help="of the problem to ask about")
    return list(types)


@torch.inference_mode()
def stream(agent: Agent, problem: Any, sampling: Sampling, seed: int) -> Episode:
    """Print one response while it is sampled; the same one that `Sampler.generate` gives."""
    prompt, limit = agent.encode_prompt(problem), agent.config.rollout.max_new_tokens
    if len(prompt) + limit > agent.shape.max_position_embeddings:
        raise UserError(f"a prompt of {len(prompt)} tokens is too long for this model: lower rollout.max_new_tokens")
    uniforms = torch.rand(1, limit, generator=make_generator(seed, "evaluation", 0)).to(agent.device)
    cache = KVCache(agent.policy, [len(prompt)], group=1, max_new=limit)
    decoder = Decoder(agent.policy, cache, uniforms, agent.tokenizer.end_ids, sampling)
    decoder.prefill([prompt])
    shown = ""
    while True:
        (response,) = decoder.responses()
        text = agent.tokenizer.decode(response.text_ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: the next token may complete it
            say(text.removeprefix(shown), end="")
            shown = text
        if not response.truncated or len(response.ids) == limit:
            break
        decoder.step(1, cache.prompt_columns + len(response.ids))
    say(text.removeprefix(shown))
    return Episode(problem, prompt, response.ids, response.logprobs, response.truncated, text)


def ask(agent: Agent, values: Figures, temperature: float, seed: int) -> Figures:
    """Put one problem to the model and grade its response."""
    try:
        problem = agent.task.Problem(**values)
        question = agent.task.question_text(problem)
    except (TypeError, ValueError) as error:
        raise UserError(f"not a problem of this task: {error}") from None
    say(f"{question}\n\n{agent.task.ASSISTANT_PREFIX}", end="")
    episode = stream(agent, problem, Sampling(temperature), seed)
    try:
        parts, tokens = grade(agent.task, episode), len(episode.response_ids)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"the task cannot grade this: {error}") from None
    terms = " + ".join(f"{name} {value:g}" for name, value in parts.items())
    cut = ", truncated" if episode.truncated else ""
    say(f"\nreward {sum(parts.values()):g} = {terms} ({tokens} tokens{cut})")
    return {"response": episode.text, **parts, "tokens": tokens, "truncated": episode.truncated}


# ---- The command line ------------------------------------------------------------------------------------------


def examine(agent: Agent, temperature: float, seed: int) -> Figures:
    """What the task measures in one response to each held-out problem, beside its score."""
    responses = respond(agent, 1, temperature, seed)
    texts = [episode.text for (episode,) in responses]
    return describe(agent, responses) | agent.task.examine(texts, agent.held_out)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        return run(words)
    except UserError as error:
        complain(f"evaluate.py: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


def run(words: list[str]) -> int:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, help="its settings instead of those of the run that a model belongs to")
    early_arguments, rest = early.parse_known_args(words)
    config_path = early_arguments.config or find_config(rest)
    overrides = [word for word in rest if re.match(r"[a-z_]+\.[a-z0-9_]+=", word)]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[early],
        allow_abbrev=False,
    )
    parser.add_argument("words", metavar="MODEL or SETTING=VALUE", nargs="*", help="a folder or a hub id")
    parser.add_argument("--compare", action="store_true", help="two models on the same problems")
    parser.add_argument("--examine", action="store_true", help="what the task measures in responses, for each model")
    parser.add_argument("--samples", type=int, default=8, help="responses per problem, for sampled scores and pass@k")
    parser.add_argument("--temperature", type=float, help="default: 1, and 0 (greedy) for a problem of yours")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    names = add_problem_options(parser, load_task(load_config(config_path, overrides).data.task))
    arguments = parser.parse_intermixed_args(words)
    models = [word for word in arguments.words if word not in overrides]
    values = {name: given for name in names if (given := getattr(arguments, name)) is not None}
    if arguments.compare and (arguments.examine or values):
        raise UserError("--compare goes with neither --examine nor a question of yours")
    if not models or (len(models) != (2 if arguments.compare else 1) and not arguments.examine):
        raise UserError("name one model, such as runs/NAME/final, or two after --compare; --help shows examples")
    if len({*models}) < len(models):
        raise UserError(f"{models[0]} is named twice")
    if arguments.samples < 1 or (arguments.temperature or 0) < 0:
        raise UserError("--samples must be at least 1 and --temperature at least 0")
    heat = arguments.temperature if arguments.temperature is not None else 0.0 if values else 1.0
    with memory_in_one_line():
        agents = {model: load_agent(model, config_path, overrides) for model in models}
        agent, seed = agents[models[0]], arguments.seed
        if values:
            question = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
                figures, lines = ask(agent, question, heat, seed), []
        elif arguments.compare:
            figures, answers = compare(agents, arguments.samples, heat, seed)
            lines = [*table(figures), *answers]
        elif arguments.examine:
            figures = {name: examine(agent, heat, seed) for name, agent in agents.items()}
            lines = [*table(figures)]
        else:
            figures = evaluate(agent, arguments.samples, heat, seed)
            lines = [*table({name: figures[name] for name in ("greedy", "sampled")})]
    if arguments.json:
        say(json.dumps({"models": models, "task": agent.config.data.task, **figures}))
    else:
        asked = f"{agent.config.data.task}: {len(agent.held_out)} held-out problems, settings of {config_path}"
        for line in [asked, *lines] if lines else ():
            say(line)
    return 0


if __name__ == "__main__":
    run_program(main)
