"""Short runs of the tiny config, in this process, and what they leave behind: for the tests of whole runs."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

import train
from run import Run

ROOT = Path(__file__).resolve().parent.parent
ROWS = 16  # responses per step
SETTINGS = f"""rollout.group_size=4 rollout.questions_per_step=4 rollout.max_new_tokens=48 train.steps=3 train.seed=9
        train.threads=1 data.held_out=8 eval.every=0 checkpoint.every=1 checkpoint.keep=9 output.samples={ROWS}
        model.path={ROOT}/tiny data.path={ROOT}/tiny/problems.parquet""".split()


def arguments(folder: Path, *overrides: str) -> list[str]:
    """Of train.py, to train in `folder`."""
    new = ["--config", f"{ROOT}/config_tiny.yml", "--name", folder.name, f"output.folder={folder.parent}"]
    return [*new, *SETTINGS, *overrides]


class Done(NamedTuple):
    """A run that has ended."""

    folder: Path
    status: int
    printed: list[str]
    complaints: list[str]  # lines on stderr

    def metrics(self, times: bool = False) -> list[dict]:
        """The lines of metrics.jsonl; NaN and Infinity, which are no JSON, are refused."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line, parse_constant=pytest.fail) for line in lines]
        return [{key: value for key, value in m.items() if times or "second" not in key} for m in metrics]

    def tensors(self, place: Path | str | int, file: str = "model.safetensors") -> dict[str, bytes]:
        """Of a folder or a step's checkpoint, to be compared bit for bit, nan too."""
        folder = self.folder / (f"checkpoints/step-{place:06d}" if isinstance(place, int) else place)
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / file).items()}

    def skipped(self, step: int) -> list[dict]:
        """The episodes of a skipped step."""
        return json.loads((self.folder / "skipped" / f"step-{step:06d}.json").read_text())

    def samples(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]


def set_scores(patch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """From now on, these are the results of an evaluation after 0, 1, ... steps of the optimizer."""

    def evaluate(run: Run, kind: str) -> dict[str, float]:
        return {f"eval_{kind}": scores[run.optimizer.steps], f"eval_{kind}_se": 0.01}

    patch.setattr(train, "evaluate", evaluate)


def run(folder: Path, *overrides: str, resumed: bool = False) -> Done:
    typed = ["--resume", str(folder), *overrides] if resumed else arguments(folder, *overrides)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = train.main(typed)
    return Done(folder, status, out.getvalue().splitlines(), err.getvalue().splitlines())


resume = partial(run, resumed=True)
