"""What a run leaves behind and what a person sees while it runs.

`runs/NAME/` gets config.yml (every setting), metrics.jsonl (one object per step), samples.jsonl (a few responses per
step), and the metrics for TensorBoard; the terminal gets one line per step, and a warning where they look wrong. The
files read back with `pandas.read_json(path, lines=True)`.

Left out: Weights & Biases and the like; stopping by itself. Only numbers that are not finite stop a run (run.py): the
rest may be a hard task.
"""

import json
import math
import os
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from data_types import Config, Episode, Progress
from plumbing.config import dump_config
from plumbing.files import write_text
from plumbing.tasks import Task
from plumbing.terminal import say, training_continues, warn

STEP = (
    "reward {reward:.3f} ({parts})  {response_length:3.0f} tokens  zero-variance {zero_variance:2d}/{groups}  "
    "sampling {rollout_seconds:.1f} s  update {update_seconds:.1f} s  {left:.1f} min left"
)


class Logbook:
    """The files of a run in its folder.

    What was written after the last checkpoint (progress.files has the lengths) is removed. A full disk does not stop
    training: what could not be written (up to 1 MiB) is kept and tried with the next line.
    """

    def __init__(self, folder: Path, config: Config, task: Task, progress: Progress) -> None:
        self.folder, self.config, self.task = folder, config, task
        self.files = {name: open(folder / name, "ab", 2**20) for name in ("metrics.jsonl", "samples.jsonl")}  # noqa: SIM115
        for name, file in self.files.items():
            written = os.fstat(file.fileno()).st_size
            file.truncate(min(written, progress.files.get(name, 0)))
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step + 1)
        self.alarms = Alarms(config, task)

    def close(self) -> None:
        for close in (*(file.close for file in self.files.values()), self.tensorboard.close):
            with training_continues(f"{self.folder}"):
                close()

    def flush(self) -> dict[str, int]:
        """Wait until the files are on the disk; their lengths in bytes."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def append(self, name: str, *objects: dict[str, Any]) -> None:
        with training_continues(f"{self.folder}"):
            self.files[name].write("".join(json.dumps(each) + "\n" for each in objects).encode())
            self.files[name].flush()

    def write_step(self, step: int, metrics: dict[str, Any], episodes: list[Episode], progress: Progress) -> None:
        """A line of metrics.jsonl, for TensorBoard and the terminal, a few of samples.jsonl, and warnings."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self.append("metrics.jsonl", {"step": step, **clean})
        self.append("samples.jsonl", *(self.sample(step, e) for e in episodes[: self.config.output.samples]))
        with training_continues(f"{self.folder}"):  # TensorBoard's writer does not recover, the files do
            # only now: a resumed run keeps its own until it has trained a step with other settings
            write_text(self.folder / "config.yml", dump_config(self.config))
            for key, value in clean.items():
                if value is not None:
                    self.tensorboard.add_scalar(key, value, step)
        self.show(step, clean)
        if step:
            self.alarms.check(metrics, progress)

    def sample(self, step: int, episode: Episode) -> dict[str, Any]:
        """An object of samples.jsonl."""
        return {
            "step": step,
            "prompt": self.task.question_text(episode.problem),
            "response": self.task.ASSISTANT_PREFIX + episode.text,
            "reward": episode.reward,
            **{f"reward_{name}": value for name, value in episode.rewards.items()},
            "ended": not episode.truncated,
        }

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        """Print what a person watches: a step's rewards, lengths and seconds, and an evaluation if there was one."""
        steps = self.config.train.steps
        place = f"step {step:>{len(str(steps))}}/{steps}"
        if step:
            names = [key for key in metrics if key.startswith("reward_") and key != "reward_std"]
            parts = ", ".join(f"{name.removeprefix('reward_')} {metrics[name]:.3f}" for name in names)
            left = metrics["elapsed_seconds"] / step * (steps - step) / 60
            say(f"{place}  {STEP.format(**metrics, parts=parts, left=left)}")
        for kind in ("greedy", "sampled"):
            if f"eval_{kind}" in metrics:
                score, error = metrics[f"eval_{kind}"], metrics[f"eval_{kind}_se"]
                say(f"{place}  held-out {self.task.SCORE} ({kind}) {score:.3f} +- {error:.3f}")

    def summarize(self, progress: Progress) -> None:
        """The last lines: before, after, and where everything is."""
        say(f"done: {progress.step} steps in {progress.seconds / 60:.1f} minutes")
        for kind in ("sampled", "greedy") if progress.after else ():
            before, after = progress.before[f"eval_{kind}"], progress.after[f"eval_{kind}"]
            say(f"held-out {self.task.SCORE}, {kind}: {before:.3f} before, {after:.3f} after")
        if progress.after and progress.best - progress.after["eval_greedy"] > 2 * progress.after["eval_greedy_se"]:
            say(f"but it is not the best: {best_weights(progress)}")
        say(f"trained: python evaluate.py {self.folder / 'final'}    python plot.py {self.folder}")


def best_weights(progress: Progress) -> str:
    """Where the weights with the best held-out score are."""
    place = f"checkpoints/best-{progress.best_step:06d}" if progress.best_step else "the model it started from"
    return f"{place} had {progress.best:.3f} held-out"


def episode_metrics(episodes: list[Episode], group_size: int) -> dict[str, float]:
    """What a step's responses were like: means over the responses, and the number of groups."""
    groups = [episodes[first : first + group_size] for first in range(0, len(episodes), group_size)]
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


# ---- Warnings for a run that nobody watches --------------------------------------------------------------------

GAP_BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2}  # mean |log ratio| between trainer and sampler


class Alarms:
    """Looks at each step's metrics and warns about each kind of trouble the first time it is seen.

    A resumed run may warn again.
    """

    def __init__(self, config: Config, task: Task) -> None:
        self.config, self.score, self.bound = config, task.SCORE, GAP_BOUNDS[config.model.dtype]
        self.warned: set[str] = set()
        self.best = 0.0

    def check(self, metrics: dict[str, Any], progress: Progress) -> None:
        """Warn of each trouble in these metrics that was not warned of before."""
        gap, score = metrics["logprob_gap"], metrics[f"reward_{self.score}"]
        self.best = max(self.best, score)
        collapsed = self.best >= 0.1 and score < 0.1 * self.best
        flat = metrics["zero_variance"] > metrics["groups"] / 2 and not collapsed
        lower, best = f"lower train.learning_rate (it is {self.config.train.learning_rate:g})", best_weights(progress)
        self.warn(collapsed, f"{self.score} has collapsed: {lower} and start again; {best}")
        self.warn(flat, "most groups have zero variance: raise rollout.group_size, or choose other questions (data.*)")
        self.warn(metrics["truncated"] > 0.5, "more than half are truncated: raise rollout.max_new_tokens")
        self.warn(not gap <= self.bound, f"trainer and sampler differ: {gap:.2g} per logprob, a bug or a broken GPU")

    def warn(self, seen: bool, advice: str) -> None:
        kind = advice.partition(":")[0]
        if seen and kind not in self.warned:
            self.warned.add(kind)
            warn(advice)
