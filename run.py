"""Everything around the loop of train.py: set-up, the device, signals, memory that runs out, and what follows a step.

Nothing here is part of the algorithm. `Agent` is a model that can be asked, `Run` one that is trained; two methods wrap
the sampler and the gradient (`generate`, `accumulate_gradient`), and `finish_step` takes over when a step is done.
"""

import hashlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

import grpo
from alarms import Alarms
from checkpoint import disk_space, load_optimizer, save_best, save_checkpoint
from data_types import Config, Episode, Progress, Sampling, UserError
from files import atomic_folder
from hub import commit, find_data
from logbook import Logbook, episode_metrics
from memory import GIB, check_memory, out_of_memory
from model_folder import find_folder, load_model, read_model_config, read_small_files, save_model
from optimizer import AdamW
from ranks import count, gather, largest, rank, shard, sharded, share, whole
from rollout import Response, Sampler
from task import load_task, split_problems
from terminal import progress_bar, say, warn
from tokenizer import Tokenizer

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Raised to stop the run after SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        self.number = number


class Agent:
    """A model that can be asked: the task and its problems, the tokenizer, the policy and its sampler.

    What is cheap to check is checked first; the weights come with `load`.
    """

    def __init__(self, config: Config, source: Path) -> None:
        self.device, self.dtype = find_device(config.model.device), getattr(torch, config.model.dtype)
        # on a CPU the matmuls of a small model are too short to share out among many cores
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(config.train.threads or max(1, min(cores, 8)))
        self.source, self.task = source, load_task(config.data.task)
        data = found = config.data
        if data.path:
            files = find_data(data)
            data, found = replace(data, revision=commit(files, data.revision)), replace(data, path=str(files))
        model = replace(config.model, revision=commit(source, config.model.revision))
        self.config = config = replace(config, model=model, data=data)  # what was fetched belongs to the run
        self.shape, self.tokenizer = read_model_config(source), Tokenizer(source)
        ids = len(self.tokenizer)
        if ids > self.shape.vocab_size:
            raise UserError(f"{source}: {ids} ids in the tokenizer, {self.shape.vocab_size} in config.json")
        self.training, self.held_out = split_problems(self.task, self.task.load_problems(found), data.held_out)
        longest = max(self.training + self.held_out, key=lambda problem: len(self.task.question_text(problem)))
        self.prompt_tokens = len(self.encode_prompt(longest))
        needed, most = self.prompt_tokens + config.rollout.max_new_tokens, self.shape.max_position_embeddings
        if needed > most:
            raise UserError(f"{source}: prompt and rollout.max_new_tokens need {needed} positions, and it has {most}")

    def load(self, max_rows: int) -> None:
        """Read the weights; `max_rows` responses are sampled at the same time, fewer once memory ran out."""
        split = self.config.train.shard and count() > 1
        self.policy = load_model(self.source, torch.device("cpu") if split else self.device, self.dtype)
        if split:
            shard(self.policy, self.device, self.dtype)
        self.policy.vocabulary = len(self.tokenizer)
        self.sampler = Sampler(self.policy, self.tokenizer.end_ids)
        self.limits = {"rows at a time": max_rows, "tokens per micro-batch": self.config.train.tokens_per_microbatch}

    def encode_prompt(self, problem: Any) -> list[int]:
        return self.tokenizer.encode_prompt(self.task.question_text(problem), self.task.ASSISTANT_PREFIX)

    def generate(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        """Sampler.generate, shared out among the ranks, in waves where memory runs out."""
        mine, group = share(len(prompts)), len(uniforms) // len(prompts)
        rows = uniforms[mine.start * group : mine.stop * group]
        ends = self.tokenizer.end_ids
        sampler = Sampler(whole(self.policy, self.dtype), ends) if sharded(self.policy) else self.sampler
        attempt = partial(sampler.generate, prompts[mine], rows, sampling)
        return gather(self.fit("rows at a time", group, len(rows), attempt) if len(rows) else [])

    def fit(self, what: str, least: int, most: int, attempt: Callable[[int], T]) -> T:
        """The result of `attempt(limit)`, made again with half the limit whenever memory runs out.

        All randomness comes with the arguments, so another attempt does the same work, up to the rounding of another
        batch shape.
        """
        while True:
            limit = min(most, self.limits[what])
            try:
                return attempt(limit)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            torch.cuda.empty_cache()  # only here does nothing refer to the failed attempt's tensors any more
            if limit <= least:
                cures = "lower rollout.max_new_tokens, set train.activation_checkpointing=true, train.optimizer=offload"
                raise UserError(f"out of memory even with {limit} {what}: {cures}, or free some")
            self.limits[what] = max(least, limit // 2)
            warn(f"out of memory; from now on at most {self.limits[what]} {what}")


class Run(Agent):
    """A run in its folder, from its start or from a checkpoint."""

    def __init__(self, config: Config, folder: Path, checkpoint: Path | None, progress: Progress) -> None:
        super().__init__(config, checkpoint or find_folder(config.model))
        self.folder, self.progress, config = folder, progress, self.config
        digest = hashlib.sha256(repr((self.training, self.held_out)).encode()).hexdigest()
        if checkpoint and digest != progress.problems:
            where = config.data.path or f"{config.data.task}_task.py"
            raise UserError(f"{where}: not the problems this run began with: put them back or start anew")
        progress.problems = digest
        max_rows = check_memory(config, self.shape, self.prompt_tokens, self.device)
        self.small_files = read_small_files(self.source)
        self.load(max_rows)
        self.policy.checkpoint_layers = config.train.activation_checkpointing
        self.optimizer = AdamW(self.policy.parameters(), config.train, self.dtype)
        if checkpoint:
            load_optimizer(checkpoint, self.optimizer, progress)
        self.logbook = Logbook(folder, config, self.task, progress) if rank() == 0 else None  # rank 0 alone writes
        self.alarms = Alarms(config, self.task)
        self.signal = 0  # the stop signal that came
        self.seconds = {"rollout": 0.0, "update": 0.0}  # since the last step
        self.step_began = 0.0
        self.introduce()

    def introduce(self) -> None:
        """Say what is about to run."""
        rollout, model = self.config.rollout, self.config.model
        weights, tokens = sum(p.numel() for p in self.policy.parameters()), rollout.max_new_tokens
        say(f"model   {model.path}: {weights:,} parameters, {model.dtype}, on {self.device}")
        say(f"task    {self.config.data.task}: {len(self.training):,} problems, {len(self.held_out)} more held out")
        say(f"step    {rollout.questions_per_step} questions x {rollout.group_size} responses of up to {tokens} tokens")
        with suppress(OSError):  # some network disks do not say
            if self.progress.step:  # some of it is there already
                return
            needed, free = disk_space(self.policy, self.optimizer) / GIB, shutil.disk_usage(self.folder).free / GIB
            say(f"disk    {needed:.2f} GiB for two checkpoints, best and final weights, {free:.2f} are free")
            if needed > free:
                warn(f"the disk of {self.folder} may get full: free some, or choose another output.folder")

    # ---- Around the parts of a step -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left; Interrupted between two of them when a signal came."""
        steps, done = self.config.train.steps, self.progress.step
        with progress_bar("training", " steps", steps, done) as bar:
            self.step_began = time.perf_counter()
            for step in range(done + 1, steps + 1):
                self.stop_if_asked()
                yield step
                bar.update()

    def stop_if_asked(self) -> None:
        number = largest(self.signal)  # of all ranks: together they go on, or stop
        if number and self.optimizer.steps == self.progress.optimizer_steps:  # not after an unfinished update
            raise Interrupted(number)

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """The run stops where nothing is lost; the next signal ends it at once."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):  # not what was set before: a shell may have them ignored
            signal.signal(each, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes may send it more than once
        text = b"\nstopping as soon as nothing is lost, then saving; press Ctrl-C again to stop immediately\n"
        with suppress(OSError):
            os.write(2, text)  # print may be busy

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def generate(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        self.stop_if_asked()  # before and after: all that follows may take minutes
        responses = super().generate(prompts, uniforms, sampling)
        self.stop_if_asked()
        return responses

    def accumulate_gradient(self, episodes: list[Episode], sampling: Sampling) -> dict[str, float]:
        """grpo.accumulate_gradient, in smaller micro-batches where memory runs out.

        A gradient that comes from numbers that are not finite is dropped, so no optimizer step follows.
        """
        policy, settings = self.policy, self.config.train
        longest = max((episode.length for episode in episodes if episode.active), default=1)
        attempt = partial(grpo.accumulate_gradient, policy, episodes, sampling, settings)
        stats = self.fit("tokens per micro-batch", longest, settings.tokens_per_microbatch, attempt)
        if not finite(stats, episodes):
            policy.zero_grad(set_to_none=True)
        return stats

    # ---- After a step ------------------------------------------------------------------------------------------

    def finish_step(self, step: int, episodes: list[Episode], stats: dict[str, Any]) -> None:
        """Log a step, warn, keep the best weights, save a checkpoint when it is due, stop what has gone wrong."""
        config, progress = self.config, self.progress
        metrics = episode_metrics(episodes, config) | stats | self.speed(episodes)
        self.log(step, metrics, episodes)
        if self.logbook:
            self.alarms.check(metrics, progress)
            if stats["skipped"]:
                path = self.logbook.dump(step, episodes)
                warn(f"step {step} is skipped: not all of its numbers are finite; its episodes are in {path}")
        progress.step, progress.drawn = step, progress.drawn + metrics["groups"]
        progress.optimizer_steps = self.optimizer.steps
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if stats["skipped"] else 0
        if metrics.get("eval_greedy", progress.best) > progress.best:
            with reported("the best weights so far"):
                policy = whole(self.policy, self.dtype)
                if self.logbook:
                    save_best(self.folder, policy, self.small_files, step)
                progress.best, progress.best_step = metrics["eval_greedy"], step
        if config.checkpoint.every and (step % config.checkpoint.every == 0 or step == config.train.steps):
            self.save()
        if progress.skipped_in_a_row >= config.train.max_skips:
            skips = f"{config.train.max_skips} steps in a row had numbers that are not finite (see the folder skipped)"
            raise UserError(f"{skips}: train.learning_rate is too high, the weights are damaged, or the GPU is faulty")

    def log(self, step: int, metrics: dict[str, float], episodes: list[Episode]) -> None:
        if self.logbook:
            self.logbook.write_step(step, metrics, episodes)

    def speed(self, episodes: list[Episode]) -> dict[str, float]:
        """Of sampling (response tokens) and of the update (prompt and response tokens of the active rows)."""
        sampled = sum(len(episode.response_ids) for episode in episodes)
        run = sum(episode.length for episode in episodes if episode.active)
        tokens = {"rollout": sampled, "update": run * self.config.train.updates_per_batch}
        spent, self.seconds = self.seconds, {"rollout": 0.0, "update": 0.0}
        began, self.step_began = self.step_began, time.perf_counter()
        self.progress.seconds += self.step_began - began
        speed = {f"{phase}_tokens_per_second": tokens[phase] / seconds for phase, seconds in spent.items()}
        seconds = {f"{phase}_seconds": seconds for phase, seconds in spent.items()}
        return speed | seconds | {"elapsed_seconds": self.progress.seconds}

    def save(self) -> None:
        """Save a checkpoint of the last finished step; a failure is reported and does not stop training."""
        policy, state = whole(self.policy, self.dtype), self.optimizer.save()
        if not self.logbook:
            return
        with reported(f"a checkpoint of step {self.progress.step}"):
            self.progress.files = self.logbook.flush()
            keep = self.config.checkpoint.keep
            save_checkpoint(self.folder, policy, self.small_files, state, self.progress, keep)

    def finish(self) -> None:
        """Save the trained model and say how it went."""
        policy = whole(self.policy, self.dtype)
        if not self.logbook:
            return
        with atomic_folder(self.folder / "final") as partial:
            save_model(policy, self.small_files, partial)
        self.logbook.summarize(self.progress)


@contextmanager
def open_run(config: Config, folder: Path, checkpoint: Path | None, progress: Progress) -> Iterator[Run]:
    """A Run that saves a checkpoint when a signal or an error ends it, and the trained model at its own end."""
    with memory_in_one_line():
        run = Run(config, folder, checkpoint, progress)
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    handlers = {number: signal.signal(number, run.note_signal) for number in STOP_SIGNALS if number not in nohup}
    try:
        with memory_in_one_line():
            yield run
            run.finish()
    except Exception as error:
        alone = sharded(run.policy) and not isinstance(error, Interrupted)  # this rank cannot save without the others
        if run.optimizer.steps == progress.optimizer_steps and not alone:  # the weights are the last finished step's
            run.save()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if run.logbook:
            run.logbook.close()


@contextmanager
def memory_in_one_line() -> Iterator[None]:
    """Memory that runs out where nothing can be made smaller: a UserError, however it is reported."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError("out of memory where nothing can be made smaller: try train.optimizer=offload") from None


def finite(stats: dict[str, Any], episodes: list[Episode]) -> bool:
    """Whether all numbers of a step are finite: its statistics, and what the sampler computed."""
    return all(map(math.isfinite, [*stats.values(), *(sum(episode.old_logprobs) for episode in episodes)]))


@contextmanager
def reported(what: str) -> Iterator[None]:
    """What cannot be saved is reported, and does not stop training."""
    try:
        yield
    except UserError as error:
        warn(f"{what} could not be saved: {error}; training continues")


def find_device(name: str) -> torch.device:
    """The torch device of `model.device`, made ready; `auto` takes a GPU where there is one."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(next(kind for kind, found in there.items() if found) if name == "auto" else name)
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, found in there.items() if found)
        raise UserError(f"model.device is {name}, but this machine has only {found}; config_tiny.yml trains on a CPU")
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)  # streams and graphs belong to the current one
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each shape, a second each time
    return device
