"""Short runs in this process, and what they leave behind: for the tests of whole runs.

Where responses matter the tiny model is trained, else a smaller one, whose steps take milliseconds: one layer with
random weights, 20 problems, and rewards that depend on the bytes of a response.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import pandas
import pytest
import torch
from safetensors.torch import load_file

import train
from data_types import Episode
from plumbing import terminal
from plumbing.model_folder import read_small_files, save_model
from qwen2_model import Qwen2, Qwen2Config
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ROWS = 16  # responses per step
SETTINGS = f"""rollout.group_size=4 rollout.questions_per_step=4 rollout.max_new_tokens=48 train.steps=3 train.seed=9
        train.threads=1 data.held_out=8 eval.every=0 checkpoint.every=1 checkpoint.keep=9 output.samples={ROWS}
        model.path={ROOT}/tiny data.path={ROOT}/tiny/problems.parquet""".split()


def small_world(folder: Path) -> list[str]:
    """Makes the smaller model and its problems in a folder; the settings of a run with them."""
    torch.manual_seed(37)  # with it the held-out score rises at first
    policy = Qwen2(shape := Qwen2Config(496, 16, 16, 1, 2, 1, 8, 1e-6, 1e4, True, 1024))
    torch.nn.init.normal_(policy.embed_tokens.weight, std=0.1)
    with torch.no_grad():
        policy.embed_tokens.weight[Tokenizer(ROOT / "tiny").end_ids] *= 12  # so that most responses end
    files = read_small_files(ROOT / "tiny") | {"vocab.json": b"{}", "merges.txt": b"#version: 0.2"}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | vars(shape)).encode()
    (folder / "model").mkdir(parents=True)
    save_model(policy, files, folder / "model")
    problems = pandas.DataFrame({"nums": [[3, n] for n in range(1, 21)], "target": range(11, 31)})
    problems.to_parquet(folder / "problems.parquet")
    paths = [f"model.path={folder}/model", f"data.path={folder}/problems.parquet"]
    return [*paths, "data.held_out=4", "rollout.max_new_tokens=12", "train.learning_rate=1e-3"]


def byte_rewards(task: object, episode: Episode) -> dict[str, float]:
    """In the place of train.grade: the smaller model solves nothing."""
    return {"format": 0.1, "correct": sum(episode.text.encode()) % 2.0}


def arguments(folder: Path, *overrides: str) -> list[str]:
    new = ["--config", f"{ROOT}/config_tiny.yml", "--name", folder.name, f"output.folder={folder.parent}"]
    return [*new, *SETTINGS, *overrides]


class Done(NamedTuple):
    """A run that has ended."""

    folder: Path
    status: int
    printed: list[str]
    complaints: list[str]  # lines on stderr

    def metrics(self, times: bool = False) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON
        return [{key: value for key, value in m.items() if times or "second" not in key} for m in metrics]

    def tensors(self, place: Path | str | int, file: str = "model.safetensors") -> dict[str, bytes]:
        """Of a folder or a step's checkpoint, to be compared bit for bit, nan too."""
        folder = self.folder / (f"checkpoints/step-{place:06d}" if isinstance(place, int) else place)
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / file).items()}

    def samples(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]


def set_scores(patch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """From now on, these are the results of an evaluation after 0, 1, ... steps of the optimizer."""
    scored, errors = ("eval_greedy", "eval_sampled"), {"eval_greedy_se": 0.01, "eval_sampled_se": 0.01}
    evaluate = lambda run, step: dict.fromkeys(scored, scores[run.optimizer.steps]) | errors  # noqa: E731
    patch.setattr(train, "evaluate", evaluate)


def main(folder: Path, typed: list[str]) -> Done:
    terminal.warn_once.cache_clear()  # as in a process of its own
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = train.main(typed)
    return Done(folder, status, out.getvalue().splitlines(), err.getvalue().splitlines())


def run(folder: Path, *overrides: str) -> Done:
    return main(folder, arguments(folder, *overrides))


def resume(folder: Path, *overrides: str) -> Done:
    return main(folder, ["--resume", str(folder), *overrides])
