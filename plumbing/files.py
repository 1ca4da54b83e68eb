"""Files: text, JSON, checksums, and folders that appear whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plumbing.terminal import UserError

PARTIAL = ".partial"  # the end of the name of a file or folder that is being written or removed


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
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and no longer only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once it is whole and on the disk; else nothing changes."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)  # here a checkpoint becomes visible
        flush(folder.parent)
        flush(folder.parent.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed
