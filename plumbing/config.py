"""Reads a YAML file and overrides into the settings of data_types.py, and writes them back.

YAML gives the structure only: every value arrives as text, and the setting's own type reads it. YAML's guesses are left
out because they surprise: it takes `1e-6` for a string and the revision `0123456` for an octal number.
"""

import difflib
import operator
import os
import re
from collections.abc import Iterable
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

import yaml

from data_types import REQUIRED, Config, DataSettings
from plumbing.files import read_text
from plumbing.tasks import load_task
from plumbing.terminal import UserError

BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path`, then overrides such as "train.learning_rate=3e-4"; the last one wins.

    Raises UserError: one line with the file or the setting, the value found and the values allowed.
    """
    given = file_settings(path) | dict(map(override_setting, overrides))  # names and texts
    task = str(given.get("data.task", DataSettings.task))
    kinds, known = sections(task), settings(task)
    for name in given:
        if name not in known:
            raise UserError(f"{path}: unknown setting {name}. {suggestion(name, known)}")
    parts: dict[str, dict[str, Any]] = {section: {} for section in kinds}
    for name, spec in known.items():
        if name in given:
            parts[name.partition(".")[0]][spec.name] = read_setting(spec, name, given[name])
        elif spec.default is REQUIRED:
            raise UserError(f"{path}: {name} is missing: {spec.metadata['meaning']} ({allowed(spec)})")
    config = Config(**{section: kind(**parts[section]) for section, kind in kinds.items()})
    check_combinations(path, config)
    return config


def check_combinations(path: str | Path, config: Config) -> None:
    """UserError for settings that do not go together."""
    train = config.train
    if train.optimizer == "split" and config.model.dtype != "bfloat16":
        raise UserError(f"{path}: train.optimizer split is for model.dtype bfloat16; set train.optimizer=master")
    if train.shard and train.optimizer != "master":
        raise UserError(f"{path}: train.shard goes with train.optimizer=master, not {train.optimizer}")
    if train.objective == "reinforce" and train.updates_per_batch > 1:  # the second update is off-policy
        raise UserError(f"{path}: train.updates_per_batch above 1 needs train.objective clipped, gspo or cispo")


def sections(task: str) -> dict[str, Any]:
    """The dataclass of each section, for a run on this task."""
    return {spec.name: load_task(task).Settings if spec.name == "data" else spec.type for spec in fields(Config)}


def settings(task: str) -> dict[str, Field]:
    """All settings by name, such as "train.steps", for a run on this task."""
    return {f"{section}.{spec.name}": spec for section, kind in sections(task).items() for spec in fields(kind)}


def values(config: Config) -> dict[str, Any]:
    """The value of each setting by name."""
    return {f"{section}.{key}": value for section, part in asdict(config).items() for key, value in part.items()}


def describe_settings() -> str:
    """Every setting, those of Countdown included: default, meaning and the values it may take."""
    lines = []
    for name, spec in settings("countdown").items():
        value = "(required)" if spec.default is REQUIRED else str(spec.default).lower() or "(empty)"
        lines.append(f"  {name:31s} {value:10s} {spec.metadata['meaning']} ({allowed(spec)})")
    return "\n".join(lines)


def file_settings(path: str | Path) -> dict[str, Any]:
    """Name and text of each setting in a file."""
    root = read_yaml(str(path), read_text(Path(path)))
    if not isinstance(root, dict) or not all(isinstance(part or {}, dict) for part in root.values()):
        raise UserError(f"{path}: must hold sections such as `rollout:` with lines such as `group_size: 16` in them")
    return {f"{section}.{key}": text for section, part in root.items() for key, text in (part or {}).items()}


def override_setting(override: str) -> tuple[str, Any]:
    """Name and text of the setting in "section.key=value"."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"the override `{override}`: write it as section.key=value, such as rollout.group_size=16")
    return name, read_yaml(override, text) if text else ""


def dump_config(config: Config) -> str:
    """The config as YAML text, from which load_config reads an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(where: str, text: str) -> Any:
    """The dicts, lists and strings in YAML text."""
    try:
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def read_setting(spec: Field, name: str, text: Any) -> Any:
    """What `text` (YAML's string) means for a setting."""
    kind: Any = spec.type
    choices, bounds = spec.metadata["choices"], spec.metadata["bounds"].items()
    value: Any = None
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
        good = isinstance(text, str) and (not choices or re.fullmatch("|".join(choices), text))
        good = good and (text or spec.default == "")
        if kind in (int, float):
            good = abs(value) < 2**32 and all(BOUNDS[bound](value, limit) for bound, limit in bounds)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{name} is {text or 'empty'}; it must be {allowed(spec)}")
    return os.path.expanduser(value) if kind is str and value.startswith("~/") else value


def allowed(spec: Field) -> str:
    """The values that a setting may take, in words."""
    kind: Any = spec.type
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    bounds = [f"{name.replace('_', ' ')} {limit}" for name, limit in spec.metadata["bounds"].items()]
    return ", ".join([" or ".join(spec.metadata["choices"]) or words, *bounds])


def suggestion(name: str, known: dict[str, Field]) -> str:
    """What a person may have meant by an unknown name."""
    key = name.rpartition(".")[2]
    close = [other for other in known if other.endswith(f".{key}")]  # in another section
    close = close or [ours for ours, spec in known.items() if key in spec.metadata["also"].split()]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Here it is {' or '.join(close)}" if close else "`python train.py --help` lists them all"
