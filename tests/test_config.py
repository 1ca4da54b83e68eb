"""The configuration: what a config file may say, and the one line a person gets for anything else."""

import random
from dataclasses import FrozenInstanceError, dataclass, fields, replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import data_types
from data_types import (
    MOST_CHARACTERS,
    REQUIRED,
    SECTIONS,
    SETTINGS,
    CheckpointSettings,
    Config,
    DataSettings,
    EvalSettings,
    ModelSettings,
    OutputSettings,
    RolloutSettings,
    TrainSettings,
    UserError,
    dump_config,
    load_config,
    setting,
)

SMALLEST = {  # a file needs no more than this; values as a person types them
    "rollout": {"max_new_tokens": "64"},
    "train": {"learning_rate": "1e-6", "steps": "5"},
    "model": {"path": "tiny"},
    "data": {"path": "numbers"},
}


def text_of(sections: dict[str, dict[str, str]]) -> str:
    return "".join(f"{section}:\n" + "".join(f"  {key}: {value}\n" for key, value in keys.items())
                   for section, keys in sections.items())


def with_value(name: str, value: str) -> str:
    """The smallest good file with `name` set to the text `value`."""
    section, key = name.split(".")
    return text_of({**SMALLEST, section: {**SMALLEST.get(section, {}), key: value}})


@pytest.fixture
def load(tmp_path):
    """load(text or bytes, *overrides) reads a file of that content, named load.path."""
    def load(content: str | bytes, *overrides: str) -> Config:
        with open(load.path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return load_config(load.path, overrides)

    load.path = str(tmp_path / "config.yml")
    return load


def complaint(load, content: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(content, *overrides)
    return str(caught.value).replace(load.path, "FILE")


# ---- What is accepted --------------------------------------------------------------------------------------


def test_the_smallest_file_gives_every_other_setting_its_documented_default(load):
    assert load(text_of(SMALLEST)) == Config(
        rollout=RolloutSettings(group_size=16, questions_per_step=16, max_new_tokens=64, temperature=1.0,
                                top_p=1.0, top_k=0, kv_cache_gib=None),
        train=TrainSettings(learning_rate=1e-6, steps=5, seed=1, warmup_steps=0, schedule="constant",
                            weight_decay=0.0, max_grad_norm=1.0, divide_by_std=True,
                            activation_checkpointing=False),
        model=ModelSettings(path="tiny", revision=None, device="auto"),
        data=DataSettings(path="numbers", revision=None, held_out=512, number_counts=(), target_low=None,
                          target_high=None),
        eval=EvalSettings(every=10, size=512, temperature=0.0),
        checkpoint=CheckpointSettings(every=0, keep=2),
        output=OutputSettings(folder="runs", samples=2))


ACCEPTED = [  # (setting, as typed, value, which yaml.safe_load would often have got wrong)
    ("train.learning_rate", "1e-6", 1e-6),  # safe_load: a string
    ("train.learning_rate", "1E+2", 100.0),
    ("train.learning_rate", ".5", 0.5),
    ("train.learning_rate", "5.", 5.0),
    ("train.learning_rate", "+3.0e-4", 3e-4),
    ("train.learning_rate", "1", 1.0),  # whole numbers are numbers, and arrive as floats
    ("train.learning_rate", '"1e-6"', 1e-6),
    ("rollout.temperature", "0.7  # a comment", 0.7),
    ("rollout.top_p", "1", 1.0),
    ("train.steps", "010", 10),  # safe_load: octal, 8
    ("train.beta1", "0", 0.0),
    ("rollout.group_size", "65536", 65536),
    ("rollout.questions_per_step", "65536", 65536),
    ("rollout.most_draws", "100", 100),
    ("rollout.max_new_tokens", "1048576", 1048576),
    ("train.steps", "999999", 999999),
    ("train.threads", "1024", 1024),
    ("train.seed", "4294967295", 4294967295),
    ("data.target_low", "-7", -7),
    ("data.target_low", "null", None),
    ("data.target_low", "~", None),
    ("data.target_low", "", None),
    ("data.target_low", "999999999999999999", 999999999999999999),
    ("train.divide_by_std", "false", False),
    ("train.divide_by_std", "True", True),
    ("train.schedule", "cosine", "cosine"),
    ("model.device", "cuda:3", "cuda:3"),
    ("model.dtype", "'bfloat16'", "bfloat16"),
    ("model.path", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
    ("model.path", "C:\\models\\qwen", "C:\\models\\qwen"),
    ("model.path", '"a folder: with #, and é 数"', "a folder: with #, and é 数"),
    ("model.revision", "0123456", "0123456"),  # safe_load: octal, 42798
    ("model.revision", "1234e10", "1234e10"),  # a commit, not a number
    ("model.revision", "2024-01-31", "2024-01-31"),  # safe_load: a date
    ("model.revision", "off", "off"),  # safe_load: False
    ("data.number_counts", "[]", ()),
    ("data.number_counts", "[3, 4]", (3, 4)),
    ("data.number_counts", "3", (3,)),
    ("rollout.kv_cache_gib", "2.5", 2.5),
    ("rollout.kv_cache_gib", "null", None),
]


@pytest.mark.parametrize("name, typed, value", ACCEPTED)
def test_a_value_means_the_same_in_the_file_and_as_an_override(load, name, typed, value):
    section, key = name.split(".")
    for config in (load(with_value(name, typed)), load(text_of(SMALLEST), f"{name}={typed}")):
        found = getattr(getattr(config, section), key)
        assert found == value and type(found) is type(value)


def test_overrides_come_after_the_file_and_the_last_one_wins(load):
    config = load(with_value("rollout.group_size", "4"), "rollout.group_size=8", "eval.every=0",
                  "rollout.group_size=32")
    assert (config.rollout.group_size, config.eval.every) == (32, 0)


def test_an_override_can_give_what_the_file_lacks(load):
    assert load("model: {path: tiny}\n", "data.path=numbers", "train.learning_rate=3e-4", "train.steps=2",
                "rollout.max_new_tokens=9").train.learning_rate == 3e-4


@pytest.mark.parametrize("empty", ["", " {}", " # all of its lines are commented out"])
def test_a_section_may_be_empty(load, empty):
    assert load(text_of(SMALLEST) + f"eval:{empty}\n") == load(text_of(SMALLEST))


def test_line_ends_and_a_byte_order_mark_from_windows_are_harmless(load):
    text = "\ufeff" + text_of(SMALLEST).replace("\n", "\r\n")
    assert load(text) == load(text_of(SMALLEST))


def test_nothing_changes_a_config_behind_the_run_s_back(load):
    config = load(text_of(SMALLEST))
    for target, name in ((config.train, "steps"), (config, "train")):
        with pytest.raises(FrozenInstanceError):
            setattr(target, name, 3)


# ---- Bad values: each is tried in the file and as an override ----------------------------------------------

COUNT_0 = "a whole number, at least 0"
COUNT_1 = "a whole number, at least 1"
COUNT_2 = "a whole number, at least 2 and at most 65536"
POSITIVE = "a number, above 0"
COUNTS = "a list, each a whole number, at least 2 and at most 6"

BAD_VALUES = [  # (setting, as typed, as shown, what it must be)
    ("rollout.group_size", "1", "1", COUNT_2),  # no spread within a group of one
    ("rollout.group_size", "-16", "-16", COUNT_2),
    ("rollout.group_size", "16.0", "16.0", COUNT_2),  # refused even though integral
    ("rollout.group_size", "1e1", "1e1", COUNT_2),
    ("rollout.group_size", "1_6", "1_6", COUNT_2),
    ("rollout.group_size", "0x10", "0x10", COUNT_2),
    ("rollout.group_size", "１６", "１６", COUNT_2),  # full-width digits
    ("rollout.group_size", "true", "true", COUNT_2),
    ("rollout.group_size", "sixteen", "sixteen", COUNT_2),
    ("rollout.group_size", "", "empty", COUNT_2),
    ("rollout.group_size", "null", "null", COUNT_2),
    ("rollout.group_size", "[16]", "['16']", COUNT_2),
    ("rollout.group_size", "{a: 16}", "{'a': '16'}", COUNT_2),
    ("rollout.group_size", "65537", "65537", COUNT_2),  # no memory error later
    ("rollout.questions_per_step", "0", "0", f"{COUNT_1} and at most 65536"),
    ("rollout.questions_per_step", "65537", "65537", f"{COUNT_1} and at most 65536"),
    ("rollout.most_draws", "0", "0", f"{COUNT_1} and at most 100"),
    ("rollout.most_draws", "101", "101", f"{COUNT_1} and at most 100"),
    ("rollout.max_new_tokens", "0", "0", f"{COUNT_1} and at most 1048576"),
    ("rollout.max_new_tokens", "1048577", "1048577", f"{COUNT_1} and at most 1048576"),
    ("rollout.temperature", "0", "0", POSITIVE),
    ("rollout.temperature", "-0.5", "-0.5", POSITIVE),
    ("rollout.temperature", "hot", "hot", POSITIVE),
    ("rollout.top_p", "0", "0", "a number, above 0 and at most 1"),
    ("rollout.top_p", "1.01", "1.01", "a number, above 0 and at most 1"),
    ("rollout.top_k", "-1", "-1", COUNT_0),
    ("rollout.kv_cache_gib", "0", "0", "a number, above 0, or null"),
    ("rollout.kv_cache_gib", "none", "none", "a number, above 0, or null"),
    ("train.learning_rate", "0", "0", POSITIVE),
    ("train.learning_rate", "-1e-6", "-1e-6", POSITIVE),
    ("train.learning_rate", "1e-400", "1e-400", POSITIVE),  # underflows to zero
    ("train.learning_rate", "1e400", "1e400", POSITIVE),  # overflows to inf
    ("train.learning_rate", ".inf", ".inf", POSITIVE),
    ("train.learning_rate", "inf", "inf", POSITIVE),
    ("train.learning_rate", ".nan", ".nan", POSITIVE),
    ("train.learning_rate", "nan", "nan", POSITIVE),
    ("train.learning_rate", "fast", "fast", POSITIVE),
    ("train.learning_rate", "1e-6x", "1e-6x", POSITIVE),
    ("train.learning_rate", "1,5", "1,5", POSITIVE),
    ("train.learning_rate", "true", "true", POSITIVE),
    ("train.learning_rate", "1" * 80 + "x", "1" * 50 + "... (81 characters)", POSITIVE),
    ("train.steps", "0", "0", f"{COUNT_1} and at most 999999"),
    ("train.steps", "1000000", "1000000", f"{COUNT_1} and at most 999999"),  # six digits name a checkpoint
    ("train.warmup_steps", "1000000000000000000", "1000000000000000000", COUNT_0),  # no 64-bit overflow later
    ("train.seed", "-1", "-1", "a whole number, at least 0 and at most 4294967295"),
    ("train.seed", "4294967296", "4294967296", "a whole number, at least 0 and at most 4294967295"),
    ("train.warmup_steps", "-1", "-1", COUNT_0),
    ("train.schedule", "linear", "linear", "constant or cosine"),
    ("train.schedule", "Constant", "Constant", "constant or cosine"),
    ("train.weight_decay", "-0.1", "-0.1", "a number, at least 0"),
    ("train.beta1", "1", "1", "a number, at least 0 and below 1"),
    ("train.beta2", "1.0", "1.0", "a number, at least 0 and below 1"),
    ("train.max_grad_norm", "0", "0", POSITIVE),
    ("train.divide_by_std", "1", "1", "true or false"),
    ("train.divide_by_std", "maybe", "maybe", "true or false"),
    ("train.divide_by_std", "null", "null", "true or false"),
    ("train.tokens_per_microbatch", "0", "0", COUNT_1),
    ("train.activation_checkpointing", "off", "off", "true or false"),
    ("train.threads", "-2", "-2", f"{COUNT_0} and at most 1024"),
    ("train.threads", "1025", "1025", f"{COUNT_0} and at most 1024"),
    ("model.path", "", "empty", "text"),
    ("model.path", "null", "null", "text"),
    ("model.path", "' '", " ", "text"),
    ("model.path", "[tiny]", "['tiny']", "text"),
    ("model.path", '"a\\nb"', "a\\nb", "text"),  # a line break would break the one line of later messages
    ("model.path", '"a\\0b"', "a\\x00b", "text"),
    ("model.path", '"\\e[31m"', "\\x1b[31m", "text"),  # a terminal escape sequence
    ("model.path", '"\\ud800"', "\\ud800", "text"),  # half a character, which cannot be written as UTF-8
    ("model.revision", "[main]", "['main']", "text, or null"),
    ("model.device", "gpu", "gpu", "auto or cpu or mps or cuda or cuda:[0-9]"),
    ("model.device", "'cuda:'", "cuda:", "auto or cpu or mps or cuda or cuda:[0-9]"),
    ("model.device", "cuda:first", "cuda:first", "auto or cpu or mps or cuda or cuda:[0-9]"),
    ("model.device", "cpu2", "cpu2", "auto or cpu or mps or cuda or cuda:[0-9]"),
    ("model.dtype", "float16", "float16", "float32 or bfloat16"),
    ("model.dtype", "32", "32", "float32 or bfloat16"),
    ("data.path", "{}", "{}", "text"),
    ("data.held_out", "0", "0", COUNT_1),
    ("data.number_counts", "[3, 7]", "['3', '7']", COUNTS),
    ("data.number_counts", "[3, 4.0]", "['3', '4.0']", COUNTS),
    ("data.number_counts", "[[3]]", "[['3']]", COUNTS),
    ("data.number_counts", "3 4", "3 4", COUNTS),
    ("data.number_counts", "null", "null", COUNTS),
    ("data.target_low", "low", "low", "a whole number, or null"),
    ("data.target_high", "1.5", "1.5", "a whole number, or null"),
    ("eval.every", "-1", "-1", COUNT_0),
    ("eval.size", "0", "0", COUNT_1),
    ("eval.temperature", "-0.1", "-0.1", "a number, at least 0"),
    ("checkpoint.every", "-5", "-5", COUNT_0),
    ("checkpoint.keep", "0", "0", COUNT_1),
    ("output.folder", '""', "empty", "text"),
    ("output.samples", "two", "two", COUNT_0),
]


@pytest.mark.parametrize("name, typed, shown, allowed", BAD_VALUES)
def test_a_bad_value_is_named_with_its_key_and_the_values_allowed(load, name, typed, shown, allowed):
    message = f": {name} is {shown}; it must be {allowed}"
    assert complaint(load, with_value(name, typed)) == "FILE" + message
    if len(name + typed) < 80:
        override = f"{name}={typed}"
        assert complaint(load, text_of(SMALLEST), override) == f"in the override `{override}`{message}"


def test_an_override_does_not_hide_a_mistake_in_the_file(load):
    assert complaint(load, with_value("train.steps", "0"), "train.steps=5") == (
        "FILE: train.steps is 0; it must be a whole number, at least 1 and at most 999999")


# ---- Bad files ---------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True))
KNOWN_SECTIONS = ", ".join(SECTIONS)
KNOWN_TRAIN = ", ".join(name for name in SETTINGS if name.startswith("train."))
MUST_HOLD = "it must hold sections such as rollout and train"
MUST_HAVE_LINES = "it must hold lines such as `key: value`"
MISSING_FIRST = ("FILE: rollout.max_new_tokens is missing: an answer is cut off there, in tokens "
                 "(a whole number, at least 1 and at most 1048576)")
NOT_UTF8 = "cannot read the config 'FILE': 'utf-8' codec can't decode byte"
REFUSED = "bad YAML: anchors and tags are refused"
CONTROL = "special characters are not allowed"

BAD_FILES = {  # content: message
    "": f"FILE: the file is empty; {MUST_HOLD}",
    "# only a comment\n": f"FILE: the file is empty; {MUST_HOLD}",
    "{}\n": MISSING_FIRST,
    "null\n": f"FILE: the file is null; {MUST_HOLD}",
    "rollout\n": f"FILE: the file is rollout; {MUST_HOLD}",
    "- rollout\n- train\n": f"FILE: the file is ['rollout', 'train']; {MUST_HOLD}",
    "rolout: {}\n": "FILE: unknown section 'rolout'; did you mean rollout?",
    "Train:\n  steps: 3\n": "FILE: unknown section 'Train'; did you mean train?",
    "learning_rate: 3\n": "FILE: unknown section 'learning_rate'; did you mean train.learning_rate?",
    "path: tiny\n": "FILE: unknown section 'path'; did you mean model.path or data.path?",
    "wandb: {}\n": f"FILE: unknown section 'wandb'; known are {KNOWN_SECTIONS}",
    '"a\\nb": {}\n': f"FILE: unknown section 'a\\nb'; known are {KNOWN_SECTIONS}",
    "train: 3\n": f"FILE: train is 3; {MUST_HAVE_LINES}",
    "train: null\n": f"FILE: train is null; {MUST_HAVE_LINES}",
    "train: [steps, 3]\n": f"FILE: train is ['steps', '3']; {MUST_HAVE_LINES}",
    "train:\n  learning_rate:1e-6\n": f"FILE: train is learning_rate:1e-6; {MUST_HAVE_LINES}",
    "train:\n  learning_rat: 3": "FILE: unknown key 'train.learning_rat'; did you mean train.learning_rate?",
    "train:\n  group_size: 3\n": "FILE: unknown key 'train.group_size'; did you mean rollout.group_size?",
    "train:\n  lr: 3\n": f"FILE: unknown key 'train.lr'; known are {KNOWN_TRAIN}",
    "train:\n  3: 3\n": f"FILE: unknown key 'train.3'; known are {KNOWN_TRAIN}",
    "train:\n  <<: {steps: 3}\n": f"FILE: unknown key 'train.<<'; known are {KNOWN_TRAIN}",
    "train:\n  steps: 3\n  seed: 1\n  steps: 4\n": "FILE, line 4: bad YAML: steps is given twice",
    "train:\n  steps: 3\n  'steps': 3\n": "FILE, line 3: bad YAML: steps is given twice",
    "train:\n  steps: 3\nmodel: {}\ntrain:\n  seed: 1\n": "FILE, line 4: bad YAML: train is given twice",
    "train:\n\tsteps: 3\n": "FILE, line 2: bad YAML: found character '\\t' that cannot start any token",
    "train:\n  seed: 3\n steps: 1\n": (
        "FILE, line 3: bad YAML: expected <block end>, but found '<block mapping start>'"),
    "train:\n  schedule: a: b\n": "FILE, line 2: bad YAML: mapping values are not allowed here",
    "train: [3\nmodel: {}\n": "FILE, line 2: bad YAML: expected ',' or ']', but got ':'",
    "train: {steps: 3\n": "FILE, line 2: bad YAML: expected ',' or '}', but got '<stream end>'",
    "model:\n  path: 'tiny\n": "FILE, line 3: bad YAML: found unexpected end of stream",
    "model:\n  path: @tiny\n": "FILE, line 2: bad YAML: found character '@' that cannot start any token",
    "train: {}\n---\nmodel: {}\n": "FILE, line 2: bad YAML: but found another document",
    "train: &all\n  steps: 3\n": f"FILE, line 1: {REFUSED}",
    "model:\n  path: *tiny\n": f"FILE, line 2: {REFUSED}",
    "model:\n  path: !!python/object/apply:os.getcwd []\n": f"FILE, line 2: {REFUSED}",
    "train:\n  steps: !!int 3\n": f"FILE, line 2: {REFUSED}",
    BOMB: f"FILE, line 1: {REFUSED}",
    'model: {path: "\\UFFFFFFFF"}\n': "FILE: bad YAML: Python int too large to convert to C int",
    "model:\n  path: a\x07b\n": f"FILE: bad YAML: unacceptable character #x0007: {CONTROL}",
    "#" * (MOST_CHARACTERS + 1): "FILE: longer than 65536 characters; this is no config",
    b"model:\n  path: caf\xe9\n": f"{NOT_UTF8} 0xe9 in position 18: invalid continuation byte",
    "train: {}\n".encode("utf-16"): f"{NOT_UTF8} 0xff in position 0: invalid start byte",
    b"\x00\x01\x02": f"FILE: bad YAML: unacceptable character #x0000: {CONTROL}",
}


@pytest.mark.parametrize("content, message", BAD_FILES.items(), ids=map(str, range(len(BAD_FILES))))
def test_a_bad_file_gets_one_line(load, content, message):
    assert complaint(load, content) == message


@pytest.mark.parametrize("name, message", [
    ("rollout.max_new_tokens",
     "an answer is cut off there, in tokens (a whole number, at least 1 and at most 1048576)"),
    ("train.learning_rate", "the step size of AdamW (a number, above 0)"),
    ("train.steps", "training steps: a rollout and an update each (a whole number, at least 1 and at most 999999)"),
    ("model.path", "a folder or hub id of a Qwen2.5 model (text)"),
    ("data.path", "a folder or hub id of a data set with the columns nums and target (text)"),
])
def test_a_missing_setting_is_named_and_explained(load, name, message):
    section, key = name.split(".")
    keys = {other: value for other, value in SMALLEST[section].items() if other != key}
    assert complaint(load, text_of({**SMALLEST, section: keys})) == f"FILE: {name} is missing: {message}"


def test_evaluation_cannot_ask_for_more_problems_than_are_held_out(load):
    assert complaint(load, text_of(SMALLEST), "data.held_out=100", "eval.size=101") == (
        "FILE: eval.size is 101; it must be at most data.held_out, which is 100")
    assert load(text_of(SMALLEST), "data.held_out=100", "eval.size=100").eval.size == 100


@pytest.mark.parametrize("open_braces", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_ends_in_one_line(load, open_braces):
    message = complaint(load, open_braces * (60000 // len(open_braces)))
    assert message.startswith("FILE: bad YAML: maximum recursion depth exceeded") and "\n" not in message


@pytest.mark.parametrize("name, reason", [
    ("missing.yml", "No such file or directory"),
    ("", "Is a directory"),
    ("file/config.yml", "Not a directory"),
    ("x" * 300, "File name too long"),
    ("a\0b", "embedded null byte"),
    ("a\nb", "No such file or directory"),
])
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, reason):
    (tmp_path / "file").touch()
    path = f"{tmp_path}/{name}"
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"cannot read the config {path!r}: {reason}"


HOW = "write it as section.key=value, such as rollout.group_size=16"

BAD_OVERRIDES = {  # override: message after "in the override `...`: "
    "": HOW,
    "rollout.group_size": HOW,
    "rollout.group_size:16": HOW,
    "group_size=16": HOW,
    "rollout.group.size=16": HOW,
    "=16": HOW,
    "train.learningrate=1": "unknown key 'train.learningrate'; did you mean train.learning_rate?",
    "rolout.group_size=16": "unknown key 'rolout.group_size'; did you mean rollout.group_size?",
    "--rollout.group_size=16": "unknown key '--rollout.group_size'; did you mean rollout.group_size?",
    "rollout.group_size =16": "unknown key 'rollout.group_size '; did you mean rollout.group_size?",
    ".=16": f"unknown key '.'; known are {KNOWN_SECTIONS}",
    "train.steps==5": "train.steps is =5; it must be a whole number, at least 1 and at most 999999",
    "data.number_counts=[3": "bad YAML: expected ',' or ']', but got '<stream end>'",
    "model.path=*tiny": "bad YAML: anchors and tags are refused",
    "model.path=a: b": "model.path is {'a': 'b'}; it must be text",
}


@pytest.mark.parametrize("override, message", BAD_OVERRIDES.items())
def test_a_bad_override_is_quoted(load, override, message):
    assert complaint(load, text_of(SMALLEST), override) == f"in the override `{override}`: {message}"


def test_a_long_override_is_cut_and_its_line_breaks_escaped(load):
    assert complaint(load, text_of(SMALLEST), "a\nb" + "c" * 100) == (
        "in the override `a\\nb" + "c" * 47 + f"... (103 characters)`: {HOW}")


# ---- Every setting, also those added later -----------------------------------------------------------------


def test_scripts_find_the_keys_they_rely_on():
    assert set(SETTINGS) >= {
        "model.path", "model.device", "model.dtype", "data.path", "rollout.questions_per_step",
        "rollout.group_size", "rollout.max_new_tokens", "rollout.temperature", "train.seed", "train.steps",
        "train.learning_rate", "eval.every", "eval.size", "checkpoint.every"}


def test_every_setting_says_what_it_means_and_has_a_default_that_it_allows(load):
    for name, spec in SETTINGS.items():
        assert spec.metadata["meaning"], name
        assert data_types.allowed(spec), name
    config = load(text_of(SMALLEST))
    assert load(dump_config(config)) == config  # reading checks the defaults
    required = [name for name, spec in SETTINGS.items() if spec.default is REQUIRED]
    assert sorted(required) == ["data.path", "model.path", "rollout.max_new_tokens", "train.learning_rate",
                                "train.steps"]


def test_a_new_setting_needs_no_more_than_its_line(load, monkeypatch):
    @dataclass
    class New:
        weights: tuple[float, ...] | None = setting(None, "an example", at_least=0)
        mode: str | None = setting(None, "an example", choices=("fast", "exact"))

    for spec in fields(New):
        monkeypatch.setitem(SETTINGS, f"train.{spec.name}", spec)

    def read(text: str):
        return data_types.read_setting("here", "train.weights", yaml.load(text, yaml.BaseLoader))

    assert read("[1, 2.5, 1e-3]") == (1.0, 2.5, 0.001) and read("null") is None and read("[]") == ()
    with pytest.raises(UserError) as caught:
        read("[1, -2]")
    assert str(caught.value) == (
        "here: train.weights is ['1', '-2']; it must be a list, each a number, at least 0, or null")
    assert complaint(load, text_of(SMALLEST), "train.mode=slow") == (
        "in the override `train.mode=slow`: train.mode is slow; it must be fast or exact, or null")


def test_a_setting_with_a_misspelt_bound_fails_at_import_and_not_silently():
    with pytest.raises(KeyError):
        setting(1, "an example", atleast=1)


# ---- Writing and reading back ------------------------------------------------------------------------------


def test_the_dump_starts_with_what_people_tune(load):
    lines = dump_config(load(text_of(SMALLEST))).splitlines()
    assert lines[:2] == ["rollout:", "  group_size: 16"]
    assert lines[lines.index("train:") + 1] == "  learning_rate: 1.0e-06"
    assert [line for line in lines if not line.startswith(" ")] == [
        f"{section}:" for section in ("rollout", "train", "model", "data", "eval", "checkpoint", "output")]


def test_the_dump_is_plain_yaml_with_every_setting(load):
    text = dump_config(load(text_of(SMALLEST), "data.number_counts=[3, 4]", "output.folder=läufe 数"))
    assert "  folder: läufe 数\n" in text  # not as escapes
    plain = yaml.safe_load(text)
    assert plain["data"]["number_counts"] == [3, 4] and plain["model"]["revision"] is None
    assert plain["train"]["divide_by_std"] is True and plain["rollout"]["top_p"] == 1.0
    assert {f"{section}.{key}" for section, keys in plain.items() for key in keys} == set(SETTINGS)


def finite(**bounds) -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False, **bounds)


LOOKALIKES = ["true", "1e-6", "010", "no", "None", "a: b", "- a", "#a", "*a", "!a", "=", "<<", "'", '"', "[",
              " a ", "é 数 🙂", "2024-01-31", "x " * 100]  # YAML would take it for something else, or fold it
WORDS = st.sampled_from(LOOKALIKES) | st.text(min_size=1).filter(
    lambda text: text.isprintable() and text.strip() and text not in ("~", "null"))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(path=WORDS, revision=st.none() | WORDS, rate=finite(min_value=0, exclude_min=True), top_p=finite(
       min_value=0, max_value=1, exclude_min=True), low=st.none() | st.integers(-10**17, 10**17),
       counts=st.lists(st.integers(2, 6)), flag=st.booleans(), cache=st.none() | finite(min_value=1e-300))
def test_a_dump_reads_back_to_the_same_config(tmp_path_factory, path, revision, rate, top_p, low, counts,
                                              flag, cache):
    file = tmp_path_factory.getbasetemp() / "dumped.yml"
    config = Config(
        rollout=RolloutSettings(max_new_tokens=64, top_p=top_p, kv_cache_gib=cache),
        train=TrainSettings(learning_rate=rate, steps=5, divide_by_std=flag),
        model=ModelSettings(path=path, revision=revision),
        data=DataSettings(path=path, target_low=low, number_counts=tuple(counts)),
        eval=EvalSettings(), checkpoint=CheckpointSettings(), output=OutputSettings(folder=path))
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(file)) == config


# ---- Whatever is in the file -------------------------------------------------------------------------------

HOSTILE = ["\n", "\t", " ", ":", ": ", "- ", "? ", "[", "]", "{", "}", ",", "#", "&a ", "*a", "!!int ", "|",
           ">", "'", '"', "%", "@", "`", "---\n", "...\n", "<<: ", "~", "null", "true", ".nan", "1e999", "-",
           "0x1F", "9" * 25, "9" * 5000, "\0", "\x1b[2J", "\u2028", "\ufeff", "\U0001f642", "\\", '"\\ud800"',
           '"\\UFFFFFFFF"', '"\\x00"', "%YAML 9.9\n", "%YAML 1." + "1" * 5000 + "\n", "%TAG ! a\n", "train",
           "steps", "1", ".5"]


def check_one_line_or_a_config(path: str, overrides: list[str]) -> bool:
    """True where the file was read; then what was read can be written and read again."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        assert str(error).isprintable() and 10 < len(str(error).replace(path, "")) < 700
        return False
    with open(path, "w", encoding="utf-8") as file:
        file.write(dump_config(config))
    assert load_config(path) == config
    return True


def mutated(text: str, generator: random.Random) -> str:
    for _ in range(generator.randint(1, 3)):
        start, end = sorted(generator.randint(0, len(text)) for _ in range(2))
        end = min(end, start + generator.choice([0, 0, 1, 5, 40]))
        middle = generator.choice(["", generator.choice(HOSTILE), text[start:end] * 2, text[end:end + 30]])
        text = text[:start] + middle + text[end:]
    return text


def test_a_mutated_file_or_override_is_a_config_or_one_line(tmp_path, load):
    path, generator = str(tmp_path / "fuzzed.yml"), random.Random(1)
    good = dump_config(load(text_of(SMALLEST)))
    read = 0
    for _ in range(400):
        with open(path, "w", encoding="utf-8") as file:
            file.write(mutated(generator.choice([good, text_of(SMALLEST)]), generator))
        read += check_one_line_or_a_config(path, [])
        with open(path, "w", encoding="utf-8") as file:
            file.write(text_of(SMALLEST))
        override = generator.choice(["train.learning_rate=3e-4", "data.number_counts=[3, 4]", "model.path=a"])
        read += check_one_line_or_a_config(path, [mutated(override, generator)])
    assert 40 < read < 760  # both outcomes are met often


def test_random_bytes_are_refused_in_one_line(tmp_path):
    path, generator = tmp_path / "bytes.yml", random.Random(2)
    for _ in range(400):
        alphabet = generator.choice([range(256), range(32, 127), b"\n :-[]{}#&*!|>'\"%@`ab1.,?~\\"])
        path.write_bytes(bytes(generator.choices(alphabet, k=generator.randint(0, 60))))
        assert not check_one_line_or_a_config(str(path), [])


def test_a_changed_value_never_leaks_into_another_setting(load):
    config = load(text_of(SMALLEST))
    changed = load(text_of(SMALLEST), "eval.temperature=0.5")
    assert changed == replace(config, eval=replace(config.eval, temperature=0.5)) != config


def test_an_error_quoting_hostile_text_stays_one_harmless_line():
    assert str(UserError("a\nb\x1b[31m\u202e\ud800 é 数")) == "a\\nb\\x1b[31m\\u202e\\ud800 é 数"
