"""The configuration: what a config file may say, and the one line a person gets for a mistake in it."""

import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies as st

import data_types as types
import train
from config import SECTIONS, dump_config, load_config, settings as settings_of
from countdown_task import Settings
from data_types import Config, UserError

ROOT = Path(__file__).resolve().parent.parent
# a file needs no more than this; values as a person types them
REQUIRED = {"rollout": {"max_new_tokens": "64"}, "train": {"learning_rate": "1e-6", "steps": "5"},
            "model": {"path": "tiny"}}  # fmt: skip
SETTINGS = settings_of(SECTIONS | {"data": Settings})


def text_of(sections: dict[str, dict[str, str]]) -> str:
    lines = {name: "".join(f"  {key}: {value}\n" for key, value in keys.items()) for name, keys in sections.items()}
    return "".join(f"{name}:\n{lines[name]}" for name in lines)


SMALLEST = text_of(REQUIRED)


def with_value(name: str, value: str) -> str:
    """The smallest good file with `name` set to the text `value`."""
    section, _, key = name.partition(".")
    return text_of({**REQUIRED, section: {**REQUIRED.get(section, {}), key: value}})


@pytest.fixture
def load(tmp_path):
    """load(text or bytes, *overrides) reads a file of that content."""

    def load(content: str | bytes, *overrides: str) -> Config:
        (tmp_path / "my.yml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_config(tmp_path / "my.yml", overrides)

    return load


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("config*.yml")))
def test_the_configs_of_the_repository_load_and_read_back_equal(name, load):
    loaded = load_config(ROOT / name, ["output.folder=läufe 数"])
    text = dump_config(loaded)
    assert load(text) == loaded
    assert "  folder: läufe 数\n" in text  # not as escapes
    assert [f"{section}.{key}" for section, keys in yaml.safe_load(text).items() for key in keys] == list(SETTINGS)


def test_the_smallest_file_gives_every_other_setting_its_default(load):
    expected = Config(
        rollout=types.RolloutSettings(max_new_tokens=64), train=types.TrainSettings(learning_rate=1e-6, steps=5),
        model=types.ModelSettings(path="tiny"), data=Settings(), eval=types.EvalSettings(),
        checkpoint=types.CheckpointSettings(), output=types.OutputSettings(),
    )  # fmt: skip
    for text in (SMALLEST, SMALLEST + "eval:\n", SMALLEST + "eval: {}\n", "\ufeff" + SMALLEST.replace("\n", "\r\n")):
        assert load(text) == expected
    assert load(SMALLEST, "eval.every=5") == replace(expected, eval=types.EvalSettings(every=5))
    for target, name in ((expected.train, "steps"), (expected, "train")):
        with pytest.raises(FrozenInstanceError):  # nothing changes a config behind the run's back
            setattr(target, name, 3)


ACCEPTED = [  # setting, (as typed, value), which yaml.safe_load would often get wrong
    ("train.learning_rate", [("1e-6", 1e-6), ("1", 1.0), ("0.7  # a comment", 0.7)]),  # safe_load: "1e-6" is a string
    ("train.steps", [("010", 10), ("999999", 999999)]),  # safe_load: 010 is octal
    ("train.divide_by_std", [("false", False), ("true", True)]),
    ("model.device", [("cuda:3", "cuda:3")]),
    ("model.path", [('"a folder: with #, and é 数"', "a folder: with #, and é 数"), ("C:\\qwen", "C:\\qwen")]),
    # safe_load: an octal number, a float, a date, False, None
    ("model.revision", [(text, text) for text in ("0123456", "1234e10", "2024-01-31", "off", "null", "~")]),
]


@pytest.mark.parametrize(("name", "values"), ACCEPTED)
def test_a_value_means_the_same_in_the_file_and_as_an_override(load, name, values):
    section, _, key = name.partition(".")
    for typed, value in values:
        for loaded in (load(with_value(name, typed)), load(SMALLEST, f"{name}={typed}")):
            assert repr(getattr(getattr(loaded, section), key)) == repr(value)  # 1 is not 1.0


def test_overrides_come_after_the_file_and_the_last_one_wins(load):
    overrides = ["rollout.group_size=8", "eval.every=0", "rollout.group_size=32"]
    loaded = load(with_value("rollout.group_size", "4"), *overrides)
    assert (loaded.rollout.group_size, loaded.eval.every) == (32, 0)
    required = ["train.learning_rate=3e-4", "train.steps=2", "rollout.max_new_tokens=9"]
    assert load("model: {path: tiny}\n", *required).train.learning_rate == 3e-4
    load(SMALLEST, "train.updates_per_batch=2", "train.objective=clipped")


def complaint(load, content: str | bytes, *overrides: str) -> str:
    """The one line that a person gets; it names the file or quotes the override."""
    with pytest.raises(UserError) as caught:
        load(content, *overrides)
    message = str(caught.value)
    assert message.isprintable()
    assert any(str(UserError(where)) in message for where in ("my.yml", *overrides))
    return message


BAD_VALUES = [  # setting, what the message says is allowed, values as typed; test_bad_input.py has every setting
    ("rollout.group_size", "whole number.* 2.* 65536", "1|-16|16.0|0x10|true|sixteen|null||[16]|{a: 16}|65537|nan"),
    ("train.learning_rate", "number.* 0", "0|-1e-6|1e-400|1e400|.inf|inf|.nan|nan|fast|1e-6x|1,5|true"),
    ("train.steps", "whole number.* 1.* 999999", f"0|1000000|{'9' * 400}|{'9' * 5000}"),  # six digits name a checkpoint
    ("train.objective", "reinforce.* clipped.* truncated_is", "ppo|Clipped"),
    ("train.divide_by_std", "true.* false", "1|maybe|null"),
    ("model.path", "text", "|''|[tiny]|{a: b}"),
    ("model.device", "auto.* cpu.* mps.* cuda", "gpu|'cuda:'|cuda:first|cpu2"),
]


@pytest.mark.parametrize(("name", "allowed", "values"), BAD_VALUES)
def test_a_bad_value_is_named_with_its_key_and_the_values_allowed(load, name, allowed, values):
    for typed in values.split("|"):
        assert re.search(f"{name}.*{allowed}", complaint(load, with_value(name, typed)))
        assert re.search(f"{name}.*{allowed}", complaint(load, SMALLEST, f"{name}={typed}"))


MISTAKES = [  # content of the file, overrides, what the message names
    *((content, [], "") for content in ("", "# only a comment\n", "null\n", "rollout\n", "- rollout\n- train\n")),
    *((f"train: {value}", [], "train") for value in ("3", "[steps, 3]", "\n  learning_rate:1e-6\n")),
    ("rolout: {}\n", [], "rolout.* rollout"), ("Train: {steps: 3}\n", [], "Train.* train"), ("x: {}\n", [], " x"),
    ("train: {learning_rat: 3}\n", [], r"train\.learning_rat\b.* train\.learning_rate"),
    ("train: {group_size: 3}\n", [], r"train\.group_size.* rollout\.group_size"),
    ("train:\n\tsteps: 3\n", [], "line 2"), ("train:\n  seed: 3\n steps: 1\n", [], "line 3"),
    ("train: {}\n---\nmodel: {}\n", [], "line 2"), ("? [a]\n: 3\n", [], "line 1"), ("a: \x07\n", [], ""),
    (b"model:\n  path: caf\xe9\n", [], "utf-8"), ("train: {}\n".encode("utf-16"), [], "utf-8"),
    (SMALLEST, ["rollout.group_size"], "section.key=value"), (SMALLEST, ["rollout.group_size:16"], "section.key=value"),
    # as other trainers call it, and settings without their section
    (SMALLEST, ["train.lr=1e-6"], r"train\.lr.* train\.learning_rate"), (SMALLEST, ["lr=1"], r"train\.learning_rate"),
    (SMALLEST, ["train.epsilon=0.2"], r"train\.epsilon.* train\.clip_low"), ("lr: 3\n", [], r"train\.learning_rate"),
    *((SMALLEST, [f"train.{name}=0.1"], rf"train\.{name}.* grpo\.py") for name in ("kl_coef", "beta")),
    (SMALLEST, ["group_size=9"], r"rollout\.group_size"), ("group_size: 9\n", [], r"rollout\.group_size"),
    (SMALLEST, ["train.learningrate=1"], "train.learning_rate"),
    (SMALLEST, ["a\nb\x1b[31m\u202e\ud800 é=1"], r" a\\nb\\x1b\[31m\\u202e\\ud800 é"),  # one harmless line
    (SMALLEST, ["rollout.group.size=16"], ""), (SMALLEST, ["eval=3"], ""), (SMALLEST, ["=16"], ""),
    (SMALLEST, ["train.steps==5"], "train.steps is =5"), (SMALLEST, ["data.path=[3"], "YAML"),
    (with_value("train.steps", "0"), ["train.steps=5"], "train.steps is 0"),  # an override hides no mistake
    *((SMALLEST.replace(f"  {key}: {value}\n", ""), [], rf"{section}\.{key} is missing")
      for section, keys in REQUIRED.items() for key, value in keys.items()),
    (SMALLEST, ["train.optimizer=split"], "train.optimizer.* model.dtype"),
    (SMALLEST, ["train.updates_per_batch=2"], "train.updates_per_batch.* train.objective"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "overrides", "named"), MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(load, content, overrides, named):
    assert re.search(named, complaint(load, content, *overrides))


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    told = dict(re.findall(r"^ +(\w+\.\w+) +(\S+) +\w", capsys.readouterr().out, re.MULTILINE))
    words = {types.REQUIRED: "(required)", "": "(empty)"}
    defaults = {name: words.get(spec.default, f"{spec.default}".lower()) for name, spec in SETTINGS.items()}
    assert (end.value.code, told) == (0, defaults)


@pytest.mark.parametrize("typed", [[], ["my.yml"], ["train.steps=3", "my.yml"], ["my.yml", "--name", "x"]], ids=str)
def test_without_a_config_two_lines_say_how_to_start_and_to_resume(typed, capsys):
    """argparse would print its usage, or complain of an override that a person never meant."""
    assert train.main(typed) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"train.py --config {'my.yml' if 'my.yml' in typed else 'config_tiny.yml'}")
    assert "--resume" in second


LOOKALIKES = ["true", "1e-6", "010", "no", "None", "a: b", "- a", "#a", "*a", "!a", "=", "<<", "'", '"', "[", " a ",
              "é 数 🙂", "2024-01-31", "x " * 100, "null", "~"]  # fmt: skip  # YAML would misread or fold them
TEXTS = st.text(min_size=1).filter(lambda text: text.isprintable() and text.strip() and text[:2] != "~/")  # a home
WORDS = st.sampled_from(LOOKALIKES) | TEXTS


@settings(derandomize=True, deadline=None, max_examples=100)
@given(WORDS, WORDS, st.floats(0, 1, exclude_min=True), st.integers(1, 2**31))
def test_a_dump_reads_back_equal(tmp_path_factory, path, revision, rate, low):
    file = tmp_path_factory.getbasetemp() / "dumped.yml"
    tiny = load_config(ROOT / "config_tiny.yml")
    model, data = types.ModelSettings(path=path, revision=revision), Settings(path=path, target_low=low)
    written = replace(tiny, model=model, data=data, train=replace(tiny.train, learning_rate=rate, divide_by_std=False))
    file.write_text(dump_config(written), encoding="utf-8")
    assert load_config(file) == written
