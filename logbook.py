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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_types import Config, Episode, UserError, dump_config


def printable(text: str) -> str:
    """`text` with everything but printable characters and newlines escaped: no terminal codes, no hidden marks."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def new_run_folder(config: Config, name: str | None) -> Path:
    """Where a run is written: `config.output.folder`/`name` (default: the time). UserError if a run is there."""
    folder = Path(config.output.folder) / (name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds a run; choose another --name, or remove the folder")
    return folder


class Logbook:
    """The files of a run in its folder; a context manager that closes them."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yml").write_text(dump_config(config), encoding="utf-8")
            self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
            self._samples = open(self.folder / "samples.txt", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the run folder ({error.strerror})") from None
        self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"))
        self._steps = config.train.steps
        self._began = time.perf_counter()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._metrics.close()
        self._samples.close()
        self._tensorboard.close()

    def phase(self, what: str) -> "Phase":
        """A part of a step to be timed, with a progress bar that counts tokens; a context manager."""
        return Phase(what)

    def write_step(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same as TensorBoard scalars, and a short line for the terminal."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **clean}) + "\n")
        self._metrics.flush()
        for key, value in clean.items():
            if value is not None:
                self._tensorboard.add_scalar(key, value, step)
        print(f"step {step:>{len(str(self._steps))}}/{self._steps}  {headline(clean)}", flush=True)

    def summarize(self, before: dict[str, float], after: dict[str, float]) -> None:
        """The last five lines: before, after, and where everything is."""
        minutes = (time.perf_counter() - self._began) / 60
        print(f"done: {self._steps} steps in {minutes:.1f} minutes")
        for kind in ("sampled", "greedy"):
            print(f"held-out success, {kind}: {before[f'eval_{kind}']:.1%} before, {after[f'eval_{kind}']:.1%} after")
        print(f"the trained model: {self.folder / 'final'}")
        print(f"metrics, samples and TensorBoard files: {self.folder}")

    def write_samples(self, step: int, episodes: Sequence[Episode]) -> None:
        """A few answers in full, as text and in TensorBoard."""
        for number, episode in enumerate(episodes):
            text = printable("<think>" + episode.text) + ("" if episode.ended else " [cut off]")
            title = f"step {step}, {episode.problem}, reward {episode.reward.total:g}"
            self._samples.write(f"--- {title}\n{text}\n\n")
            escaped = html.escape(f"{title}\n{text}")
            self._tensorboard.add_text(f"sample {number}", f"<pre>{escaped}</pre>", step)
        self._samples.flush()


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
