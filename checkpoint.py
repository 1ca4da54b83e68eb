"""Checkpoints of a run: complete, on the disk and checked when they are read, or not there at all.

    runs/NAME/checkpoints/step-000040/    a model folder, the optimizer's state, state.json: all that resuming needs
    runs/NAME/checkpoints/best-000040/    a model folder: the weights with the best held-out success so far

A folder is written as NAME.partial and gets its name when every byte of it is on the disk, so a process that dies while
saving leaves nothing that could be mistaken for a checkpoint. state.json holds a checksum of every file: a flipped bit
or a file from another step is found before training goes on with it. All of it is safetensors and JSON: loading a
checkpoint can run no code.

Resuming is exact because there is little state: weights, the optimizer's tensors, and a `Progress`. Random generators
have none (train.py makes one for each seed, purpose and step), and the learning rate follows from the step.

Left out: saving in the background, and less than everything (a 3B checkpoint is 25 GB: mind checkpoint.every and keep).
"""

import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open

from data_types import Config, UserError, load_config
from memory import GIB
from model_folder import listed, read_header, save_model, save_tensors, write_json, writing
from optimizer import AdamW
from qwen2_model import Qwen2
from tokenizer import read_json

STATE, PARTIAL = "state.json", ".partial"
FIXED = ("model.path", "model.revision", "model.dtype", "data.", "train.seed", "train.optimizer")  # within a run


@dataclass
class Progress:
    """How far a run is: what a resumed run needs to know besides the tensors."""

    step: int = 0  # steps that are done
    drawn: int = 0  # training problems drawn so far
    optimizer_steps: int = 0  # fewer than steps where one was skipped, more with several updates a batch
    skipped_in_a_row: int = 0
    best: float = 0.0  # held-out success, of all evaluations
    before: dict[str, float] | None = None  # the evaluation before training, and after it
    after: dict[str, float] | None = None
    files: dict[str, int] = field(default_factory=dict)  # bytes of metrics.jsonl and samples.txt that belong to it


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once it is whole and on the disk; else nothing changes."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(partial):
            yield partial
            for path in (*partial.iterdir(), partial):
                flush(path)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            flush(folder.parent)
            flush(folder.parent.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where it has been renamed, there is none


@contextmanager
def reported(what: str) -> Iterator[None]:
    """What cannot be saved is told, and does not stop training."""
    try:
        yield
    except UserError as error:
        print(f"warning: {what} could not be saved: {error}; training goes on", file=sys.stderr, flush=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and no longer only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def text_checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def save_checkpoint(run_folder: Path, policy: Qwen2, source: Path, optimizer: AdamW, progress: Progress,
                    keep: int) -> None:
    """Save the run's state as of `progress`, then remove all but the newest `keep` checkpoints.

    `source` is the model folder that training began with: its tokenizer's files go along, so that a checkpoint is a
    model to use. Raises UserError when there is no room or something cannot be written; no older checkpoint is lost.
    """
    folder = run_folder / "checkpoints" / f"step-{progress.step:06d}"
    needed = sum(tensor.nbytes for tensor in (*policy.hf_tensors().values(), *optimizer.tensors().values()))
    free = shutil.disk_usage(run_folder).free
    if folder.exists():
        return  # and so complete: a run stopped right after it was saved
    if free < 1.01 * needed:
        raise UserError(f"{folder}: needs {needed / GIB:.2f} GiB and the disk has {free / GIB:.2f} GiB left: "
                        "free some, or set output.folder to another disk")
    with appearing(folder) as partial:
        save_model(policy, source, partial)
        save_tensors(optimizer.tensors(), partial, "optimizer")
        files = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        state = {"progress": asdict(progress), "files": files}
        write_json(partial / STATE, {**state, "checksum": text_checksum(state)})
    remove(saved(run_folder)[:-keep])


def save_best(run_folder: Path, policy: Qwen2, source: Path, step: int) -> None:
    """Save the weights as the best so far, in place of the earlier best."""
    folder = run_folder / "checkpoints" / f"best-{step:06d}"
    with appearing(folder) as partial:
        save_model(policy, source, partial)
    remove([earlier for earlier in saved(run_folder, "best") if earlier != folder])


def remove(folders: list[Path]) -> None:
    """Remove checkpoints; renamed first, so that one half removed is none."""
    for folder in folders:
        with writing(folder):
            shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL)))


def saved(run_folder: Path, kind: str = "step") -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_folder / "checkpoints").glob(f"{kind}-" + "[0-9]" * 6))


def read_progress(folder: Path) -> Progress:
    """The Progress of a checkpoint whose files are all as they were saved; else UserError names those that are not."""
    try:
        content = read_json(folder / STATE)
    except UserError:
        content = {}
    state = {key: value for key, value in content.items() if key != "checksum"}
    intact = content.get("checksum") == text_checksum(state) and isinstance(state.get("files"), dict)
    files = state["files"] if intact else {STATE: None}
    changed = [name for name, value in files.items()
               if value is None or not (folder / name).is_file() or checksum(folder / name) != value]
    if changed:
        raise UserError(f"{folder}: not as it was saved: {listed(changed)}; remove this folder to go on from the "
                        "checkpoint before it")
    try:
        progress = Progress(**state["progress"])
        counts = (progress.step, progress.drawn, progress.optimizer_steps, progress.skipped_in_a_row,
                  *progress.files.values())
        sound = (asdict(progress).keys() == state["progress"].keys() and type(progress.best) is float
                 and all(type(count) is int and count >= 0 for count in counts)
                 and all(isinstance(evaluation, dict | None) for evaluation in (progress.before, progress.after)))
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{folder / STATE}: written by another version of this program; go on with that one")
    return progress


def load_optimizer(folder: Path, optimizer: AdamW, progress: Progress) -> None:
    """Read a checkpoint's optimizer state into `optimizer`, each tensor to where it lives."""
    tensors = optimizer.tensors()
    files = {name: path for path in sorted(folder.glob("optimizer*.safetensors")) for name in read_header(path)}
    if files.keys() != tensors.keys():
        raise UserError(f"{folder}: its optimizer state is not that of train.optimizer {optimizer.mode}")
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:  # anew for each, as model_folder.load_model does and says why
            tensors[name].copy_(file.get_tensor(name))
    optimizer.steps = progress.optimizer_steps


def find_run(config: Config, resume: str) -> Path:
    """The folder that --resume names; "latest" is the run in output.folder that wrote its metrics last."""
    if resume == "latest":
        found = Path(config.output.folder).glob("*/metrics.jsonl") if os.path.isdir(config.output.folder) else []
        runs = sorted(found, key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume latest: {config.output.folder} holds no run; check output.folder")
        return runs[-1].parent
    if not os.path.isfile(os.path.join(resume, "config.yml")):
        raise UserError(f"--resume {resume}: no run there (a run's folder holds config.yml)")
    return Path(resume)


def start_again(run_folder: Path, config: Config) -> tuple[Path | None, Progress]:
    """Make a run's folder ready to go on under `config`; returns its newest checkpoint, if there is one, and Progress.

    What a killed run had half written is removed. Raises UserError when the config or the checkpoint is not this run's.
    """
    check_changes(load_config(str(run_folder / "config.yml")), config)
    newest = next(iter(saved(run_folder)[::-1]), None)
    if not newest and (run_folder / "final").exists():
        raise UserError(f"{run_folder}: has ended and kept no checkpoint; to train its model on, start another run "
                        f"with model.path={run_folder / 'final'}")
    progress = read_progress(newest) if newest else Progress()
    if progress.step > config.train.steps:
        raise UserError(f"{newest}: is {progress.step} steps on, and train.steps is {config.train.steps}; "
                        "raise it to go on")
    for name, size in progress.files.items():
        if not os.path.isfile(run_folder / name) or os.path.getsize(run_folder / name) < size:
            raise UserError(f"{run_folder / name}: shorter than the {size} bytes it had at the checkpoint; "
                            "put it back to resume")
    for left in (*run_folder.glob(f"*{PARTIAL}"), *run_folder.glob(f"checkpoints/*{PARTIAL}")):
        shutil.rmtree(left, ignore_errors=True)
    print(f"resuming from {newest}" if newest else f"{run_folder} has no checkpoint yet: starting it anew", flush=True)
    return newest, progress


def check_changes(old: Config, new: Config) -> None:
    """Say which settings differ from those the run had; UserError for one that would make it another run."""
    values = [{f"{section}.{key}": value for section, keys in asdict(config).items() for key, value in keys.items()}
              for config in (old, new)]
    changed = [(name, was, values[1][name]) for name, was in values[0].items() if was != values[1][name]]
    for name, was, now in changed:
        if name.startswith(FIXED):
            raise UserError(f"{name} is {now} but was {was} when this run began; it cannot change within a run: set it "
                            "back, or start another run with --name")
    for name, was, now in changed:
        print(f"resuming with {name} {now}, which was {was}", flush=True)
