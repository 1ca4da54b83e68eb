"""What a run leaves behind and what a person sees while it runs.

`runs/NAME/` gets the resolved config.yml, metrics.jsonl (one object a step), samples.txt (a few answers a step), and
TensorBoard scalars and texts; the terminal gets a progress bar for sampling and for the update, and one line a step.

Answers are hostile text: before it reaches a terminal or TensorBoard (which renders markup), `printable` and
`html.escape` take the power out of control characters and tags.

Left out: Weights & Biases and the like. metrics.jsonl reads back with `pandas.read_json(path, lines=True)`.
"""

import html
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import flush
from data_types import Config, Episode, UserError, dump_config
from model_folder import writing


def printable(text: str) -> str:
    """`text` with everything but printable characters and newlines escaped: no terminal codes, no hidden marks."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def new_run_folder(config: Config, name: str | None) -> Path:
    """Where a run is written: `config.output.folder`/`name` (default: the time). UserError if something is there."""
    name = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    if Path(name).name != name or name == ".." or not name.isprintable():
        raise UserError(f"--name {name}: must be a plain name, for a folder in {config.output.folder}")
    folder = Path(config.output.folder) / name
    if os.path.lexists(folder) and (not folder.is_dir() or set(os.listdir(folder)) - {"config.yml.partial"}):
        raise UserError(f"{folder} is already there: go on with --resume {folder}, or choose another --name")
    return folder


class Logbook:
    """The files of a run in its folder; a context manager that closes them.

    files: how many bytes of each belong to the steps already done; what was written later is cut off. A disk that is
    full does not stop training: what could not be written (up to 1 MiB) is kept and tried with the next line.
    """

    def __init__(self, config: Config, folder: Path, files: dict[str, int], step: int) -> None:
        self.folder = folder
        with writing(folder):
            (folder / "config.yml.partial").write_text(dump_config(config), encoding="utf-8")
            (folder / "config.yml.partial").replace(folder / "config.yml")
            flush(folder / "config.yml")
            flush(folder)
            names = ("metrics.jsonl", "samples.txt")
            self._files = {name: open_at(folder / name, files.get(name, 0)) for name in names}
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)
        self._steps = config.train.steps
        self._began = time.perf_counter()
        self._complained = False

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for file in (*self._files.values(), self._tensorboard):
            with self._disk_may_be_full():
                file.close()

    @contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                print(f"warning: {self.folder}: cannot be written: {error.strerror}; training goes on",
                      file=sys.stderr, flush=True)
            self._complained = True

    def flush(self) -> dict[str, int]:
        """Wait until the files are on the disk; their lengths in bytes. Raises UserError."""
        with writing(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def phase(self, what: str) -> "Phase":
        """A part of a step to be timed, with a progress bar that counts tokens; a context manager."""
        return Phase(what)

    def write_step(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same as TensorBoard scalars, and a short line for the terminal."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        with self._disk_may_be_full():
            self._files["metrics.jsonl"].write(json.dumps({"step": step, **clean}).encode() + b"\n")
            self._files["metrics.jsonl"].flush()
        with self._disk_may_be_full():  # apart: TensorBoard's writer does not recover, the files do
            for key, value in clean.items():
                if value is not None:
                    self._tensorboard.add_scalar(key, value, step)
        print(f"step {step:>{len(str(self._steps))}}/{self._steps}  {headline(clean)}", flush=True)

    def summarize(self, before: dict[str, float], after: dict[str, float]) -> None:
        """The last lines: before, after, and where everything is."""
        minutes = (time.perf_counter() - self._began) / 60
        print(f"done: {self._steps} steps in {minutes:.1f} minutes")
        for kind in ("sampled", "greedy"):
            print(f"held-out success, {kind}: {before[f'eval_{kind}']:.1%} before, {after[f'eval_{kind}']:.1%} after")
        print(f"the trained model: {self.folder / 'final'}")
        print(f"metrics, samples and TensorBoard files: {self.folder}")

    def write_samples(self, step: int, episodes: Sequence[Episode]) -> None:
        """A few answers in full, as text and in TensorBoard."""
        samples = [(f"step {step}, {episode.problem}, reward {episode.reward.total:g}",
                    printable("<think>" + episode.text) + ("" if episode.ended else " [cut off]"))
                   for episode in episodes]
        with self._disk_may_be_full():
            self._files["samples.txt"].write("".join(f"--- {title}\n{text}\n\n" for title, text in samples).encode())
            self._files["samples.txt"].flush()
        with self._disk_may_be_full():
            for number, (title, text) in enumerate(samples):
                escaped = html.escape(f"{title}\n{text}")
                self._tensorboard.add_text(f"sample {number}", f"<pre>{escaped}</pre>", step)

    def dump(self, step: int, episodes: Sequence[Episode]) -> Path:
        """Write a batch whose update was skipped to the folder `skipped`, to look into."""
        path = self.folder / "skipped" / f"step-{step:06d}.json"
        with self._disk_may_be_full():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps([asdict(episode) for episode in episodes]), encoding="utf-8")
        return path


def open_at(path: Path, size: int) -> BinaryIO:
    """A file to append to after its first `size` bytes; the rest is cut off."""
    file = open(path, "ab", buffering=2**20)
    file.truncate(size)
    return file


class Phase:
    """One part of a step: how long it took, in one go or several, and how many tokens it went through."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.tokens = 0
        self.seconds = 0.0

    def __enter__(self) -> "Phase":
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(desc=self._what, unit=" tokens", unit_scale=True, leave=False, disable=hidden)
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._began
        self._bar.close()

    def count(self, tokens: int) -> None:
        """So many tokens more are done."""
        self.tokens += tokens
        self._bar.update(tokens)

    def metrics(self, name: str) -> dict[str, float]:
        """Seconds and tokens/s under the names of metrics.jsonl."""
        return {f"{name}_seconds": self.seconds, f"{name}_tokens_per_second": self.tokens / self.seconds}


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What a step's answers were like, as means over the answers."""
    count = len(episodes)
    return {
        "reward": sum(e.reward.total for e in episodes) / count,
        "success": sum(e.reward.correct for e in episodes) / count,
        "format_rate": sum(e.reward.format > 0 for e in episodes) / count,
        "answer_length": sum(len(e.response_ids) for e in episodes) / count,
        "truncated": sum(not e.ended for e in episodes) / count,
    }


def headline(metrics: dict[str, Any]) -> str:
    """The few figures of a step that a person watches."""
    if "reward" not in metrics:  # step 0: nothing but the evaluation
        return f"held-out success {metrics['eval_success']:.1%} +- {metrics['eval_success_se']:.1%}"
    parts = [
        f"reward {metrics['reward']:.3f}",
        f"success {metrics['success']:.1%}",
        f"format {metrics['format_rate']:.1%}",
        f"length {metrics['answer_length']:.0f}",
        f"flat groups {metrics['zero_spread']}",
        f"rollout {metrics['rollout_seconds']:.1f}s at {metrics['rollout_tokens_per_second']:,.0f} tok/s",
        f"update {metrics['update_seconds']:.1f}s at {metrics['update_tokens_per_second']:,.0f} tok/s",
    ]
    if "eval_success" in metrics:
        parts.append(f"held-out {metrics['eval_success']:.1%} +- {metrics['eval_success_se']:.1%}")
    return "  ".join(parts)
