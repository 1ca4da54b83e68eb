"""One group of four responses in numbers, from text to loss: the table of docs/grpo.md.

python -m tools.worked_group             # the tiny model, [3, 7, 12] -> 33; any --seed gives another group
"""

import argparse
from functools import partial
from pathlib import Path

from countdown_task import Problem
from grpo import accumulate_gradient, assign_advantages, assign_token_weights
from plumbing.config import load_config
from plumbing.model_folder import find_folder
from plumbing.run import set_up
from plumbing.tasks import grade
from plumbing.terminal import exit_status, run_program, say
from train import make_generator

SETTINGS = ["rollout.group_size=4", "rollout.max_new_tokens=64"]


def print_group(seed: int) -> None:
    config = load_config(Path(__file__).parents[1] / "config_tiny.yml", SETTINGS)
    agent = set_up(config, find_folder(config.model), 4)
    generator = make_generator(seed, "worked group", 0)
    episodes = agent.sampler.rollout([Problem((3, 7, 12), 33)], 4, config.rollout.temperature, generator)
    for episode in episodes:
        episode.rewards = grade(agent.sampler.task, episode)
    assign_advantages(episodes, config)
    assign_token_weights(episodes, config)
    say("| response | reward | advantage | tokens | sum of logprobs | its part of the loss |")
    say("| --- | --- | --- | --- | --- | --- |")
    for episode in episodes:
        logprob = sum(episode.old_logprobs)
        part = -episode.token_weight * episode.advantage * logprob
        text = episode.text.strip().replace("\n", " / ") + " (truncated)" * episode.truncated
        numbers = f"{episode.reward:.1f} | {episode.advantage:.3f} | {len(episode.response_ids)} | {logprob:.3f}"
        say(f"| `{text}` | {numbers} | {part:.4f} |")
    stats = accumulate_gradient(agent.sampler.policy, episodes, config, config.train.tokens_per_microbatch)
    say(f"\nthe loss, as the update computes it: {stats['loss']:.4f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.worked_group", description="A group of four responses in numbers.")
    parser.add_argument("--seed", type=int, default=5, help="seed of the random numbers")
    return exit_status("tools.worked_group", partial(print_group, parser.parse_args(argv).seed))


if __name__ == "__main__":
    run_program(main)
