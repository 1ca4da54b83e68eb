"""Trains a Qwen2.5 model with GRPO on Countdown: the whole algorithm is the loop in `train`.

    python train.py --config config_tiny.yml                      # a laptop, minutes, nothing to download
    python train.py --config config.yml                           # Qwen2.5-3B-Instruct on one 48 GB GPU
    python train.py --config config_tiny.yml --name try rollout.group_size=32 train.learning_rate=3e-4

Every step samples groups of answers, rewards them, turns the rewards into advantages, and moves the policy towards
the answers that did better than their group. The parts live in modules of their own: rollout.py samples,
countdown_task.py rewards, grpo.py has the advantages and the update, logbook.py writes down what happened.

Every random choice of step k comes from a generator made for (seed, purpose, k), so no generator has a past: an
evaluation more or less changes nothing, and a run can go on from any step.
"""

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import find_folder, load_model, read_model_config, save_checkpoint, save_model
from countdown_task import ASSISTANT_PREFIX, grade, load_problems, problem_order, question_text, split_problems
from data_types import Config, Episode, Problem, RolloutSettings, UserError, load_config
from grpo import accumulate_gradient, apply_gradient, assign_advantages, assign_token_weights
from logbook import Logbook, episode_metrics, new_run_folder
from memory import check_memory, expected_need
from optimizer import AdamW, learning_rate
from qwen2_model import Qwen2
from rollout import Sampling, generate
from tokenizer import Tokenizer


@dataclass
class Run:
    """What a run works with."""

    config: Config
    folder: Path  # of the model it starts from
    policy: Qwen2
    tokenizer: Tokenizer
    optimizer: AdamW
    training: list[Problem]
    held_out: list[Problem]
    cache_bytes: float  # the most that the KV cache may take
    drawn: int = 0  # training problems drawn so far


def train(config: Config, name: str | None) -> None:
    """GRPO: sample groups of answers, reward them, compare within the group, update the policy, repeat."""
    folder = new_run_folder(config, name)
    run = set_up(config)
    distribution = Sampling(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)
    with Logbook(config, folder) as logbook:
        before = evaluate_twice(run, logbook)
        logbook.write_step(0, before)
        for step in range(1, config.train.steps + 1):
            sampling, updating = logbook.phase("sample"), logbook.phase("update")
            drawn: list[Episode] = []
            zero_spread = 0
            for draw in range(config.rollout.most_draws):
                with sampling:
                    episodes = sample(run, next_questions(run), config.rollout.group_size, distribution,
                                      make_generator(config.train.seed, f"rollout {draw}", step), sampling.count)
                for episode in episodes:
                    episode.reward = grade(episode.text, episode.ended, episode.problem)
                zero_spread += assign_advantages(episodes, config.train, config.rollout.max_new_tokens)
                drawn += episodes
                batch = choose_groups(drawn, config.rollout)
                if len(batch) == config.rollout.questions_per_step * config.rollout.group_size:
                    break

            with updating:
                run.optimizer.param_groups[0]["lr"] = learning_rate(step, config.train)
                update = update_policy(run, batch, distribution, updating.count)

            metrics = {**episode_metrics(drawn), "zero_spread": zero_spread, **update,
                       **sampling.metrics("rollout"), **updating.metrics("update")}
            if step == config.train.steps:
                metrics |= (after := evaluate_twice(run, logbook))
            elif config.eval.every and step % config.eval.every == 0:
                metrics |= evaluate(run, config.eval.temperature, logbook)
            logbook.write_samples(step, drawn[: config.output.samples])
            logbook.write_step(step, metrics)
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                save_checkpoint(run.policy, run.folder, logbook.folder, step, config.checkpoint.keep)
        save_model(run.policy, run.folder, logbook.folder / "final")
        logbook.summarize(before, after)


def set_up(config: Config) -> Run:
    """Everything a run needs, what is cheap to check first."""
    device = find_device(config)
    # On a CPU the products of a small model are too short to share out among many cores.
    torch.set_num_threads(config.train.threads or min(os.cpu_count() or 1, 8))
    data = config.data
    folder = find_folder(config.model.path, config.model.revision)
    shape, tokenizer = read_model_config(folder), Tokenizer(folder)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} ids, but vocab_size in config.json is "
                        f"{shape.vocab_size}; tokenizer and weights must belong together")
    problems = load_problems(data.path, data.revision, data.number_counts, data.target_low, data.target_high)
    training, held_out = split_problems(problems, data.held_out)
    cache_bytes = check_memory(config, shape, device)
    policy = load_model(folder, device, getattr(torch, config.model.dtype))
    policy.checkpoint_layers = config.train.activation_checkpointing
    optimizer = AdamW(policy.parameters(), config.train)
    return Run(config, folder, policy, tokenizer, optimizer, training, held_out[: config.eval.size], cache_bytes)


def find_device(config: Config) -> torch.device:
    """The torch device of `model.device`; `auto` takes a GPU where there is one."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.model.device
    device = torch.device(next(kind for kind, found in there.items() if found) if name == "auto" else name)
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, found in there.items() if found)
        raise UserError(f"model.device is {name}{expected_need(config)}, which this machine does not have (it has "
                        f"{found}); to train on a CPU: python train.py --config config_tiny.yml")
    return device


def make_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random generator of one purpose at one step: the same numbers whatever was drawn elsewhere before."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def next_questions(run: Run) -> list[Problem]:
    """The next training problems: each epoch goes through all of them in an order of its own."""
    count, seed = len(run.training), run.config.train.seed
    places = [divmod(i, count) for i in range(run.drawn, run.drawn + run.config.rollout.questions_per_step)]
    run.drawn += len(places)
    orders = {epoch: problem_order(count, seed, epoch) for epoch, _ in places}
    return [run.training[orders[epoch][place]] for epoch, place in places]


def choose_groups(drawn: Sequence[Episode], rollout: RolloutSettings) -> list[Episode]:
    """The episodes to learn from. Dynamic sampling (DAPO section 3.2) takes the first full batch of groups with spread.

    One draw a step is taken as it is: groups without spread add no gradient but count in the loss's denominator.
    """
    if rollout.most_draws == 1:
        return list(drawn)
    size = rollout.group_size
    groups = [drawn[first : first + size] for first in range(0, len(drawn), size)]
    telling = [group for group in groups if any(episode.advantage for episode in group)]
    return [episode for group in telling[: rollout.questions_per_step] for episode in group]


def update_policy(run: Run, batch: Sequence[Episode], distribution: Sampling,
                  on_tokens: Callable[[int], object]) -> dict[str, float | None]:
    """The optimizer steps of one batch; the metrics are those of its first, which is the only one on fresh answers."""
    settings = run.config.train
    assign_token_weights(batch, settings, run.config.rollout.max_new_tokens)
    updates = []
    for _ in range(settings.updates_per_batch):
        figures = accumulate_gradient(run.policy, batch, len(run.tokenizer), distribution, settings,
                                      settings.tokens_per_microbatch, on_tokens)
        figures["grad_norm"] = apply_gradient(run.policy, run.optimizer, settings.max_grad_norm)
        updates.append(figures)
    return {**updates[0], "clip_fraction": updates[-1]["clip_fraction"]}


def sample(run: Run, problems: Sequence[Problem], group_size: int, sampling: Sampling, generator: torch.Generator,
           on_tokens: Callable[[int], object]) -> list[Episode]:
    """`group_size` answers of the policy to each problem, not yet rewarded."""
    rollout, tokenizer = run.config.rollout, run.tokenizer
    prompts = [tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX) for problem in problems]
    uniforms = torch.rand(len(problems) * group_size, rollout.max_new_tokens, generator=generator)
    answers = generate(run.policy, prompts, uniforms, tokenizer.end_ids, len(tokenizer), sampling, run.cache_bytes,
                       on_tokens=on_tokens)
    return [
        Episode(problems[a.question], a.question, prompts[a.question], a.ids, a.logprobs, a.ended,
                tokenizer.decode(a.ids[:-1] if a.ended else a.ids))
        for a in answers
    ]


def evaluate(run: Run, temperature: float, logbook: Logbook) -> dict[str, float]:
    """Success on the held-out problems, one answer each, and its standard error."""
    generator = make_generator(run.config.train.seed, "evaluation", 0)  # the same numbers for every evaluation
    with logbook.phase("evaluate") as phase:
        episodes = sample(run, run.held_out, 1, Sampling(temperature), generator, phase.count)
    correct = [grade(e.text, e.ended, e.problem).correct for e in episodes]
    rate = sum(correct) / len(correct)
    return {"eval_success": rate, "eval_success_se": math.sqrt(rate * (1 - rate) / len(correct))}


def evaluate_twice(run: Run, logbook: Logbook) -> dict[str, float]:
    """The evaluation of before and after: sampled, greedy, and at the config's temperature."""
    configured = run.config.eval.temperature
    results = {temperature: evaluate(run, temperature, logbook) for temperature in {1.0, 0.0, configured}}
    return {"eval_sampled": results[1.0]["eval_success"], "eval_greedy": results[0.0]["eval_success"],
            **results[configured]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a Qwen2.5 model with GRPO on Countdown.")
    parser.add_argument("--config", required=True, help="a YAML file such as config_tiny.yml")
    parser.add_argument("--name", help="the run's folder under output.folder; default: the time")
    parser.add_argument("overrides", nargs="*", help="settings that replace the file's: rollout.group_size=32")
    arguments = parser.parse_args(argv)
    try:
        train(load_config(arguments.config, arguments.overrides), arguments.name)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
