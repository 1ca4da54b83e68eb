"""Everything around the loop of train.py: set-up, the device, signals, and what follows a step.

Nothing here is part of the algorithm. `open_run` sets a run up and ends it; `Run` is what the loop works with. From
rollout.py comes the sampler, which `set_up` makes for training and for evaluate.py alike.
"""

import hashlib
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_types import Config, Episode, Progress
from optimizer import AdamW
from plumbing import checkpoint, files, logbook, memory, model_folder, ranks, tasks
from plumbing.config import load_config
from plumbing.terminal import Interrupted, UserError, is_rank_zero, say, training_continues
from rollout import Sampler
from tokenizer import Tokenizer

# ---- Set-up ----------------------------------------------------------------------------------------------------


@contextmanager
def open_run(config: str, resume: str | None, name: str | None, overrides: list[str]) -> Iterator["Run"]:
    """A new run, or one to resume: set up, and ended well or saved, whatever happens in between.

    Takes the arguments of train.py's command line, which has either `config` or `resume`.
    """
    if resume is None:
        settings = load_config(config, overrides)
        folder = ranks.on_rank_zero(partial(checkpoint.new_run_folder, settings, name))
    elif name:
        raise UserError("--name is for a new run; --resume takes the run's name itself")
    else:
        folder = ranks.on_rank_zero(partial(checkpoint.find_run, resume))
        settings = load_config(folder / "config.yml", overrides)
    with checkpoint.locked(folder) if is_rank_zero() else nullcontext():
        prepare = partial(checkpoint.prepare_resume, folder, settings)
        saved, progress = ranks.on_rank_zero(prepare) if resume else (None, Progress())
        agent = set_up(settings, saved)
        digest = hashlib.sha256(repr((agent.training, agent.held_out)).encode()).hexdigest()
        if progress.problems not in ("", digest):
            raise UserError(f"{settings.data.path}: not the problems this run began with: put them back or start anew")
        progress.problems = digest
        optimizer = AdamW(agent.sampler.policy.parameters(), settings.train, agent.sampler.policy.dtype)
        if saved:
            checkpoint.load_optimizer(saved, optimizer, progress)
        run = Run(agent, optimizer, folder, progress)
        run.introduce()
        with stop_signals(run):  # while it saves, too
            try:
                yield run
                run.finish()
            except Exception as error:
                # one rank of a sharded run cannot save without the others: a signal stops all of them, an error one
                alone = ranks.is_sharded(run.policy) and not isinstance(error, Interrupted)
                if run.optimizer.steps == progress.optimizer_steps and not alone:  # the last finished step's weights
                    run.save()
                if isinstance(error, Interrupted):
                    say(f"stopped; to continue: {shlex.join(['python', 'train.py', '--resume', str(folder)])}")
                raise
            finally:
                if is_rank_zero():
                    run.logbook.close()


@dataclass
class Agent:
    """A model that can be asked, for training and for evaluate.py."""

    config: Config
    sampler: Sampler
    training: list[Any]  # problems
    held_out: list[Any]
    small_files: dict[str, bytes]  # of the model's folder, besides its weights


def set_up(config: Config, source: Path | None = None, max_rows: int = 0) -> Agent:
    """The agent of a config; what is cheap to check comes first, the weights are fetched and read last.

    source: the model's folder, if not that of `model.path`. max_rows: responses sampled at a time; 0: as many as fit
    beside what training needs, which must fit.
    """
    device = find_device(config.model.device)
    if config.train.threads or "OMP_NUM_THREADS" not in os.environ:  # torch itself reads the latter
        torch.set_num_threads(config.train.threads or free_cores())
    task = tasks.load_task(config.data.task)
    training, held_out = tasks.split_problems(task, config.data)
    source = source or model_folder.find_folder(config.model)  # gigabytes: after what is small
    tokenizer, shape = Tokenizer(source), model_folder.read_model_config(source)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(f"{source}: {len(tokenizer)} ids in the tokenizer, {shape.vocab_size} in config.json")
    longest = max((task.question_text(problem) for problem in training + held_out), key=len)
    prompt_tokens = len(tokenizer.encode_prompt(longest, task.ASSISTANT_PREFIX))
    needed, positions = prompt_tokens + config.rollout.max_new_tokens, shape.max_position_embeddings
    if needed > positions:
        raise UserError(f"{source}: prompt and rollout.max_new_tokens need {needed} positions, it has {positions}")
    rows = memory.Limit("rows at a time", max_rows or memory.check_memory(config, shape, prompt_tokens, device))
    sharded = config.train.shard and ranks.world_size() > 1
    place = torch.device("cpu") if sharded else device
    policy = model_folder.load_model(source, place, getattr(torch, config.model.dtype))
    if sharded:
        ranks.shard_weights(policy, device)
    policy.vocabulary = len(tokenizer)
    sampler = Sampler(policy, tokenizer, task, config.rollout.max_new_tokens, rows)
    return Agent(config, sampler, training, held_out, model_folder.read_small_files(source, tokenizer.end_ids))


def free_cores() -> int:
    """How many cores this process may use and no other does, 1 to 8.

    The matmuls of a small model are too short to share out among more, and a thread that waits for a core delays all.
    """
    free = [8, (os.cpu_count() or 1) - round(os.getloadavg()[0])]
    with suppress(AttributeError, OSError, ValueError):  # macOS has neither of these, and a container may have no quota
        free.append(len(os.sched_getaffinity(0)))
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        free.append(int(quota) // int(period))
    return max(1, min(free))


def find_device(name: str) -> torch.device:
    """The torch device of `model.device`, made ready; `auto` takes a GPU where there is one that torch can use."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # the first counts what an old driver has, too
    device = torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)
    none = f"no GPU, or the driver is too old for this torch (CUDA {torch.version.cuda}): pip install torch==2.10.0"
    if name == "auto" and torch.version.cuda and not gpus:
        say(f"device  cpu, although this torch is built for CUDA: {none}")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", device.index or 0))
        if max(index + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > gpus:  # so that all ranks say the same
            few = f"this machine has {gpus} GPUs, numbered from 0, one for each process"
            raise UserError(f"model.device is {name}: {few if gpus else none}; or model.device=cpu")
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)  # streams and graphs belong to the current one
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each shape, a second each time
    return device


@contextmanager
def stop_signals(run: "Run") -> Iterator[None]:
    """While this lasts, a stop signal is noted; the next one stops the run immediately."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = (signal.SIGINT, signal.SIGTERM) if nohup else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, run.note_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- The run ---------------------------------------------------------------------------------------------------


class Run:
    """What the loop of train.py works with, and what follows each of its steps."""

    def __init__(self, agent: Agent, optimizer: AdamW, folder: Path, progress: Progress) -> None:
        self.agent, self.config, self.sampler, self.policy = agent, agent.config, agent.sampler, agent.sampler.policy
        self.training, self.held_out, self.task = agent.training, agent.held_out, agent.sampler.task
        self.optimizer, self.folder, self.progress, config = optimizer, folder, progress, agent.config
        self.policy.checkpoint_layers = config.train.activation_checkpointing
        self.tokens_at_a_time = memory.Limit("tokens per micro-batch", config.train.tokens_per_microbatch)
        if is_rank_zero():  # which alone writes
            self.logbook = logbook.Logbook(folder, config, self.task, progress)
        self.signal = 0  # the stop signal that came
        self.seconds = {"rollout_seconds": 0.0, "update_seconds": 0.0}  # of this step
        self.step_began = time.perf_counter()

    def introduce(self) -> None:
        """Say what is about to run."""
        model, numbers = self.config.model, sum(p.numel() for p in self.policy.parameters())
        say(f"model   {model.path}: {numbers:,} parameters, {model.dtype}, on {self.policy.head.device}")
        say(f"task    {self.config.data.task}: {len(self.training):,} problems, {len(self.held_out)} more held out")
        tokenizer = self.sampler.tokenizer
        say(f"ends    of a response: {' '.join(tokenizer.decode([end]) for end in tokenizer.end_ids)}")

    # ---- Around the parts of a step -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps that are left; Interrupted between two of them when a signal came."""
        steps, done = self.config.train.steps, self.progress.step
        self.step_began = time.perf_counter()
        for step in range(done + 1, steps + 1):
            self.stop_if_asked()
            yield step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of a step, "rollout" or "update". A signal drops what was sampled, but no update."""
        began = time.perf_counter()
        yield
        self.seconds[f"{name}_seconds"] = time.perf_counter() - began
        if name == "rollout":
            self.stop_if_asked()

    def note_signal(self, number: int, frame: Any) -> None:
        """The run stops where nothing is lost; the next signal stops it immediately."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):  # not what was set before: a shell may have them ignored
            signal.signal(each, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes may send it more than once
        text = b"\nstopping as soon as nothing is lost, then saving; press Ctrl-C again to stop immediately\n"
        with suppress(OSError):
            os.write(2, text)  # print may be busy

    def stop_if_asked(self) -> None:
        if number := max(ranks.all_gather([self.signal])):  # together they go on, or stop
            raise Interrupted(number)

    # ---- After a step -------------------------------------------------------------------------------------------

    def finish_step(self, step: int, episodes: list[Episode], stats: dict[str, Any]) -> None:
        """Log a step, warn, keep the best weights, save a checkpoint when it is due, stop what has gone wrong."""
        config, progress = self.config, self.progress
        metrics = logbook.episode_metrics(episodes, config.rollout.group_size) | stats | self.time_step()
        self.log(step, metrics, episodes)
        progress.step, progress.problems_used = step, progress.problems_used + metrics["groups"]
        progress.optimizer_steps = self.optimizer.steps
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if stats["skipped"] else 0
        if metrics.get("eval_greedy", progress.best) > progress.best:
            policy = ranks.unsharded_copy(self.policy)
            with training_continues("the best weights so far could not be saved"):
                if is_rank_zero():
                    checkpoint.save_best(self.folder, policy, self.agent.small_files, step)
                progress.best, progress.best_step = metrics["eval_greedy"], step
        if config.checkpoint.every and (step % config.checkpoint.every == 0 or step == config.train.steps):
            self.save()
        if progress.skipped_in_a_row >= config.train.max_skips:
            skips = f"{config.train.max_skips} steps in a row had NaN or Inf"
            raise UserError(f"{skips}: train.learning_rate is too high, the weights are damaged, or the GPU is faulty")

    def log(self, step: int, metrics: dict[str, Any], episodes: list[Episode]) -> None:
        """Log a step's metrics; held-out scores before the first step and after the last are kept for the summary."""
        scores = {key: value for key, value in metrics.items() if key.startswith("eval_")}
        if step == 0:
            self.progress.before, self.progress.best = scores, scores["eval_greedy"]
        self.progress.after = scores if step == self.config.train.steps else {}
        if is_rank_zero():
            self.logbook.write_step(step, metrics, episodes, self.progress)

    def time_step(self) -> dict[str, float]:
        """Seconds of the step's rollout and update, and of the run so far."""
        now = time.perf_counter()
        self.progress.seconds += now - self.step_began
        self.step_began = now
        return {**self.seconds, "elapsed_seconds": self.progress.seconds}

    def save(self) -> None:
        """Save a checkpoint of the last finished step; a failure is reported and does not stop training."""
        policy, state = ranks.unsharded_copy(self.policy), {}
        for name, tensor in self.optimizer.tensors().items():
            whole = ranks.unsharded(tensor)
            if is_rank_zero():  # a machine's other ranks would fill its memory with copies
                state[name] = whole.cpu() if ranks.is_sharded(self.policy) else whole
        folder, keep = self.folder / "checkpoints" / f"step-{self.progress.step:06d}", self.config.checkpoint.keep
        if is_rank_zero() and not folder.exists():
            with training_continues(f"a checkpoint of step {self.progress.step} could not be saved"):
                checkpoint.remove_older(self.folder, max(1, keep - 1))  # at most `keep` are there at a time
                self.progress.files = self.logbook.flush()
                checkpoint.save_checkpoint(folder, policy, self.agent.small_files, state, self.progress)
                checkpoint.remove_older(self.folder, keep)

    def finish(self) -> None:
        """Save the trained model and say how it went."""
        policy = ranks.unsharded_copy(self.policy)
        if is_rank_zero():
            with files.atomic_folder(self.folder / "final") as partial:
                model_folder.save_model(policy, self.agent.small_files, partial)
            self.logbook.summarize(self.progress)


def is_finite(stats: dict[str, float], episodes: list[Episode]) -> bool:
    """Whether all numbers of a step are finite: its statistics, and what the sampler computed."""
    return all(map(math.isfinite, [*stats.values(), *(sum(episode.old_logprobs) for episode in episodes)]))
