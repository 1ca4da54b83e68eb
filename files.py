"""File helpers: JSON, flushed to the disk, and folders that appear whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_types import UserError

PARTIAL = ".partial"  # the end of the name of a folder that is being written or removed


def read_text(path: Path) -> str:
    """The text of a file; UserError names the file if it is missing or cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError names the file if it is missing or holds anything else."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole, and on the disk, or as it was before."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # it may be a link
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and no longer only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder; an error while writing to it becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once it is whole and on the disk; else nothing changes."""
    partial, replaced = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + ".old" + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(partial):
            yield partial
            for path in (*partial.iterdir(), partial):
                flush(path)
            if folder.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                folder.rename(replaced)
            partial.rename(folder)  # here a checkpoint becomes visible
            flush(folder.parent)
            flush(folder.parent.parent)
        shutil.rmtree(replaced, ignore_errors=True)  # not in `finally`: after half of the exchange it is the only one
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed


def remove_folder(folder: Path) -> None:
    """Remove a folder; renamed first, so that half of it is never taken for the whole."""
    with writing(folder):
        shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL)))


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
