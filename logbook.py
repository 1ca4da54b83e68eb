"""What a run leaves behind and what a person sees while it runs.

`runs/NAME/` gets config.yml (every setting), metrics.jsonl (one object per step), samples.txt (a few responses per
step), and TensorBoard scalars and texts; the terminal gets one line per step.

Responses are hostile text: before one reaches a terminal or TensorBoard (which renders markup), `printable` and
`html.escape` disarm control characters and tags.

Left out: Weights & Biases and the like. metrics.jsonl reads back with `pandas.read_json(path, lines=True)`.
"""

import html
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from torch.utils.tensorboard import SummaryWriter

from config import dump_config
from data_types import Config, Episode, Progress
from files import write_text, writing
from terminal import printable, say, warn

LOGS = ("metrics.jsonl", "samples.txt")


class Logbook:
    """The files of a run in its folder.

    What was written after the last checkpoint (progress.files has the lengths) is removed. A full disk does not stop
    training: what could not be written (up to 1 MiB) is kept and tried with the next line.
    """

    def __init__(self, folder: Path, config: Config, progress: Progress) -> None:
        self.folder, self.config = folder, config
        self.began, self.warned = time.perf_counter(), False
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
        """A line of metrics.jsonl and for the terminal, a few responses for samples.txt, all of it for TensorBoard."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        samples = [sample_text(step, episode) for episode in episodes[: self.config.output.samples]]
        self.append("metrics.jsonl", json.dumps({"step": step, **clean}) + "\n")
        self.append("samples.txt", "".join(f"--- {sample}\n\n" for sample in samples))
        with self.disk_may_be_full():  # TensorBoard's writer does not recover, the files do
            for key, value in clean.items():
                if value is not None:
                    self.tensorboard.add_scalar(key, value, step)
            for number, sample in enumerate(samples):
                self.tensorboard.add_text(f"sample {number}", f"<pre>{html.escape(sample)}</pre>", step)
        steps = self.config.train.steps
        say(f"step {step:>{len(str(steps))}}/{steps}  {headline(clean)}")

    def dump(self, step: int, episodes: list[Episode]) -> Path:
        """Write the episodes of a skipped step to the folder `skipped`, to look into."""
        path = self.folder / "skipped" / f"step-{step:06d}.json"
        with self.disk_may_be_full():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([asdict(episode) for episode in episodes]), encoding="utf-8")
        return path

    def summarize(self, progress: Progress) -> None:
        """The last lines: before, after, and where everything is."""
        before, after = progress.before, progress.after
        say(f"done: {progress.step} steps in {(time.perf_counter() - self.began) / 60:.1f} minutes")
        for kind in ("sampled", "greedy"):
            say(f"held-out success, {kind}: {before[f'eval_{kind}']:.1%} before, {after[f'eval_{kind}']:.1%} after")
        say(f"the trained model: {self.folder / 'final'}")
        if progress.best - after["eval_greedy"] > 2 * after["eval_greedy_se"]:
            say(f"but it is not the best: {best_weights(progress)}")
        say(f"metrics, samples and TensorBoard files: {self.folder}")


def open_log(path: Path) -> BinaryIO:
    """A file to append to; a symbolic link, which somebody else may have put there, is an OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "ab", 2**20)


def best_weights(progress: Progress) -> str:
    """Where the weights with the best held-out success are."""
    place = f"checkpoints/best-{progress.best_step:06d}" if progress.best_step else "the model it started from"
    return f"{place} had {progress.best:.1%} held-out success"


def sample_text(step: int, episode: Episode) -> str:
    end = " [truncated]" if episode.truncated else ""
    return printable(f"step {step}, {episode.problem}, reward {episode.reward.total:g}\n<think>{episode.text}{end}")


def episode_metrics(episodes: list[Episode], config: Config) -> dict[str, float]:
    """What a step's responses were like: means over the responses, and the number of groups."""
    count, size = len(episodes), config.rollout.group_size
    groups = [episodes[first : first + size] for first in range(0, count, size)]
    return {
        "reward": sum(e.reward.total for e in episodes) / count,
        "success": sum(e.reward.correct for e in episodes) / count,
        "format_rate": sum(e.reward.format > 0 for e in episodes) / count,
        "response_length": sum(len(e.response_ids) for e in episodes) / count,
        "truncated": sum(e.truncated for e in episodes) / count,
        "groups": len(groups),
        "zero_variance": sum(not any(e.advantage for e in group) for group in groups),
    }


ROLLOUT = (
    "reward {reward:.3f}  success {success:.1%}  format {format_rate:.1%}  length {response_length:.0f}  "
    "zero-variance {zero_variance}/{groups}  rollout {rollout_seconds:.1f}s at {rollout_tokens_per_second:,.0f} tok/s  "
    "update {update_seconds:.1f}s at {update_tokens_per_second:,.0f} tok/s"
)
HELD_OUT = "held-out (greedy) {eval_greedy:.1%} +- {eval_greedy_se:.1%}"


def headline(metrics: dict[str, Any]) -> str:
    """The few figures of a step that a person watches; step 0 is an evaluation only."""
    known = {"reward": ROLLOUT, "eval_greedy": HELD_OUT}
    return "  ".join(text.format(**metrics) for key, text in known.items() if key in metrics)
