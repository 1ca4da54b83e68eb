"""Checkpoints of a run: complete, on the disk and checked when they are read, or not there at all.

    runs/NAME/checkpoints/step-000040/    a model folder, the optimizer's state, state.json: all that resuming needs
    runs/NAME/checkpoints/best-000040/    a model folder: the weights with the best held-out score so far

A folder is written as NAME.partial and gets its name when every byte of it is on the disk, so a process that dies while
saving leaves nothing that could be mistaken for a checkpoint. checksums.json has the SHA-256 of every other file: a
flipped bit or a file from another step is found before training continues. All of it is safetensors and JSON: loading
a checkpoint can run no code.

Resuming is exact because there is little state: weights, the optimizer's tensors, and a `Progress`. Random generators
have none (train.py makes one for each seed, purpose and step), and the learning rate follows from the step. (On CUDA,
up to kernels whose sums are not deterministic.)

Left out: saving in the background, and less than everything (a 3B checkpoint is 25 GB: mind checkpoint.every and keep).
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from data_types import Config, Progress
from optimizer import AdamW
from plumbing.config import load_config, values
from plumbing.files import PARTIAL, atomic_folder, checksum, read_json, write_json
from plumbing.model_folder import read_tensors, save_model, save_tensors
from plumbing.ranks import load_shard
from plumbing.terminal import UserError, say, warn
from qwen2_model import Qwen2

LOCK, CHECKSUMS, VERSION = "lock", "checksums.json", 4
# within a run; of the data, the problems decide, wherever they are now
FIXED = ("model.path", "model.revision", "model.dtype", "data.task", "train.seed", "train.optimizer")


def save_checkpoint(
    folder: Path, policy: Qwen2, small_files: dict[str, bytes], state: dict[str, Tensor], progress: Progress
) -> None:
    """Save the run's state as of `progress`, the optimizer's included."""
    with atomic_folder(folder) as partial:
        save_model(policy, small_files, partial)
        save_tensors(state, partial, "optimizer")
        write_json(partial / "state.json", {"version": VERSION, "progress": asdict(progress)})
        write_json(partial / CHECKSUMS, {path.name: checksum(path) for path in sorted(partial.iterdir())})


def save_best(run_folder: Path, policy: Qwen2, small_files: dict[str, bytes], step: int) -> None:
    """Save the weights as the best so far, in place of the earlier best."""
    best = run_folder / "checkpoints" / f"best-{step:06d}"
    older = [folder for folder in saved(run_folder, "best") if folder != best]  # a resumed run may find it again
    with atomic_folder(best) as partial:
        save_model(policy, small_files, partial)
    for folder in older:
        shutil.rmtree(folder)


def saved(run_folder: Path, kind: str = "step") -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_folder / "checkpoints").glob(f"{kind}-" + "[0-9]" * 6))


def remove_older(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in saved(run_folder)[:-keep]:
        shutil.rmtree(old)


def read_progress(folder: Path) -> Progress:
    """The Progress of a checkpoint whose files are all as they were saved; else UserError names those that are not."""
    sums = read_json(folder / CHECKSUMS)
    there = {path.name: checksum(path) for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS}
    changed = sorted(name for name in sums.keys() | there.keys() if sums.get(name) != there.get(name))
    if changed:
        raise UserError(f"{folder}: not as it was saved: {', '.join(changed[:5])}; remove it to resume from one before")
    state = read_json(folder / "state.json")
    if state["version"] != VERSION:
        raise UserError(f"{folder}: written by another version of this program; resume with that one")
    return Progress(**state["progress"])


def load_optimizer(folder: Path, optimizer: AdamW, progress: Progress) -> None:
    """Read a checkpoint's optimizer state into `optimizer`, each tensor to where it lives."""
    tensors = optimizer.tensors()
    for name, tensor in read_tensors(folder, "optimizer"):
        load_shard(tensors[name], tensor)
    optimizer.steps = progress.optimizer_steps


# ---- New runs and resumed ones -------------------------------------------------------------------------------------


def new_run_folder(config: Config, name: str | None) -> Path:
    """Where a new run is written: `output.folder`/`name` (default: the time). UserError if something is there."""
    folder = Path(config.output.folder) / (name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    # a run killed at its very start leaves no more than its lock
    if os.path.lexists(folder) and (not folder.is_dir() or os.listdir(folder) not in ([], [LOCK])):
        raise UserError(f"{folder} is already there: continue it with --resume {folder}, or choose another --name")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; UserError if one is in it. A folder left empty is removed."""
    try:
        import fcntl
    except ImportError:
        raise UserError("no file locks (fcntl) on this system: train on Linux or macOS, or in WSL") from None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing to it; wait for it, or choose another --name") from None
        except OSError as error:  # some network disks know no locks
            warn(f"{folder}: cannot be locked ({error.strerror}); start no other run in it")
        try:
            yield
        finally:
            if os.listdir(folder) == [LOCK]:  # set-up failed before anything was written
                shutil.rmtree(folder)


def find_run(name: str) -> Path:
    """The folder of a run: a path, a name in `runs`, or "latest": the run there that wrote its metrics last."""
    there = sorted(Path("runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if name == "latest" and there:
        return there[-1].parent
    for folder in (Path(name), Path("runs") / name):
        if name and (folder / "metrics.jsonl").is_file():
            return folder
    names = ", ".join(path.parent.name for path in there[-20:])
    raise UserError(f"{name}: no run there (none with a metrics.jsonl); the folder runs has {names or 'none'}")


def prepare_resume(run_folder: Path, config: Config) -> tuple[Path, Progress]:
    """A run's newest checkpoint and its Progress; what a killed run had half written is removed.

    Raises UserError when there is none, or the config or the checkpoint is not this run's.
    """
    if not saved(run_folder):
        raise UserError(f"{run_folder}: no checkpoint yet; start anew: --config {run_folder}/config.yml --name ANOTHER")
    newest = saved(run_folder)[-1]
    progress = read_progress(newest)
    was, now = values(load_config(run_folder / "config.yml")), values(config)
    for name in (name for name in now if now[name] != was.get(name)):
        if name in FIXED:
            raise UserError(f"{name} is {now[name]} but was {was[name]}: set it back, or start another run with --name")
        say(f"resuming with {name} {now[name]}, which was {was[name]}")
    for left in (*run_folder.glob(f"*{PARTIAL}"), *run_folder.glob(f"checkpoints/*{PARTIAL}")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    say(f"resuming from {newest}")
    return newest, progress
