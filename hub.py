"""Fetches models and data sets from the Hugging Face hub; where that fails, one line says what to do.

The huggingface_hub library does the work, so its environment variables hold: HF_TOKEN, HF_ENDPOINT, HF_HOME
for the cache, HF_HUB_OFFLINE to stay off the network. What is in the cache already is not fetched again.
"""

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data_types import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # owner/name
KINDS = {"model": ("model", "model"), "data": ("dataset", "data set")}  # the hub's word for it, and ours
ADVICE = (  # the first kind that fits counts
    (GatedRepoError, "its owner asks for consent: accept the terms on its page, then set HF_TOKEN"),
    (RepositoryNotFoundError, "no folder here, no {kind} there you may see: check {key}.path, set HF_TOKEN"),
    (RevisionNotFoundError, "it has no such revision: set {key}.revision to a branch, tag or commit of it"),
    (LocalEntryNotFoundError, "no folder here, not cached, no way to the hub: "
                              "check {key}.path, network, HF_ENDPOINT, HF_HUB_OFFLINE"),
)  # fmt: skip


def download(section: str, name: str, revision: str | None, patterns: Sequence[str],
             ignored: Sequence[str] = ()) -> Path:
    """The folder in the hub's cache with the files of `name` ("owner/name") that are asked for.

    section: "model" or "data", the part of the config that asks; it decides between models and data sets.
    patterns, ignored: a file is wanted when it matches one of the first, as "*.json" does, and none of the
    second.
    Raises UserError when the hub cannot be reached, refuses, or the disk is full.
    """
    repo_type, kind = KINDS[section]
    try:
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision,
                                      allow_patterns=list(patterns), ignore_patterns=list(ignored)))
    except Exception as error:  # the hub's, the HTTP client's and the system's errors have no common base
        advice = next((text for refusal, text in ADVICE if isinstance(error, refusal)), None)
        advice = advice.format(kind=kind, key=section) if advice else one_line(error)
        if getattr(error, "errno", None) == errno.ENOSPC:
            advice = "the disk is full: free some space or set HF_HOME to a folder on another disk"
        at_revision = f" at revision {revision}" if revision else ""
        raise UserError(f"{name}{at_revision}: cannot get this {kind} from the hub: {advice}") from error


def one_line(error: Exception) -> str:
    """The error's kind and the start of its message, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
