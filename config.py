"""Reads a YAML file and overrides into the settings of data_types.py, and writes them back.

YAML gives the structure only: every value arrives as text, and the setting's own type reads it. YAML's guesses are left
out because they surprise: it takes `1e-6` for a string and the revision `0123456` for an octal number.
"""

import difflib
import operator
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

import yaml

from data_types import REQUIRED, Config, DataSettings, UserError
from files import read_text
from task import load_task

SECTIONS: dict[str, Any] = {section.name: section.type for section in fields(Config)}
COMMON_NAMES = {  # what other trainers call it
    "lr": "train.learning_rate",
    "batch_size": "rollout.questions_per_step",
    "micro_batch_size": "train.tokens_per_microbatch",
    "n": "rollout.group_size",
    **dict.fromkeys(["num_iterations", "mu", "ppo_epochs"], "train.updates_per_batch"),
    "gradient_accumulation_steps": "train.tokens_per_microbatch",
    "wandb": "Instead there are metrics.jsonl and TensorBoard.",
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "epochs": "train.steps",
    "max_steps": "train.steps",
    "epsilon": "train.clip_low or train.clip_high",
    "max_norm": "train.max_grad_norm",
    "loss_type": "train.objective or train.divide_loss_by",
    "model": "model.path",
    "dataset": "data.path",
    **dict.fromkeys(["kl_coef", "kl_coeff", "kl_beta", "beta"], "Here is no KL term: see the head of grpo.py."),
}
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read the YAML file at `path`, then overrides such as "train.learning_rate=3e-4"; the last one wins.

    Raises UserError: one line with the file or the override, the setting, the value found and the values allowed.
    """
    given = [*file_settings(path), *map(override_setting, overrides)]
    tasks = [read_setting(settings(SECTIONS), *one) for one in given if one[1] == "data.task"]
    sections = SECTIONS | {"data": load_task([DataSettings.task, *tasks][-1]).Settings}
    known, values = settings(sections), {section: dict[str, Any]() for section in sections}
    for where, name, text in given:
        section, _, key = name.partition(".")
        values[section][key] = read_setting(known, where, name, text)  # first: an unknown name ends here
    for name, spec in known.items():
        section, _, key = name.partition(".")
        if spec.default is REQUIRED and key not in values[section]:
            raise UserError(f"{path}: {name} is missing: {spec.metadata['meaning']} ({allowed(spec)})")
    config = Config(**{section: kind(**values[section]) for section, kind in sections.items()})
    updates = config.train.updates_per_batch
    if config.train.optimizer == "split" and config.model.dtype != "bfloat16":
        raise UserError(f"{path}: train.optimizer split is for model.dtype bfloat16; set train.optimizer=master")
    if config.train.shard and config.train.optimizer != "master":
        raise UserError(f"{path}: train.shard goes with train.optimizer=master, not {config.train.optimizer}")
    if config.train.objective == "reinforce" and updates > 1:  # the second update is off-policy
        raise UserError(f"{path}: train.updates_per_batch is {updates}: set train.objective to clipped or truncated_is")
    return config


def settings(sections: dict[str, Any]) -> dict[str, Field]:
    """The settings of all sections by name, such as "train.steps"."""
    return {f"{section}.{spec.name}": spec for section, kind in sections.items() for spec in fields(kind)}


def describe_settings(task: str) -> str:
    """Every setting of a run on this task: default, meaning and the values it may take."""
    lines = []
    for section, kind in (SECTIONS | {"data": load_task(task).Settings}).items():
        lines += ["", f"{section}: {(kind.__doc__ or '').splitlines()[0]}"]
        for name, spec in settings({section: kind}).items():
            value = "(required)" if spec.default is REQUIRED else str(spec.default).lower() or "(empty)"
            lines.append(f"  {name:31s} {value:10s} {spec.metadata['meaning']} ({allowed(spec)})")
    return "\n".join(lines)


def file_settings(path: str | Path) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, name, value) of each setting in a file."""
    root = read_yaml(str(path), read_text(Path(path)))
    if not isinstance(root, dict):
        raise UserError(f"{path}: must hold sections such as `rollout:` with lines such as `group_size: 16` in them")
    for section, keys in root.items():
        if section not in SECTIONS:
            known = SECTIONS | ({} if isinstance(keys, dict) else settings(SECTIONS))
            raise UserError(f"{path}: unknown section {section}. {suggestion(str(section), known)}")
        if not isinstance(keys or {}, dict):
            raise UserError(f"{path}: {section} is {keys}; it must hold lines such as `group_size: 16`")
        yield from ((str(path), f"{section}.{key}", value) for key, value in (keys or {}).items())


def override_setting(override: str) -> tuple[str, str, Any]:
    """(where it stands, name, value) of the setting in "section.key=value"."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"the override `{override}`: write it as section.key=value, such as rollout.group_size=16")
    return f"the override `{override}`", name, read_yaml(override, text) if text else ""


def dump_config(config: Config) -> str:
    """The config as YAML text, from which load_config reads an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(where: str, text: str) -> Any:
    """The dicts, lists and strings in YAML text."""
    try:
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def read_setting(known: dict[str, Field], where: str, name: str, text: Any) -> Any:
    """What `text` (YAML's string) means for the setting `name`, one of those known."""
    if name not in known:
        raise UserError(f"{where}: unknown setting {name}. {suggestion(name, known)}")
    spec = known[name]
    kind: Any = spec.type
    value: Any
    choices, bounds = spec.metadata["choices"], spec.metadata["bounds"].items()
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
        good = isinstance(text, str) and (not choices or re.fullmatch("|".join(choices), text))
        good = good and (text or spec.default == "")
        if kind in (int, float):
            good = abs(value) < 2**32 and all(BOUNDS[bound](value, limit) for bound, limit in bounds)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{where}: {name} is {text or 'empty'}; it must be {allowed(spec)}")
    return os.path.expanduser(value) if kind is str and value.startswith("~/") else value


def allowed(spec: Field) -> str:
    """The values that a setting may take, in words."""
    kind: Any = spec.type
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    bounds = [f"{name.replace('_', ' ')} {limit}" for name, limit in spec.metadata["bounds"].items()]
    return ", ".join([" or ".join(spec.metadata["choices"]) or words, *bounds])


def suggestion(name: str, known: dict[str, Any]) -> str:
    """What a person may have meant by an unknown name."""
    key = name.rpartition(".")[2]
    close = [other for other in known if other.endswith(f".{key}")]  # in another section
    close = close or ([COMMON_NAMES[key]] if key in COMMON_NAMES else [])
    if close and close[0].endswith("."):  # a sentence, not a name
        return close[0]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else "`python train.py --help` lists them all"
