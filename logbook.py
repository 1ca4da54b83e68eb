"""What a run leaves behind and what a person sees while it runs.

`runs/NAME/` gets config.yml (every setting), metrics.jsonl (one object per step), samples.jsonl (a few responses per
step), and both for TensorBoard; the terminal gets one line per step. The files read back with
`pandas.read_json(path, lines=True)`.

Responses are hostile text: before one reaches TensorBoard, which renders markup, `printable` and `html.escape` disarm
control characters and tags.

Left out: Weights & Biases and the like.
"""

import html
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, BinaryIO

from torch.utils.tensorboard import SummaryWriter

from config import dump_config
from data_types import Config, Episode, Progress
from files import write_text, writing
from task import Task
from terminal import printable, say, warn

LOGS = ("metrics.jsonl", "samples.jsonl")
GROUPS = {  # of metrics in TensorBoard; the others are of the update
    "eval": "eval_.*",
    "reward": "reward.*",
    "rollout": "response_length|truncated|groups|zero_variance",
    "time": ".*_seconds|.*_per_second",
}
STEP = (
    "reward {reward:.3f} ({shares})  {response_length:3.0f} tokens  zero-variance {zero_variance:2d}/{groups}  "
    "sampling {rollout_seconds:.1f} s  update {update_seconds:.1f} s  {left:.1f} min left"
)


class Logbook:
    """The files of a run in its folder.

    What was written after the last checkpoint (progress.files has the lengths) is removed. A full disk does not stop
    training: what could not be written (up to 1 MiB) is kept and tried with the next line.
    """

    def __init__(self, folder: Path, config: Config, task: Task, progress: Progress) -> None:
        self.folder, self.config, self.task = folder, config, task
        self.warned = False
        with writing(folder):
            write_text(folder / "config.yml", dump_config(config))
            self.files = {name: open_log(folder / name) for name in LOGS}
            for name, file in self.files.items():
                file.truncate(progress.files.get(name, 0))
            keep = progress.step and progress.step + 1
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=keep)

    @contextmanager
    def disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.warned:
                warn(f"{self.folder}: cannot be written: {error.strerror}; training continues")
            self.warned = True

    def close(self) -> None:
        for close in (*(file.close for file in self.files.values()), self.tensorboard.close):
            with self.disk_may_be_full():
                close()

    def flush(self) -> dict[str, int]:
        """Wait until the files are on the disk; their lengths in bytes. Raises UserError."""
        with writing(self.folder):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def append(self, name: str, text: str) -> None:
        with self.disk_may_be_full():
            self.files[name].write(text.encode())
            self.files[name].flush()

    def write_step(self, step: int, metrics: dict[str, Any], episodes: list[Episode]) -> None:
        """A line of metrics.jsonl and for the terminal, a few for samples.jsonl, and all of it for TensorBoard."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        samples = [self.sample(step, episode) for episode in episodes[: self.config.output.samples]]
        self.append("metrics.jsonl", json.dumps({"step": step, **clean}) + "\n")
        self.append("samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
        with self.disk_may_be_full():  # TensorBoard's writer does not recover, the files do
            for key, value in clean.items():
                group = next((group for group, names in GROUPS.items() if re.fullmatch(names, key)), "update")
                if value is not None:
                    self.tensorboard.add_scalar(f"{group}/{key.removeprefix(f'{group}_')}", value, step)
            for number, sample in enumerate(samples):
                figures = ", ".join(f"{key} {value}" for key, value in list(sample.items())[3:])
                text = f"{textwrap.fill(sample['prompt'], 100)}\n\n{sample['response']}\n\n{figures}"
                self.tensorboard.add_text(f"sample {number}", f"<pre>{html.escape(printable(text))}</pre>", step)
        for line in self.headlines(step, clean):
            say(line)

    def sample(self, step: int, episode: Episode) -> dict[str, Any]:
        """An object of samples.jsonl."""
        parts = {f"reward_{name}": value for name, value in episode.rewards.items()}
        question, response = self.task.question_text(episode.problem), self.task.ASSISTANT_PREFIX + episode.text
        ended, length = not episode.truncated, len(episode.response_ids)
        texts = {"step": step, "prompt": question, "response": response}
        return {**texts, "reward": episode.reward, **parts, "length": length, "ended": ended}

    def headlines(self, step: int, metrics: dict[str, Any]) -> list[str]:
        """The few figures of a step that a person watches: of its responses, and of an evaluation if there was one."""
        steps, lines = self.config.train.steps, []
        place = f"step {step:>{len(str(steps))}}/{steps}"
        if step:
            parts = [key for key in metrics if key.startswith("reward_") and key != "reward_std"]
            shares = ", ".join(f"{key.removeprefix('reward_')} {metrics[key]:.3f}" for key in parts)
            left = metrics["elapsed_seconds"] / step * (steps - step) / 60
            lines.append(f"{place}  {STEP.format(**metrics, shares=shares, left=left)}")
        for kind in ("greedy", "sampled"):
            if f"eval_{kind}" in metrics:
                score, error = metrics[f"eval_{kind}"], metrics[f"eval_{kind}_se"]
                lines.append(f"{place}  held-out {self.task.SCORE} ({kind}) {score:.3f} +- {error:.3f}")
        return lines

    def dump(self, step: int, episodes: list[Episode]) -> Path:
        """Write the episodes of a skipped step to the folder `skipped`, to look into."""
        path = self.folder / "skipped" / f"step-{step:06d}.json"
        with self.disk_may_be_full():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([asdict(episode) for episode in episodes], default=repr), encoding="utf-8")
        return path

    def summarize(self, progress: Progress) -> None:
        """The last lines: before, after, and where everything is."""
        before, after = progress.before, progress.after
        say(f"done: {progress.step} steps in {progress.seconds / 60:.1f} minutes")
        for kind in ("sampled", "greedy"):
            first, last = before[f"eval_{kind}"], after[f"eval_{kind}"]
            say(f"held-out {self.task.SCORE}, {kind}: {first:.3f} before, {last:.3f} after")
        say(f"the trained model: {self.folder / 'final'}")
        if progress.best - after["eval_greedy"] > 2 * after["eval_greedy_se"]:
            say(f"but it is not the best: {best_weights(progress)}")
        say(f"metrics, samples and TensorBoard files: {self.folder}")
        say(f"next: python evaluate.py {self.folder / 'final'}    python plot.py {self.folder}")


def open_log(path: Path) -> BinaryIO:
    """A file to append to; a symbolic link, which somebody else may have put there, is an OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab", 2**20)


def best_weights(progress: Progress) -> str:
    """Where the weights with the best held-out score are."""
    place = f"checkpoints/best-{progress.best_step:06d}" if progress.best_step else "the model it started from"
    return f"{place} had {progress.best:.3f} held-out"


def episode_metrics(episodes: list[Episode], config: Config) -> dict[str, float]:
    """What a step's responses were like: means over the responses, and the number of groups."""
    size = config.rollout.group_size
    groups = [episodes[first : first + size] for first in range(0, len(episodes), size)]
    rewards = [e.reward for e in episodes]
    parts = dict.fromkeys(name for e in episodes for name in e.rewards)
    return {
        **{f"reward_{name}": fmean(e.rewards.get(name, 0.0) for e in episodes) for name in parts},
        "reward": fmean(rewards),
        "reward_std": pstdev(rewards),
        "response_length": fmean(len(e.response_ids) for e in episodes),
        "truncated": fmean(e.truncated for e in episodes),
        "groups": len(groups),
        "zero_variance": sum(not any(e.advantage for e in group) for group in groups),
    }
