"""Checkpoints of a run: complete, on the disk and checked when they are read, or not there at all.

    runs/NAME/checkpoints/step-000040/    a model folder, the optimizer's state, state.json: all that resuming needs
    runs/NAME/checkpoints/best-000040/    a model folder: the weights with the best held-out success so far

A folder is written as NAME.partial and gets its name when every byte of it is on the disk, so a process that dies while
saving leaves nothing that could be mistaken for a checkpoint. checksums.json has the SHA-256 of every other file: a
flipped bit or a file from another step is found before training continues. All of it is safetensors and JSON: loading
a checkpoint can run no code.

Resuming is exact because there is little state: weights, the optimizer's tensors, and a `Progress`. Random generators
have none (train.py makes one for each seed, purpose and step), and the learning rate follows from the step. (On CUDA,
up to kernels whose sums are not deterministic.)

Left out: saving in the background, and less than everything (a 3B checkpoint is 25 GB: mind checkpoint.every and keep).
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from config import load_config
from data_types import Config, Progress, UserError
from files import PARTIAL, atomic_folder, checksum, listed, read_json, remove_folder, write_json, writing
from logbook import LOGS, open_log
from memory import GIB
from model_folder import read_header, read_tensor, save_model, save_tensors
from optimizer import AdamW, learning_rate
from qwen2_model import Qwen2
from terminal import say, warn

LOCK, CHECKSUMS, VERSION = "lock", "checksums.json", 3
FIXED = ("model.path", "model.revision", "model.dtype", "data.", "train.seed", "train.optimizer")  # within a run


def save_checkpoint(
    run_folder: Path,
    policy: Qwen2,
    small_files: dict[str, bytes],
    state: dict[str, Tensor],
    progress: Progress,
    keep: int,
) -> None:
    """Save the run's state as of `progress`, the optimizer's included, then remove all but the newest `keep`.

    Raises UserError when there is no room or something cannot be written; the newest of the older ones is never lost.
    """
    folder = run_folder / "checkpoints" / f"step-{progress.step:06d}"
    if folder.exists():
        return  # and so complete: a run stopped right after it was saved
    needed = 1.01 * (size(policy.hf_tensors()) + size(state))
    with writing(run_folder):
        free, older = shutil.disk_usage(run_folder).free, saved(run_folder)[:-1]
        if free < needed <= free + sum(path.stat().st_size for old in older for path in old.iterdir()):
            remove_older(run_folder, keep=1)  # no room for more of them: the newest is enough
        free = shutil.disk_usage(run_folder).free
    if free < needed:
        raise UserError(f"{folder}: needs {needed / GIB:.2f} GiB, and the disk has {free / GIB:.2f} left: free some")
    with atomic_folder(folder) as partial:
        save_model(policy, small_files, partial)
        save_tensors(state, partial, "optimizer")
        write_json(partial / "state.json", {"version": VERSION, "progress": asdict(progress)})
        write_json(partial / CHECKSUMS, {path.name: checksum(path) for path in sorted(partial.iterdir())})
    remove_older(run_folder, keep)


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def disk_space(policy: Qwen2, optimizer: AdamW) -> int:
    """Bytes that a run needs on its disk: two checkpoints, the best weights and the final ones."""
    return 4 * size(policy.hf_tensors()) + 2 * size(optimizer.tensors())


def save_best(run_folder: Path, policy: Qwen2, small_files: dict[str, bytes], step: int) -> None:
    """Save the weights as the best so far, in place of the earlier best."""
    folder = run_folder / "checkpoints" / f"best-{step:06d}"
    with atomic_folder(folder) as partial:
        save_model(policy, small_files, partial)
    for old in saved(run_folder, "best"):
        if old != folder:
            remove_folder(old)


def saved(run_folder: Path, kind: str = "step") -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_folder / "checkpoints").glob(f"{kind}-" + "[0-9]" * 6))


def remove_older(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in saved(run_folder)[:-keep]:
        remove_folder(old)


def read_progress(folder: Path) -> Progress:
    """The Progress of a checkpoint whose files are all as they were saved; else UserError names those that are not."""
    sums = read_json(folder / CHECKSUMS)
    there = {path.name: checksum(path) for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS}
    changed = sorted(name for name in sums.keys() | there.keys() if sums.get(name) != there.get(name))
    if changed:
        older = saved(folder.parent.parent)[-2:-1]
        cure = f"remove it to resume from {older[0].name}" if older else "there is no other: put back what changed"
        raise UserError(f"{folder}: not as it was saved: {listed(changed)}; {cure}")
    state = read_json(folder / "state.json")
    if state["version"] != VERSION:
        raise UserError(f"{folder}: written by another version of this program; resume with that one")
    return Progress(**state["progress"])


def load_optimizer(folder: Path, optimizer: AdamW, progress: Progress) -> None:
    """Read a checkpoint's optimizer state into `optimizer`, each tensor to where it lives."""
    tensors = optimizer.tensors()
    files = {name: path for path in sorted(folder.glob("optimizer*.safetensors")) for name in read_header(path)}
    if files.keys() != tensors.keys():
        raise UserError(f"{folder}: its optimizer state is not that of train.optimizer {optimizer.mode}")
    for name, path in files.items():
        optimizer.load(name, read_tensor(path, name))
    optimizer.steps = progress.optimizer_steps


# ---- New runs and resumed ones -------------------------------------------------------------------------------------


def new_run_folder(config: Config, name: str | None) -> Path:
    """Where a new run is written: `output.folder`/`name` (default: the time). UserError if something is there."""
    name = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    if Path(name).name != name or name == ".." or not name.isprintable():
        raise UserError(f"--name {name}: must be a plain name, for a folder in {config.output.folder}")
    folder = Path(config.output.folder) / name
    started = {LOCK, "config.yml", "config.yml" + PARTIAL}  # all that a run killed at its very start leaves
    if os.path.lexists(folder) and (not folder.is_dir() or set(os.listdir(folder)) - started):
        raise UserError(f"{folder} is already there: continue it with --resume {folder}, or choose another --name")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; UserError if one is in it. A folder left empty is removed."""
    with writing(folder):
        lock = open_log(folder / LOCK)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing to it; wait for it, or choose another --name") from None
        except OSError as error:  # some network disks know no locks
            warn(f"{folder}: cannot be locked ({error.strerror}); start no other run in it")
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK]:  # set-up failed before anything was written
                    shutil.rmtree(folder)


def find_run(name: str, overrides: list[str]) -> Path:
    """The folder of a run: a path, the name of a run, or "latest": the one that wrote its metrics last.

    Names are looked for in `runs`, or in the output.folder among the overrides.
    """
    folders = [override.partition("=")[2] for override in overrides if override.startswith("output.folder=")]
    folder = Path((folders or ["runs"])[-1]).expanduser()
    if name == "latest":
        runs = sorted(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume latest: {folder} holds no run; add output.folder=FOLDER if it is another")
        return runs[-1].parent
    for found in (Path(name), folder / name):  # not every folder with a config.yml is a run's
        if name and all(os.path.isfile(found / file) for file in ("config.yml", "metrics.jsonl")):
            return found
    raise UserError(f"--resume {name}: no run there, nor in {folder} (a run has a config.yml and a metrics.jsonl)")


def prepare_resume(run_folder: Path, config: Config) -> tuple[Path | None, Progress]:
    """A run's newest checkpoint, if there is one, and its Progress; what a killed run had half written is removed.

    Raises UserError when the config or the checkpoint is not this run's.
    """
    newest = next(iter(saved(run_folder)[::-1]), None)
    if not newest and (run_folder / "final").exists():
        raise UserError(f"{run_folder}: finished without a checkpoint; start a run with model.path={run_folder}/final")
    progress = read_progress(newest) if newest else Progress()
    if progress.step > config.train.steps:
        raise UserError(f"{newest}: train.steps is {config.train.steps}, fewer than the {progress.step} done; raise it")
    for name, size in progress.files.items():
        path = run_folder / name
        if not path.is_file() or path.stat().st_size < size:
            raise UserError(f"{path}: shorter than the {size} bytes it had at the checkpoint; put it back to resume")
    check_changes(load_config(run_folder / "config.yml"), config, progress.step)
    for left in (*run_folder.glob(f"*{PARTIAL}"), *run_folder.glob(f"checkpoints/*{PARTIAL}")):
        shutil.rmtree(left, ignore_errors=True)
    remove_older(run_folder, config.checkpoint.keep)  # a kill may have come before
    say(f"resuming from {newest}" if newest else f"{run_folder} has no checkpoint yet: starting it anew")
    if not newest and (run_folder / LOGS[0]).stat().st_size:
        aside = run_folder / time.strftime("before-%Y-%m-%d_%H-%M-%S")
        with writing(aside):
            for path in filter(Path.is_file, (run_folder / name for name in LOGS)):
                shutil.copy(path, aside)
        say(f"what it had logged is kept in {aside}")
    return newest, progress


def check_changes(old: Config, new: Config, step: int) -> None:
    """Say which settings differ from those the run had; UserError for one that would make it another run."""
    was, now = ({f"{s}.{k}": v for s, keys in asdict(config).items() for k, v in keys.items()} for config in (old, new))
    was = {name: was.get(name) for name in now}  # another task has other settings
    changed = [name for name in now if now[name] != was[name]]
    for name in changed:
        if name.startswith(FIXED):
            raise UserError(f"{name} is {now[name]} but was {was[name]}: set it back, or start another run with --name")
    for name in changed:
        say(f"resuming with {name} {now[name]}, which was {was[name]}")
    rate, before = (learning_rate(step + 1, config.train) for config in (new, old))
    if rate != before:
        say(f"the learning rate of step {step + 1} is {rate:.3g}; it would have been {before:.3g}")
