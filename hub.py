"""Fetches models and data sets from the Hugging Face hub; where that fails, one line says what to do.

The huggingface_hub library does the work, so its environment variables hold: HF_TOKEN, HF_ENDPOINT, HF_HOME
for the cache, HF_HUB_OFFLINE to stay off the network. What is in the cache already is not fetched again.
"""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from data_types import DataSettings, UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # owner/name


def download(section: str, name: str, revision: str, patterns: list[str]) -> Path:
    """The folder in the hub's cache with the files of `name` ("owner/name") that match one of the patterns.

    section: "model" or "data", the part of the config that asks. Files in subfolders of a model are not fetched: they
    hold other forms of it. Raises UserError when the hub cannot be reached, refuses, or the disk is full.
    """
    kind, ignored = ("model", ["*/*"]) if section == "model" else ("dataset", [])
    try:
        folder = snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
        )
        return Path(folder)
    except Exception as error:  # the hub's, the HTTP client's and the system's errors have no common base
        cures = f"check {section}.path, {section}.revision, the network, HF_TOKEN, and the disk of HF_HOME"
        raise UserError(f"{name}: no folder, nor to be had from the hub ({one_line(error)}): {cures}") from error


def find_data(data: DataSettings) -> Path:
    """The file or folder `data.path`, or for a hub id ("owner/name") the hub's copy, fetched if need be."""
    path = Path(data.path)
    if data.path and (os.path.isfile(path) or os.path.isdir(path)):
        return path
    if not HUB_ID.fullmatch(data.path) or path.suffix == ".parquet":
        raise UserError(f"{data.path}: no such file or folder, nor a hub data set (owner/name): set data.path")
    return download("data", data.path, data.revision, ["*.parquet"])


def commit(folder: Path, revision: str) -> str:
    """The commit of a folder in the hub's cache, so that a run can stay with it; `revision` for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else revision


def one_line(error: BaseException) -> str:
    """The error's kind and the start of its message, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
