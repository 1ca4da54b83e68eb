"""The plain data that the modules hand to each other: problems, and the typed configuration.

A config is a YAML file of sections (`rollout`, `train`, ...), each a frozen dataclass below. A setting is one
line there: its type, its default, what it means and the values it may take. Reading, checking and the error
messages all follow from that line, so adding a setting is adding a line:

    config = load_config("config_tiny.yml", ["rollout.group_size=32", "train.learning_rate=3e-4"])
    config.train.learning_rate  # 0.0003

YAML gives the structure only: every value arrives as text, and the setting's type decides how to read it.
YAML's own guesses are left out because they surprise: it calls `1e-6` a string, the revision `0123456` an
octal number and `off` false. Anchors and tags are left out because no config needs their dangers.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from types import NoneType
from typing import Any, get_args, get_origin

import yaml


class UserError(ValueError):
    """A mistake that a person can mend: one line that names the file, key or value and what to do.

    It often quotes a file or a command line, so control characters are escaped: it stays one harmless line.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


@dataclass(frozen=True)
class Problem:
    """A Countdown problem: reach `target` with + - * / and brackets, using each of `numbers` exactly once."""

    numbers: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Reward:
    """What one answer earns."""

    format: float  # 0.0 or 0.1
    correct: float  # 0.0 or 1.0

    @property
    def total(self) -> float:
        return self.format + self.correct


@dataclass
class Episode:
    """One sampled answer on its way through a training step; the ids are those sampled, never re-tokenised."""

    problem: Problem
    group: int  # which question of the step it answers
    prompt_ids: list[int]
    response_ids: list[int]  # the end token included
    logprobs: list[float]  # of each response token, when it was sampled
    ended: bool  # by an end token, not by the length limit
    text: str  # the response, without the end token
    reward: Reward = Reward(0.0, 0.0)
    advantage: float = 0.0
    token_weight: float = 0.0  # what each of its response tokens counts in the batch's loss


# ---- The settings ------------------------------------------------------------------------------------------

REQUIRED = MISSING  # instead of a default: the file or an override must give a value
TESTS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def setting(default: Any, meaning: str, choices: Sequence[str] = (), **bounds: float) -> Any:
    """A setting of the config, as a dataclass field.

    Its type is int, float, bool or str; a tuple of these, such as `tuple[int, ...]`, which YAML writes as a
    list; or any of these `| None`. Where there are `choices`, regular expressions, a text must match one. A
    number, or each number of a tuple, must keep within the `bounds`: at_least, above, at_most, below.
    """
    tests = {f"{name.replace('_', ' ')} {bound}": (TESTS[name], bound) for name, bound in bounds.items()}
    return field(default=default, metadata={"meaning": meaning, "choices": choices, "tests": tests})


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling the answers that a training step learns from."""

    group_size: int = setting(16, "answers sampled per question", at_least=2, at_most=65536)
    questions_per_step: int = setting(16, "questions drawn per step", at_least=1, at_most=65536)
    most_draws: int = setting(1, "at most so many draws, until enough groups have spread", at_least=1, at_most=100)
    max_new_tokens: int = setting(REQUIRED, "an answer is cut off there, in tokens", at_least=1, at_most=2**20)
    temperature: float = setting(1.0, "the logits are divided by it", above=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that sum to this", above=0, at_most=1)
    top_k: int = setting(0, "sample from so many likeliest tokens; 0: from all", at_least=0)
    kv_cache_gib: float | None = setting(None, "memory for keys and values; null: as planned", above=0)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The update of the policy."""

    learning_rate: float = setting(REQUIRED, "the step size of AdamW", above=0)
    steps: int = setting(REQUIRED, "training steps: a rollout and an update each", at_least=1, at_most=999_999)
    seed: int = setting(1, "of every random choice in the run", at_least=0, at_most=2**32 - 1)
    warmup_steps: int = setting(0, "the learning rate rises linearly over so many steps", at_least=0)
    schedule: str = setting("constant", "the learning rate after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = setting(0.0, "pull of the weights to zero, times the learning rate", at_least=0)
    optimizer: str = setting("master", "where AdamW keeps what bf16 weights lack: see optimizer.py",
                             choices=("master", "split", "offload"))
    beta1: float = setting(0.9, "decay of AdamW's mean of the gradients", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of AdamW's mean of the squared gradients", at_least=0, below=1)
    max_grad_norm: float = setting(1.0, "a longer gradient is scaled down to this length", above=0)
    divide_by_std: bool = setting(True, "divide advantages by the group's spread; Dr. GRPO: false")
    objective: str = setting("plain", "the surrogate that is ascended: see grpo.py",
                             choices=("plain", "clipped", "weighted"))
    updates_per_batch: int = setting(1, "optimizer steps on the same answers; more than 1 wants clipped", at_least=1)
    clip_low: float = setting(0.2, "clipped: no push below 1 - this of the sampler's probability", above=0, at_most=1)
    clip_high: float = setting(0.28, "clipped: no push above 1 + this times it", above=0)
    weight_cap: float = setting(2.0, "weighted: the most of policy / sampler that a token is weighted with", above=0)
    divide_loss_by: str = setting("limit", "every token, every answer counts alike, or the length limit divides",
                                  choices=("tokens", "answers", "limit"))
    truncated: str = setting("keep", "answers that were cut off", choices=("keep", "mask", "penalize"))
    penalty_tokens: int = setting(64, "penalize: over so many tokens before the limit", at_least=1)
    tokens_per_microbatch: int = setting(8192, "tokens, padding included, in one backward", at_least=1)
    activation_checkpointing: bool = setting(False, "recompute activations in backward to save memory")
    most_skips: int = setting(3, "steps in a row with numbers that are not finite, before the run stops", at_least=1)
    threads: int = setting(0, "CPU threads; 0: one a core, at most 8", at_least=0, at_most=1024)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The checkpoint that training starts from, and where it is computed."""

    path: str = setting(REQUIRED, "a folder or hub id of a Qwen2.5 model")
    revision: str | None = setting(None, "branch, tag or commit on the hub; null: the newest")
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "mps", "cuda", "cuda:[0-9]"))
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The problems to train on: the source, and which of its problems to keep."""

    path: str = setting(REQUIRED, "a folder or hub id of a data set with the columns nums and target")
    revision: str | None = setting(None, "branch, tag or commit on the hub; null: the newest")
    held_out: int = setting(512, "problems kept out of training, for evaluation", at_least=1)
    number_counts: tuple[int, ...] = setting((), "with so many numbers; []: all", at_least=2, at_most=6)
    target_low: int | None = setting(None, "with a target of at least this; null: all")
    target_high: int | None = setting(None, "with a target of at most this; null: all")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Measuring success on held-out problems."""

    every: int = setting(10, "steps between evaluations; 0: only before and after training", at_least=0)
    size: int = setting(512, "held-out problems per evaluation", at_least=1)
    temperature: float = setting(0.0, "of the sampling; 0: greedy, always the likeliest token", at_least=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Saving the state of the run, to resume it. The best weights by held-out success are kept besides."""

    every: int = setting(0, "steps between checkpoints; 0: only when the run is stopped", at_least=0)
    keep: int = setting(2, "the newest checkpoints that are kept", at_least=1)


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What the run leaves behind."""

    folder: str = setting("runs", "the run's own folder is made in this one")
    samples: int = setting(2, "sampled answers written out per step", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration: the fields are the sections of the file, what people tune most comes first."""

    rollout: RolloutSettings
    train: TrainSettings
    model: ModelSettings
    data: DataSettings
    eval: EvalSettings
    checkpoint: CheckpointSettings
    output: OutputSettings


SECTIONS: dict[str, type] = {section.name: section.type for section in fields(Config)}
SETTINGS: dict[str, Field] = {f"{section}.{spec.name}": spec
                              for section, kind in SECTIONS.items() for spec in fields(kind)}


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, then overrides such as "train.learning_rate=3e-4"; the last one wins.

    Raises UserError: one line with the file or the override, the key, the value found and the values allowed.
    """
    values = {name: spec.default for name, spec in SETTINGS.items()}
    for where, name, value in [*read_file(path), *map(read_override, overrides)]:
        values[name] = read_setting(where, name, value)
    for name, spec in SETTINGS.items():
        if values[name] is REQUIRED:
            raise UserError(f"{path}: {name} is missing: {spec.metadata['meaning']} ({allowed(spec)})")
    config = Config(**{section: kind(**{spec.name: values[f"{section}.{spec.name}"] for spec in fields(kind)})
                       for section, kind in SECTIONS.items()})
    size, held_out = config.eval.size, config.data.held_out
    if size > held_out:
        raise UserError(f"{path}: eval.size is {size}; it must be at most data.held_out, which is {held_out}")
    if config.train.optimizer == "split" and config.model.dtype != "bfloat16":
        raise UserError(f"{path}: train.optimizer split is for model.dtype bfloat16; fp32 weights need master")
    return config


def dump_config(config: Config) -> str:
    """The config as YAML text, from which load_config reads an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


# ---- Reading one setting -----------------------------------------------------------------------------------

FORMS = {  # what to tell a person, and how it is written
    int: ("a whole number", r"[-+]?[0-9]{1,18}"),  # 18 digits fit the 64 bits that torch has for it
    float: ("a number", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"),  # neither nan nor inf
    bool: ("true or false", r"[tT]rue|[fF]alse"),
    str: ("text", r".*\S.*"),
}
NULLS = (None, "", "~", "null")  # how YAML writes None, here in quotes too


def read_setting(where: str, name: str, value: Any) -> Any:
    """What `value`, as `where` has it, means for the setting `name`, such as "train.steps"."""
    if name not in SETTINGS:
        raise UserError(f"{where}: unknown key {shown(name)!r}; {suggestion(name)}")
    spec = SETTINGS[name]
    kind, optional, many = parts(spec)
    if optional and value in NULLS:
        return None
    items = value if many and isinstance(value, list) else [value]
    results = tuple(read_scalar(spec, kind, item) for item in items)
    if None in results:
        raise UserError(f"{where}: {name} is {shown(value)}; it must be {allowed(spec)}")
    return results if many else results[0]


def read_scalar(spec: Field, kind: type, text: Any) -> int | float | bool | str | None:
    """The value of type `kind` that `text` stands for; None where the setting does not allow it."""
    pattern = "|".join(spec.metadata["choices"]) or FORMS[kind][1]
    if not isinstance(text, str) or text in NULLS or not re.fullmatch(pattern, text):
        return None
    value = text.lower() == "true" if kind is bool else kind(text)
    fits = text.isprintable() and all(test(value, bound) for test, bound in spec.metadata["tests"].values())
    return value if fits and value not in (math.inf, -math.inf) else None  # 1e999 is inf


def parts(spec: Field) -> tuple[type, bool, bool]:
    """Of a setting's type: the type of one value, whether None is allowed, whether it is a tuple."""
    optional = NoneType in get_args(spec.type)
    kind = get_args(spec.type)[0] if optional else spec.type
    many = get_origin(kind) is tuple
    return get_args(kind)[0] if many else kind, optional, many


def allowed(spec: Field) -> str:
    """The values that a setting may take, in words."""
    kind, optional, many = parts(spec)
    words = " or ".join(spec.metadata["choices"]) or FORMS[kind][0]
    bounds = " and ".join(spec.metadata["tests"])
    return ("a list, each " * many) + words + (bounds and f", {bounds}") + (", or null" * optional)


def suggestion(name: str) -> str:
    """What a person may have meant by an unknown name."""
    section, _, key = name.rpartition(".")
    close = [other for other in SETTINGS if other.endswith(f".{key}")]  # the right key in the wrong section
    close = close or difflib.get_close_matches(name, SETTINGS if section else SECTIONS, n=1, cutoff=0.75)
    known = [other for other in SETTINGS if other.startswith(f"{section}.")] or SECTIONS
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def shown(value: Any) -> str:
    """A value for an error message."""
    text = "empty" if value in (None, "") else str(value)
    return text if len(text) <= 80 else f"{text[:50]}... ({len(text)} characters)"


# ---- Reading the file and the overrides --------------------------------------------------------------------

MOST_CHARACTERS = 65536  # of a config file: a longer one is some other file, and would take long to parse


def read_override(override: str) -> tuple[str, str, Any]:
    """(where it stands, name, value) of the setting in "section.key=value"."""
    where = f"in the override `{override and shown(override)}`"
    name, equals, text = override.partition("=")
    if not equals or name.count(".") != 1:
        raise UserError(f"{where}: write it as section.key=value, such as rollout.group_size=16")
    return where, name, parse_yaml(where, text)


def read_file(path: str) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, name, value) of each setting in the file."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"cannot read the config {path!r}: {getattr(error, 'strerror', error)}") from None
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{path}: longer than {MOST_CHARACTERS} characters; this is no config")
    root = parse_yaml(path, text)
    if not isinstance(root, dict):
        raise UserError(f"{path}: the file is {shown(root)}; it must hold sections such as rollout and train")
    for section, keys in root.items():
        if section not in SECTIONS:
            raise UserError(f"{path}: unknown section {shown(section)!r}; {suggestion(section)}")
        if not isinstance(keys or {}, dict):  # a section may be empty, its lines commented out
            raise UserError(f"{path}: {section} is {shown(keys)}; it must hold lines such as `key: value`")
        yield from ((path, f"{section}.{key}", value) for key, value in (keys or {}).items())


class PlainLoader(yaml.BaseLoader):
    """YAML as dicts, lists and text; no anchors and tags, no equal keys (PyYAML would keep the last)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor or getattr(event, "tag", None):  # a few lines of aliases can unfold to gigabytes
            raise yaml.MarkedYAMLError(problem="anchors and tags are refused", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping = {}
        for key, value in node.value:
            if str(key.value) in mapping:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            mapping[str(key.value)] = self.construct_object(value, deep)
        return mapping


def parse_yaml(source: str, text: str) -> Any:
    """The dicts, lists and text in the YAML `text`; None where there is nothing in it."""
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # such as "\UFFFFFFFF" in quotes
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{source}{line}: bad YAML: {shown(problem)}") from None
