"""The configuration: what a config file may say, and the one line a person gets for a mistake in it."""

import random
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

import train
from data_types import REQUIRED as MISSING, Config
from plumbing.config import dump_config, load_config, settings, values
from plumbing.terminal import UserError

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = settings("countdown")
REQUIRED = {"rollout.max_new_tokens": "64", "train.learning_rate": "1e-6", "train.steps": "5", "model.path": "tiny"}


def text_of(values: dict[str, str]) -> str:
    sections: dict[str, str] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections[section] = sections.get(section, f"{section}:\n") + f"  {key}: {value}\n"
    return "".join(sections.values())


SMALLEST = text_of(REQUIRED)  # a file needs no more than this


@pytest.fixture
def load(tmp_path):
    """load(text or bytes, *overrides) reads a file of that content."""

    def load(content: str | bytes, *overrides: str) -> Config:
        (tmp_path / "my.yml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_config(tmp_path / "my.yml", overrides)

    return load


LIMITS = """rollout.group_size=2 rollout.questions_per_step=1 rollout.max_draws=100 rollout.temperature=0.01
    train.learning_rate=1 train.steps=999999 train.seed=4294967295 train.beta1=0 train.clip_low=1 train.threads=1024
    train.updates_per_batch=2 train.objective=clipped data.held_out=1 data.most_numbers=6 eval.every=0
    checkpoint.keep=1 output.samples=0"""  # of what is accepted


def test_the_smallest_file_gives_every_other_setting_its_default(load):
    given = {"rollout.max_new_tokens": 64, "train.learning_rate": 1e-6, "train.steps": 5, "model.path": "tiny"}
    expected = {name: given.get(name, spec.default) for name, spec in SETTINGS.items()}
    for text in (SMALLEST, SMALLEST + "eval:\n", SMALLEST + "eval: {}\n", SMALLEST.replace("\n", "\r\n")):
        assert values(load(text)) == expected
    assert values(load("eval: {}", *(f"{name}={value}" for name, value in REQUIRED.items()))) == expected
    four = text_of(REQUIRED | {"eval.every": "4"})  # overrides come after the file, and the last one wins
    assert values(load(four, "eval.every=6", "eval.every=5")) == expected | {"eval.every": 5}
    with pytest.raises(FrozenInstanceError):  # nothing changes a config behind the run's back
        load(SMALLEST, *LIMITS.split()).train.steps = 3


ACCEPTED = [  # setting, (as typed, value), which yaml.safe_load would often get wrong
    ("train.learning_rate", [("1e-6", 1e-6), ("1", 1.0), ("0.7  # a comment", 0.7)]),  # safe_load: "1e-6" is a string
    ("train.steps", [("010", 10), ("999999", 999999)]),  # safe_load: 010 is octal
    ("train.divide_by_std", [("false", False), ("true", True)]),
    ("model.path", [('"a folder: with #, and é 数"', "a folder: with #, and é 数"), ("C:\\qwen", "C:\\qwen")]),
    # safe_load: an octal number, a float, a date, False, None
    ("model.revision", [(text, text) for text in ("0123456", "1234e10", "2024-01-31", "off", "null", "~")]),
    ("model.device", [("cuda:3", "cuda:3"), ("auto", "auto")]),
]


@pytest.mark.parametrize(("name", "pairs"), ACCEPTED)
def test_a_value_means_the_same_in_the_file_and_as_an_override(load, name, pairs):
    for typed, value in pairs:
        for loaded in (load(text_of(REQUIRED | {name: typed})), load(SMALLEST, f"{name}={typed}")):
            assert repr(values(loaded)[name]) == repr(value)  # 1 is not 1.0


def complaint(load, content: str | bytes, *overrides: str) -> str:
    """The one line that a person gets."""
    with pytest.raises(UserError) as caught:
        load(content, *overrides)
    assert str(caught.value).isprintable()
    return str(caught.value)


BAD_VALUES = """rollout.group_size=1 rollout.group_size=16.0 rollout.group_size=true rollout.group_size=null
    rollout.group_size= rollout.group_size=[16] rollout.group_size=nan rollout.group_size=4294967296
    rollout.questions_per_step=0 rollout.max_draws=0 rollout.max_draws=101 rollout.max_new_tokens=0
    rollout.temperature=0 rollout.temperature=inf train.learning_rate=0 train.learning_rate=1.01
    train.learning_rate=1e-400 train.learning_rate=1e400 train.learning_rate=nan train.learning_rate=1,5
    train.steps=1000000 train.steps=0 train.seed=4294967296 train.seed=-1 train.warmup_steps=-1 train.schedule=linear
    train.weight_decay=-0.1 train.optimizer=adam train.beta1=1 train.beta2=1 train.beta2=-0.1 train.max_grad_norm=0
    train.divide_by_std=1 train.objective=ppo train.updates_per_batch=0 train.clip_low=0 train.clip_low=2
    train.clip_high=0 train.shard=no train.divide_loss_by=token train.truncated=penalize
    train.tokens_per_microbatch=0 train.tokens_per_microbatch=8k train.activation_checkpointing=off train.max_skips=0
    train.threads=1025 model.path='' model.path=[tiny] model.revision=[main] model.device=gpu model.device=cuda:first
    model.dtype=float16 data.task=../run data.task=nowhere data.path={} data.revision={} data.held_out=0
    data.most_numbers=7 data.most_numbers=1 data.files=[] data.columns=nums
    data.target_high=0 eval.every=-1 checkpoint.every=-5 checkpoint.keep=0 output.folder= output.samples=-1"""


@pytest.mark.parametrize("override", BAD_VALUES.split())
def test_a_bad_value_is_named_with_its_key_in_the_file_and_as_an_override(load, override):
    name, _, typed = override.partition("=")
    for line in (complaint(load, SMALLEST, override), complaint(load, text_of(REQUIRED | {name: typed}))):
        assert name in line
        assert typed.strip("'[]{}") in line


MISTAKES = [  # content of the file, overrides, what the message names
    *((content, [], "my.yml") for content in ("# only a comment\n", "rollout\n", "- rollout\n- train\n")),
    *((f"train: {value}", [], "my.yml") for value in ("3", "[steps, 3]", "\n  learning_rate:1e-6\n")),
    ("rolout: {steps: 3}\n", [], r"rolout\.steps"), ("Train: {steps: 3}\n", [], r"Train\.steps.* train\.steps"),
    ("train: {learning_rat: 3}\n", [], r"train\.learning_rat\b.* train\.learning_rate"),
    ("train: {group_size: 3}\n", [], r"train\.group_size.* rollout\.group_size"),
    ("train:\n\tsteps: 3\n", [], "my.yml.* line 2"), (b"model:\n  path: caf\xe9\n", [], "my.yml.*utf-8"),
    (SMALLEST, ["rollout.group_size"], "rollout.group_size"), (SMALLEST, ["data.path=[3"], "data.path"),
    # as other trainers call it, settings without their section, and what this trainer does not have
    (SMALLEST, ["train.lr=1e-6"], r"train\.lr.* train\.learning_rate"), (SMALLEST, ["lr=1"], r"train\.learning_rate"),
    (SMALLEST, ["train.epsilon=0.2"], r"train\.epsilon.* train\.clip_low"), (SMALLEST, ["eval=3"], "eval"),
    (SMALLEST, ["group_size=9"], r"rollout\.group_size"), (SMALLEST, ["train.learningrate=1"], "train.learning_rate"),
    *((SMALLEST, [f"{name}=0.1"], re.escape(name)) for name in ("train.kl_coef", "train.beta", "rollout.top_p")),
    (SMALLEST, ["a\nb\x1b[31m\u202e\ud800 é=1"], r" a\\nb\\x1b\[31m\\u202e\\ud800 é"),
    *((text_of({key: REQUIRED[key] for key in REQUIRED if key != name}), [], f"my.yml.*{name}") for name in REQUIRED),
    (SMALLEST, ["train.optimizer=split"], "train.optimizer.* model.dtype"),
    (SMALLEST, ["train.shard=true", "train.optimizer=offload"], "train.shard.* train.optimizer"),
    (SMALLEST, ["train.updates_per_batch=2"], "train.updates_per_batch.* train.objective"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "overrides", "named"), MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(load, content, overrides, named):
    assert re.search(named, complaint(load, content, *overrides))


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    told = dict(re.findall(r"^ +(\w+\.\w+) +(\S+) +\w", capsys.readouterr().out, re.MULTILINE))
    words = {MISSING: "(required)", "": "(empty)"}
    defaults = {name: words.get(spec.default, f"{spec.default}".lower()) for name, spec in SETTINGS.items()}
    assert (end.value.code, told) == (0, defaults)
    assert {override.partition("=")[0] for override in BAD_VALUES.split()} == SETTINGS.keys()  # each is tried above


def test_the_configs_of_the_repository_load_and_a_dump_reads_back_equal(load):
    """With what YAML would misread or fold, and random texts."""
    rng, configs = random.Random(0), [load_config(path) for path in sorted(ROOT.glob("config*.yml"))]
    texts = ["true", "1e-6", "010", "no", "None", "a: b", "- a", "#a", "*a", "!a", "=", "<<", "'", '"', "[", " a "]
    texts += ["é 数 🙂", "2024-01-31", "x " * 100, "null", "~", "a~/"]
    characters = [c for c in (chr(int(0x30000 * rng.random() ** 5)) for _ in range(2000)) if c.isprintable()]
    texts += ["".join(rng.choices(characters, k=rng.randint(1, 30))) + "x" for _ in range(60)]
    for number, text in enumerate(texts):
        config = configs[number % len(configs)]
        update = replace(config.train, learning_rate=rng.random())
        written = replace(config, model=replace(config.model, path=text, revision=text), train=update)
        assert load(dump_config(written)) == written
    dump = dump_config(replace(config, model=replace(config.model, path="läufe 数")))
    assert "path: läufe 数\n" in dump  # not as escapes
    assert [f"{part}.{key}" for part, keys in yaml.safe_load(dump).items() for key in keys] == list(SETTINGS)
