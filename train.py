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
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch

from alarms import Alarms
from checkpoint import Progress, appearing, find_run, load_optimizer, reported, save_best, save_checkpoint, start_again
from countdown_task import ASSISTANT_PREFIX, grade, load_problems, problem_order, question_text, split_problems
from data_types import Config, Episode, Problem, RolloutSettings, UserError, load_config
from grpo import accumulate_gradient, apply_gradient, assign_advantages, assign_token_weights
from logbook import Logbook, episode_metrics, new_run_folder
from memory import check_memory, expected_need, fit_in_memory
from model_folder import find_folder, load_model, read_model_config, save_model
from optimizer import AdamW, learning_rate
from qwen2_model import Qwen2
from rollout import Sampling, cache_bytes_per_row, generate
from tokenizer import Tokenizer


@dataclass
class Run:
    """What a run works with."""

    config: Config
    source: Path  # folder of the model it started from
    policy: Qwen2
    tokenizer: Tokenizer
    optimizer: AdamW
    training: list[Problem]
    held_out: list[Problem]
    cache_bytes: float  # the most that the KV cache may take
    microbatch: float  # tokens in one backward
    progress: Progress


def train(run: Run, logbook: Logbook, interrupts: "Interrupts") -> None:
    """GRPO: sample groups of answers, reward them, compare within the group, update the policy, repeat."""
    config, progress, alarms = run.config, run.progress, Alarms(run.config)
    rollout = config.rollout
    distribution = Sampling(rollout.temperature, rollout.top_k, rollout.top_p)
    if progress.before is None:
        progress.before = evaluate_twice(run, logbook)
        progress.best = progress.before["eval_success"]
        logbook.write_step(0, progress.before)
    for step in range(progress.step + 1, config.train.steps + 1):
        if interrupts.asked:
            return
        sampling, updating = logbook.phase("sample"), logbook.phase("update")
        drawn: list[Episode] = []
        questions = zero_spread = 0
        for draw in range(rollout.most_draws):
            problems = draw_problems(run, progress.drawn + questions)
            questions += len(problems)
            with sampling:
                episodes = sample(run, problems, rollout.group_size, distribution,
                                  make_generator(config.train.seed, f"rollout {draw}", step), sampling.count)
            for episode in episodes:
                episode.reward = grade(episode.text, episode.ended, episode.problem)
            zero_spread += assign_advantages(episodes, config.train, rollout.max_new_tokens)
            drawn += episodes
            batch = choose_groups(drawn, rollout)
            if interrupts.asked or len(batch) == rollout.questions_per_step * rollout.group_size:
                break
        if interrupts.asked:
            return  # this step leaves no trace: a resumed run samples the same answers again

        with updating:
            run.optimizer.param_groups[0]["lr"] = learning_rate(step, config.train)
            update = update_policy(run, batch, distribution, updating.count)

        metrics = {**episode_metrics(drawn), "groups": questions, "zero_spread": zero_spread, **update,
                   **sampling.metrics("rollout"), **updating.metrics("update")}
        progress.after = evaluate_twice(run, logbook) if step == config.train.steps else None
        if progress.after:
            metrics |= progress.after
        elif config.eval.every and step % config.eval.every == 0:
            metrics |= evaluate(run, config.eval.temperature, logbook)
        logbook.write_samples(step, drawn[: config.output.samples])
        logbook.write_step(step, metrics)
        alarms.check(metrics, progress.best)
        finish_step(run, logbook, step, questions, batch, metrics)


def finish_step(run: Run, logbook: Logbook, step: int, questions: int, batch: Sequence[Episode],
                metrics: dict[str, float | None]) -> None:
    """Note how far the run is, keep the best weights, save a checkpoint when it is due, stop what has gone wrong."""
    progress, settings = run.progress, run.config.train
    progress.step, progress.drawn = step, progress.drawn + questions
    progress.optimizer_steps = run.optimizer.steps
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if metrics["skipped"] else 0
    if metrics["skipped"]:
        print(f"warning: step {step} skipped, its numbers are not finite; the batch: {logbook.dump(step, batch)}",
              file=sys.stderr, flush=True)
    if metrics.get("eval_success", 0.0) > progress.best:
        progress.best = metrics["eval_success"]
        with reported(f"the best weights so far, of step {step},"):
            save_best(logbook.folder, run.policy, run.source, step)
    every = run.config.checkpoint.every
    if every and (step % every == 0 or step == settings.steps):
        save(run, logbook)
    if progress.skipped_in_a_row >= settings.most_skips:
        raise UserError(f"{settings.most_skips} steps in a row had numbers that are not finite: train.learning_rate is "
                        "too high, the weights it began with are damaged, or the GPU is faulty; see the folder skipped")


def save(run: Run, logbook: Logbook) -> None:
    """Save a checkpoint of the last finished step; what cannot be saved is told, and does not stop training."""
    with reported(f"a checkpoint of step {run.progress.step}"):
        run.progress.files = logbook.flush()
        save_checkpoint(logbook.folder, run.policy, run.source, run.optimizer, run.progress, run.config.checkpoint.keep)


def run_to_the_end(config: Config, name: str | None, resume: str | None) -> int:
    """A run from its start or its last checkpoint to its end, or to a signal; returns the exit status."""
    folder = new_run_folder(config, name) if resume is None else find_run(config, resume)
    run = set_up(config, *(() if resume is None else start_again(folder, config)))
    progress = run.progress
    again = shlex.join(["python", "train.py", "--config", str(folder / "config.yml"), "--resume", str(folder)])
    with Logbook(config, folder, progress.files, progress.step) as logbook, Interrupts() as interrupts:
        try:
            train(run, logbook, interrupts)
        except UserError:
            if run.optimizer.steps == progress.optimizer_steps:  # the weights are those of the last finished step
                save(run, logbook)
            raise
        if interrupts.asked:
            save(run, logbook)
            print(f"stopped after step {progress.step}; to go on:\n{again}", flush=True)
            return 128 + interrupts.asked
        with appearing(folder / "final") as partial:
            save_model(run.policy, run.source, partial)
        logbook.summarize(progress.before, progress.after or evaluate_twice(run, logbook))
    return 0


class Interrupts:
    """While active, Ctrl-C and SIGTERM are noted, for the run to stop where it can save; the second one ends it."""

    def __enter__(self) -> "Interrupts":
        self.asked = 0  # the signal's number
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        for each in self._before:  # not as before: a shell has background jobs ignore Ctrl-C
            signal.signal(each, signal.default_int_handler)
        os.write(2, b"\nstopping: finishing this phase, then saving; once more to stop at once\n")  # print may be busy


def set_up(config: Config, checkpoint: Path | None = None, progress: Progress | None = None) -> Run:
    """Everything a run needs, what is cheap to check first; as of a checkpoint where there is one."""
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
    prompt = tokenizer.encode_prompt(question_text(training[0]), ASSISTANT_PREFIX)
    room = shape.max_position_embeddings
    if len(prompt) + config.rollout.max_new_tokens > room:
        raise UserError(f"{folder}: a prompt of {len(prompt)} tokens and rollout.max_new_tokens of "
                        f"{config.rollout.max_new_tokens} do not fit max_position_embeddings, {room} in config.json")
    cache_bytes = check_memory(config, shape, device)
    policy = load_model(checkpoint or folder, device, getattr(torch, config.model.dtype))
    policy.checkpoint_layers = config.train.activation_checkpointing
    optimizer = AdamW(policy.parameters(), config.train)
    progress = progress or Progress()
    if checkpoint:
        load_optimizer(checkpoint, optimizer, progress)
    return Run(config, folder, policy, tokenizer, optimizer, training, held_out[: config.eval.size], cache_bytes,
               config.train.tokens_per_microbatch, progress)


def find_device(config: Config) -> torch.device:
    """The torch device of `model.device`; `auto` takes a GPU where there is one."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.model.device
    device = torch.device(next(kind for kind, found in there.items() if found) if name == "auto" else name)
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, found in there.items() if found)
        raise UserError(f"model.device is {name}{expected_need(config)}, which this machine does not have (it has "
                        f"{found}); to train on a CPU: python train.py --config config_tiny.yml")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs belong to the current one
    return device


def make_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random generator of one purpose at one step: the same numbers whatever was drawn elsewhere before."""
    digest = hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_problems(run: Run, first: int) -> list[Problem]:
    """A step's training problems, from the `first`-th on: each epoch goes through all in an order of its own."""
    count, seed = len(run.training), run.config.train.seed
    places = [divmod(i, count) for i in range(first, first + run.config.rollout.questions_per_step)]
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
    telling = [group for group in groups if any(e.advantage or not finite(e.logprobs) for e in group)]
    return [episode for group in telling[: rollout.questions_per_step] for episode in group]


def finite(numbers: Sequence[float]) -> bool:
    return all(map(math.isfinite, numbers))


def update_policy(run: Run, batch: Sequence[Episode], distribution: Sampling,
                  on_tokens: Callable[[int], object]) -> dict[str, float | None]:
    """The optimizer steps of one batch; the metrics are those of its first, the one on fresh answers.

    skipped is 1 when some number was not finite: from then on the weights stay as they are.
    """
    settings = run.config.train
    assign_token_weights(batch, settings, run.config.rollout.max_new_tokens)
    healthy = all(finite(episode.logprobs) for episode in batch)
    longest = max((len(e.prompt_ids) + len(e.response_ids) for e in batch if e.advantage * e.token_weight),
                  default=1)
    updates = []
    for _ in range(settings.updates_per_batch):
        figures, run.microbatch = fit_in_memory(
            lambda tokens: accumulate_gradient(run.policy, batch, len(run.tokenizer), distribution, settings,
                                               int(tokens), on_tokens),
            run.microbatch, min(longest, run.microbatch), "micro-batch")
        healthy = healthy and math.isfinite(figures["loss"])
        norm = apply_gradient(run.policy, run.optimizer, settings.max_grad_norm, healthy)
        healthy = healthy and math.isfinite(norm)
        updates.append({**figures, "grad_norm": norm})
    return {**updates[0], "clip_fraction": updates[-1]["clip_fraction"], "skipped": int(not healthy)}


def sample(run: Run, problems: Sequence[Problem], group_size: int, sampling: Sampling, generator: torch.Generator,
           on_tokens: Callable[[int], object]) -> list[Episode]:
    """`group_size` answers of the policy to each problem, not yet rewarded."""
    rollout, tokenizer = run.config.rollout, run.tokenizer
    prompts = [tokenizer.encode_prompt(question_text(problem), ASSISTANT_PREFIX) for problem in problems]
    uniforms = torch.rand(len(problems) * group_size, rollout.max_new_tokens, generator=generator)
    row = cache_bytes_per_row(run.policy, max(map(len, prompts)) + rollout.max_new_tokens)
    room = min(run.cache_bytes, len(uniforms) * row)
    answers, fitted = fit_in_memory(
        lambda room: generate(run.policy, prompts, uniforms, tokenizer.end_ids, len(tokenizer), sampling, room,
                              on_tokens=on_tokens), room, row, "KV cache")
    run.cache_bytes = fitted if fitted < room else run.cache_bytes
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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", help="the run's folder under output.folder; default: the time")
    which.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; `latest`: the last one")
    parser.add_argument("overrides", nargs="*", help="settings that replace the file's: rollout.group_size=32")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return run_to_the_end(load_config(arguments.config, arguments.overrides), arguments.name, arguments.resume)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("train.py: out of GPU memory where nothing can be made smaller: set train.optimizer=offload, or see what "
              "`python benchmark.py --config C --plan GB` says this run needs", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped at once; what was saved before is there to --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
