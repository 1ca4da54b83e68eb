"""Trains a Qwen2.5 model with GRPO: the whole algorithm is the loop in `train`.

    python train.py --config config_tiny.yml                      # a laptop, minutes, nothing to download
    python train.py --config config.yml                           # Qwen2.5-3B-Instruct on one 48 GB GPU
    python train.py --config config_tiny.yml --name try rollout.group_size=32 train.learning_rate=3e-4
    python train.py --resume try                                  # continues exactly where it stopped

rollout.py samples, a task such as countdown_task.py grades, grpo.py has the advantages, the objective and its gradient.
What surrounds the loop (set-up, signals, logging, checkpoints) is in plumbing/.

Every random choice of step k comes from a generator made for (seed, purpose, k). No generator outlives its purpose,
so an extra evaluation changes nothing and a run can continue from any step.
"""

import argparse
import hashlib
import math
from functools import partial
from statistics import fmean, pstdev

import torch

from data_types import Episode
from grpo import accumulate_gradient, apply_gradient, assign_advantages, assign_token_weights
from optimizer import learning_rate
from plumbing.config import describe_settings
from plumbing.ranks import process_group
from plumbing.run import Run, is_finite, open_run
from plumbing.tasks import Task, grade, problem_order
from plumbing.terminal import exit_status, run_program


def train(run: Run) -> None:
    """GRPO: sample groups of responses, reward them, compare within the group, update the policy, repeat."""
    questions = run.config.rollout.questions_per_step
    if not run.progress.before:
        run.log(0, evaluate(run, 0), [])
    for step in run.steps():
        with run.phase("rollout"):
            episodes = rollout(run, step, questions)  # G responses to each question
            assign_rewards(episodes, run.task)  # such as format + correctness
            assign_advantages(episodes, run.config)  # A = (r - mean) / std within each group
            batch = replace_zero_variance(run, step, episodes)
        with run.phase("update"):
            stats = update(run, step, batch)  # maximize sum_t weight_t * objective(ratio_t, A)
        run.finish_step(step, episodes, stats | evaluate(run, step))  # log, warn, save


def rollout(run: Run, step: int, questions: int, used: int = 0, draw: int = 0) -> list[Episode]:
    """Groups of responses to the next training problems, of which this step has `used` some already."""
    settings, seed = run.config.rollout, run.config.train.seed
    first = run.progress.problems_used + used
    order = problem_order(len(run.training), seed, first, first + questions)
    problems = [run.training[i] for i in order]
    generator = make_generator(seed, f"rollout {draw}", step)
    return run.sampler.rollout(problems, settings.group_size, settings.temperature, generator)


def assign_rewards(episodes: list[Episode], task: Task) -> None:
    for episode in episodes:
        episode.rewards = grade(task, episode)


def replace_zero_variance(run: Run, step: int, episodes: list[Episode]) -> list[Episode]:
    """The episodes to learn from: with dynamic sampling (DAPO section 3.2) only groups with variance.

    Draws again, up to rollout.max_draws times in all, as many questions as there are groups without variance; what
    it samples is appended to `episodes`. With one draw all groups are kept: zero-variance ones add no gradient but
    count in the loss's denominator.
    """
    settings, size = run.config.rollout, run.config.rollout.group_size
    if settings.max_draws == 1:
        return list(episodes)
    active = with_variance(episodes, size)
    for draw in range(1, settings.max_draws):
        missing = settings.questions_per_step - len(active) // size
        if missing == 0:
            break
        more = rollout(run, step, missing, used=len(episodes) // size, draw=draw)
        assign_rewards(more, run.task)
        assign_advantages(more, run.config)
        episodes += more
        active += with_variance(more, size)
    return active or episodes[:size]  # no group has variance: one of them, whose gradient is zero


def with_variance(episodes: list[Episode], group_size: int) -> list[Episode]:
    """The episodes of the groups whose rewards differ."""
    groups = [episodes[first : first + group_size] for first in range(0, len(episodes), group_size)]
    return [episode for group in groups if any(e.advantage for e in group) for episode in group]


def update(run: Run, step: int, batch: list[Episode]) -> dict[str, float]:
    """The optimizer steps on one batch (algorithm 1, lines 10 and 11).

    Returns the statistics of the first, which are those of fresh responses, with the clip_fraction of the last. An
    update with NaN or Inf is skipped and ends the step: then the statistics are those of the skipped update.
    """
    settings, updates = run.config.train, []
    assign_token_weights(batch, run.config)
    run.optimizer.learning_rate = learning_rate(step, settings)
    longest = max((episode.length for episode in batch if episode.active), default=1)
    work = partial(accumulate_gradient, run.policy, batch, run.config)
    for _ in range(settings.updates_per_batch):
        stats = run.tokens_at_a_time.attempt(work, least=longest, size=settings.tokens_per_microbatch)
        finite = is_finite(stats, batch)
        norm = apply_gradient(run.policy, run.optimizer, settings.max_grad_norm) if finite else math.nan
        run.policy.zero_grad(set_to_none=True)
        stats |= {"learning_rate": run.optimizer.learning_rate, "grad_norm": norm}
        if not math.isfinite(norm):
            return {**stats, "skipped": 1}
        updates.append(stats)
    return {**updates[0], "clip_fraction": updates[-1]["clip_fraction"], "skipped": 0}


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Mean scores on the held-out problems and their standard errors, where they are due; one response each.

    Greedy every eval.every steps; greedy and sampled at temperature 1 before the first step and after the last. The
    random numbers are the same in every evaluation.
    """
    every, ends = run.config.eval.every, step in (0, run.config.train.steps)
    kinds = ["greedy", "sampled"] if ends else ["greedy"] if every and step % every == 0 else []
    temperatures, scores = {"greedy": 0.0, "sampled": 1.0}, dict[str, float]()
    for kind in kinds:
        generator = make_generator(run.config.train.seed, "evaluation", 0)
        episodes = run.sampler.rollout(run.held_out, 1, temperatures[kind], generator)
        score, error = mean_and_error([grade(run.task, episode)[run.task.SCORE] for episode in episodes])
        scores |= {f"eval_{kind}": score, f"eval_{kind}_se": error}
    return scores


def mean_and_error(scores: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    return fmean(scores), pstdev(scores) / math.sqrt(len(scores))


def make_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random generator of one purpose at one step: the same numbers whatever was drawn elsewhere before."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a Qwen2.5 model with GRPO.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"settings, as SETTING=VALUE or in the file:\n{describe_settings()}"
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="start a run with the settings of this YAML file")
    which.add_argument("--resume", metavar="RUN", help="continue a run: its name, folder, or `latest`")
    parser.add_argument("--name", help="the new run's folder in output.folder; default: the time")
    parser.add_argument(
        "overrides", nargs="*", help="settings that replace the file's: rollout.group_size=32"
    )
    arguments = parser.parse_intermixed_args(argv)

    def start() -> None:
        with process_group(), open_run(**vars(arguments)) as run:
            train(run)

    return exit_status("train.py", start)


if __name__ == "__main__":
    run_program(main)
