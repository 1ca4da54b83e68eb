"""Trains a Qwen2.5 model with GRPO: the whole algorithm is the loop in `train`.

    python train.py --config config_tiny.yml                      # a laptop, minutes, nothing to download
    python train.py --config config.yml                           # Qwen2.5-3B-Instruct on one 48 GB GPU
    python train.py --config config_tiny.yml --name try rollout.group_size=32 train.learning_rate=3e-4
    python train.py --resume try                                  # continues exactly where it stopped

rollout.py samples, a task such as countdown_task.py grades, grpo.py has the advantages, the objective and its gradient.
What surrounds the loop (signals, memory, logging, checkpoints) is in run.py.

Every random choice of step k comes from a generator made for (seed, purpose, k). The generators are stateless, so an
extra evaluation changes nothing and a run can continue from any step.
"""

import argparse
import hashlib
import math
import shlex
import sys
from contextlib import nullcontext
from statistics import fmean, pstdev
from typing import Any

import torch

from checkpoint import find_run, locked, new_run_folder, prepare_resume
from config import describe_settings, load_config
from data_types import Episode, Progress, RolloutSettings, Sampling, UserError
from grpo import apply_gradient, assign_advantages, assign_token_weights
from optimizer import learning_rate
from ranks import on_first, rank, ranks
from run import Agent, Interrupted, Run, finite, open_run
from task import grade, problem_order
from terminal import complain, run_program, say


def train(run: Run) -> None:
    """GRPO: sample groups of responses, reward them, compare within the group, update the policy, repeat."""
    config, progress = run.config, run.progress
    if not progress.before:
        progress.before = evaluate(run, "greedy") | evaluate(run, "sampled")
        progress.best = progress.before["eval_greedy"]
        run.log(0, progress.before, [])
    for step in run.steps():
        progress.after = {}
        episodes: list[Episode] = []
        for draw in range(config.rollout.max_draws):
            drawn = rollout(run, next_problems(run, draw), step, draw)  # step 1: G responses to each of Q questions
            for episode in drawn:
                episode.rewards = grade(run.task, episode)  # step 2: such as format + correctness
            assign_advantages(drawn, config)  # step 3: A = (r - mean) / std within each group
            episodes += drawn
            batch = choose_groups(episodes, config.rollout)
            if len(batch) == config.rollout.questions_per_step * config.rollout.group_size:
                break
        stats = update(run, step, batch)  # steps 4 to 6: maximize sum_t weight_t * objective(ratio_t, A)
        if step == config.train.steps:
            progress.after = evaluate(run, "greedy") | evaluate(run, "sampled")
            stats |= progress.after
        elif config.eval.every and step % config.eval.every == 0:
            stats |= evaluate(run, "greedy")
        run.finish_step(step, episodes, stats)  # log, warn, save
    progress.after = progress.after or evaluate(run, "greedy") | evaluate(run, "sampled")


def next_problems(run: Run, draw: int) -> list[Any]:
    """The training problems of a draw: each epoch goes through all of them in an order of its own."""
    count, size = len(run.training), run.config.rollout.questions_per_step
    first = run.progress.drawn + draw * size
    places = [divmod(i, count) for i in range(first, first + size)]
    orders = {epoch: problem_order(count, run.config.train.seed, epoch) for epoch, _ in places}
    return [run.training[orders[epoch][place]] for epoch, place in places]


def rollout(run: Run, problems: list[Any], step: int, draw: int) -> list[Episode]:
    """`group_size` responses of the policy to each problem, not yet rewarded; those of a group are adjacent."""
    generator = make_generator(run.config.train.seed, f"rollout {draw}", step)
    with run.timed("rollout"):
        return sample(run, problems, run.config.rollout.group_size, run.config.rollout.sampling, generator)


def sample(
    agent: Agent, problems: list[Any], group_size: int, sampling: Sampling, generator: torch.Generator
) -> list[Episode]:
    """Prompts, responses and their texts as episodes."""
    prompts = [agent.encode_prompt(problem) for problem in problems]
    uniforms = torch.rand(len(problems) * group_size, agent.config.rollout.max_new_tokens, generator=generator)
    episodes = []
    for row, response in enumerate(agent.generate(prompts, uniforms, sampling)):
        question = row // group_size
        text = agent.tokenizer.decode(response.text_ids)
        ids, logprobs, truncated = response.ids, response.logprobs, response.truncated
        episodes.append(Episode(problems[question], prompts[question], ids, logprobs, truncated, text))
    return episodes


def choose_groups(episodes: list[Episode], settings: RolloutSettings) -> list[Episode]:
    """The episodes to learn from: with dynamic sampling (DAPO section 3.2) a batch of groups with variance.

    With one draw per step all groups are kept: zero-variance ones add no gradient but count in the loss's denominator.
    """
    if settings.max_draws == 1:
        return list(episodes)
    size = settings.group_size
    groups = [episodes[first : first + size] for first in range(0, len(episodes), size)]
    active = [group for group in groups if any(e.advantage for e in group) or not finite({}, group)] or groups[:1]
    return [episode for group in active[: settings.questions_per_step] for episode in group]


def update(run: Run, step: int, batch: list[Episode]) -> dict[str, float]:
    """The optimizer steps on one batch (algorithm 1, lines 10 and 11).

    Returns the statistics of the first, which are those of fresh responses, with the clip_fraction of the last. An
    update whose numbers are not finite is skipped and ends the step: then the statistics are its own.
    """
    settings, updates = run.config.train, []
    with run.timed("update"):
        assign_token_weights(batch, run.config)
        run.optimizer.learning_rate = learning_rate(step, settings)
        for _ in range(settings.updates_per_batch):
            stats = run.accumulate_gradient(batch, run.config.rollout.sampling)
            stats["learning_rate"] = run.optimizer.learning_rate
            stats["grad_norm"] = apply_gradient(run.policy, run.optimizer, settings.max_grad_norm)
            updates.append(stats)
            if not finite(stats, batch):
                return {**stats, "skipped": 1}
    return {**updates[0], "clip_fraction": updates[-1]["clip_fraction"], "skipped": 0}


def evaluate(run: Run, kind: str) -> dict[str, float]:
    """The mean score on the held-out problems, one response each, and its standard error.

    kind: "greedy", or "sampled" at temperature 1, with the same random numbers in every evaluation.
    """
    generator = make_generator(run.config.train.seed, "evaluation", 0)
    episodes = sample(run, run.held_out, 1, Sampling(temperature=float(kind == "sampled")), generator)
    scores = [grade(run.task, episode)[run.task.SCORE] for episode in episodes]
    score, error = mean_and_error(scores)
    return {f"eval_{kind}": score, f"eval_{kind}_se": error}


def mean_and_error(scores: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return fmean(scores), pstdev(scores) / math.sqrt(len(scores))


def make_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random generator of one purpose at one step: the same numbers whatever was drawn elsewhere before."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def start(arguments: argparse.Namespace) -> None:
    """Train, in a new folder or in that of the run to resume."""
    if arguments.resume is None:
        config = load_config(arguments.config, arguments.overrides)
        folder = on_first(lambda: new_run_folder(config, arguments.name))
    else:
        folder = on_first(lambda: find_run(arguments.resume, arguments.overrides))
        config = load_config(folder / "config.yml", arguments.overrides)
    with locked(folder) if rank() == 0 else nullcontext():
        if arguments.resume is None:
            on_first(lambda: new_run_folder(config, folder.name))  # once more: another run may have come and gone
            checkpoint, progress = None, Progress()
        else:
            checkpoint, progress = on_first(lambda: prepare_resume(folder, config))
        try:
            with open_run(config, folder, checkpoint, progress) as run:
                train(run)
        except Interrupted:
            say(f"stopped; to continue: {shlex.join(['python', 'train.py', '--resume', str(folder)])}")
            raise


def main(argv: list[str] | None = None) -> int:
    epilog, words = "", sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*words}:
        task = next((word.partition("=")[2] for word in words if word.startswith("data.task=")), "countdown")
        epilog = f"settings, as SETTING=VALUE or in the file (with data.task={task}):\n{describe_settings(task)}"
    parser = argparse.ArgumentParser(
        description="Train a Qwen2.5 model with GRPO.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", help="start a run with the settings of this YAML file, such as config_tiny.yml")
    which.add_argument("--resume", metavar="RUN", help="continue a run: its name, its folder, or `latest`")
    parser.add_argument("--name", help="the new run's folder in output.folder; default: the time")
    parser.add_argument("overrides", nargs="*", help="settings that replace the file's: rollout.group_size=32")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None and arguments.resume is None:
        file = next((word for word in arguments.overrides if word.endswith((".yml", ".yaml"))), "config_tiny.yml")
        complain(f"start a run:      python train.py --config {file}")
        complain("continue a run:   python train.py --resume latest    (--help lists every setting)")
        return 2
    if arguments.resume is not None and arguments.name:
        parser.error("--name is for a new run; --resume takes the run's name itself")
    try:
        with ranks():
            start(arguments)
    except Interrupted as stop:
        return 128 + stop.number
    except UserError as error:
        complain(f"train.py: {error}")
        return 2
    except KeyboardInterrupt:
        complain("train.py: stopped at once, without saving")
        return 130
    return 0


if __name__ == "__main__":
    run_program(main)
