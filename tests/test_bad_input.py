"""Bad input as a person meets it: train.py says one line, exits with 2, and no file has changed. And hostile text.

Tables of mistakes, by the place where they sit: config file, overrides, command line, model, tokenizer, data, the run
to resume. Each row begins with a workplace that trains (a config, a copy of tiny/, a few problems, a finished run),
damages one thing in it, starts train.py there, and gives the words (file, key, value) that the line must hold.
"""

import functools
import html
import json
import math
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pyarrow.parquet
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

import train
from config import SECTIONS, settings
from countdown_task import ASSISTANT_PREFIX, Settings
from logbook import printable
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
rollout: {max_new_tokens: 4, group_size: 2, questions_per_step: 1}
train: {learning_rate: 1e-4, steps: 2, threads: 1}
model: {path: model, device: cpu}
data: {path: data.parquet, held_out: 4}
checkpoint: {every: 1}
"""
WEIGHTS, CONFIG_JSON = "model/model.safetensors", "model/config.json"
BPE, SETTING, GENERATION, TEMPLATE = (f"model/{name}" for name in (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"))  # fmt: skip
OLD, NEWEST = "runs/old", "runs/old/checkpoints/step-000002"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"


def later(damage: Callable[..., object]) -> Callable[..., Callable[[], object]]:
    """`damage(...)` is done when its result is called, in the workplace."""
    return functools.partial(functools.partial, damage)


@later
def put(path: str, content: str | bytes | None) -> None:
    """As a new file (None: no file): the old one is a hard link that all rows share."""
    Path(path).unlink(missing_ok=True)
    if content is not None:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


@later
def folder_at(path: str) -> None:
    Path(path).unlink(missing_ok=True)
    Path(path).mkdir()


@later
def altered(path: str, change: Callable[[bytes], bytes]) -> None:
    put(path, change(Path(path).read_bytes()))()


lose = functools.partial(put, content=None)
halved = functools.partial(altered, change=lambda content: content[: len(content) // 2])
flipped = functools.partial(altered, change=lambda content: content[:-1] + bytes([content[-1] ^ 1]))


@later
def keys(path: str, within: str = "", **changes: object) -> None:
    """Keys of a JSON object, or of one in it, set or taken out (`...`)."""
    content = json.loads(Path(path).read_text())
    part = content[within] if within else content
    part.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del part[key]
    put(path, json.dumps(content))()


@later
def table(**columns: object) -> None:
    Path("data.parquet").unlink(missing_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), "data.parquet")


VALUES = """rollout.group_size=1 rollout.group_size=16.0 rollout.questions_per_step=0 rollout.max_draws=101
    rollout.max_new_tokens=1048577 rollout.max_new_tokens=0 rollout.temperature=0 rollout.top_p=0 rollout.top_p=1.01
    rollout.top_k=-1 rollout.max_rows=-1 train.learning_rate=1e400 train.learning_rate=nan train.steps=1000000
    train.seed=4294967296 train.seed=-1 train.warmup_steps=few train.schedule=linear train.weight_decay=-0.1
    train.optimizer=adam train.beta1=1 train.beta2=nan train.beta2=-0.1 train.max_grad_norm=inf train.divide_by_std=1
    train.objective=ppo train.updates_per_batch=0 train.clip_low=2 train.clip_high=0 train.ratio_cap=-2 train.shard=no
    train.divide_loss_by=token train.truncated=drop train.penalty_tokens=0 train.tokens_per_microbatch=8k
    train.activation_checkpointing=off train.max_skips=0 train.threads=-2 model.path= model.revision=[main]
    model.device=gpu model.dtype=float16 data.task=../run data.path=null data.path={} data.revision={} data.held_out=0
    data.fewest_numbers=1 data.fewest_numbers=7 data.most_numbers=7 data.most_numbers=1 data.target_low=low
    data.target_low=0 data.target_high=1.5 eval.every=-1 checkpoint.every=-5 checkpoint.keep=0 output.folder=
    output.samples=two"""
LONG = "x" * 300
HOSTILE_NAME = "a\x1b[2J\x1b]0;owned\x07\u202e\r\n\u2028train.py: all is well"  # hides an error, or forges another
nothing = Mock()  # is wrong with a file
EVERY_SETTING = settings(SECTIONS | {"data": Settings}).keys()
TABLE = [  # damage, arguments, words
    # the config, and overrides; test_config.py has the rest
    *[(put("config.yml", content), [], f"config.yml {words}") for content, words in {
        "": "rollout:", "train:\n  learning_rat: 3\n": "train.learning_rat train.learning_rate?",
        b"model:\n  path: caf\xe9\n": "utf-8", "model:\n  path: !!python/object/apply:os.getcwd []\n": "model.path",
        CONFIG.replace("path: model, ", ""): "model.path missing", "eval: {every: 3\n": "line 2",
        CONFIG.replace("threads: 1", "optimizer: split"): "train.optimizer split model.dtype"}.items()],
    (nothing, ["rollout.group_size"], "rollout.group_size section.key=value"), (nothing, ["data.path=[3"], "YAML"),
    (nothing, ["group_size=16"], "group_size=16 rollout.group_size?"),
    *[(nothing, [override], override.replace("=", " ")) for override in VALUES.split()],
    # the command line
    *[(nothing, ["--config", path], path) for path in ("absent.yml", "model", "notes/c.yml", "data.parquet", LONG)],
    *[(nothing, ["--name", name, "output.folder=none"], name) for name in ("../other", ".", "..", "/other", "a/b")],
    (nothing, ["--name", LONG], LONG),
    (nothing, ["--name", "old"], "runs/old --name --resume"),
    (nothing, ["--name", "notes", "output.folder=."], "notes --name"),
    (nothing, ["--name", "new", "output.folder=notes"], "notes/new"),
    *[(nothing, ["--resume", name], name) for name in ("runs/none", "none", "notes", ".", "model", LONG)],
    (nothing, ["--resume", "latest", "output.folder=none"], "latest none output.folder"),
    *[(nothing, [f"model.device={device}"], f"model.device {device} cpu") for device in ("cuda", "cuda:9", "mps")],
    # "(owner/name)": a typing error is not asked of the hub
    *[(nothing, [f"{part}.path={path}"], f"{path} {part}.path (owner/name)") for part in ("model", "data")
      for path in ("none", "/none", "../no", "a/b/c", LONG)],
    *[(nothing, [f'{part}.path="a\\0b"'], f"a\\x00b: {part}.path (owner/name)") for part in ("model", "data")],
    (nothing, [f"model.path={WEIGHTS}"], f"{WEIGHTS} model.path (owner/name)"),
    *[(nothing, [f"data.path={path}"], f"{path} data.path") for path in ("no/such.parquet", "/dev/null")],
    *[(nothing, [f"{part}.path=no/such"], f"no/such hub {part}.path") for part in ("model", "data")],
    (nothing, ["rollout.max_new_tokens=1024"], "model rollout.max_new_tokens 1024"),
    *[(nothing, [*before, HOSTILE_NAME], "all is well") for before in (["--config"], ["--resume"], ["--name"], [])],
    *[(nothing, [f"{name}={HOSTILE_NAME}"], name) for name in ("model.path", "data.path", "train.schedule", "train.x")],
    # the run to resume
    *[(damage(f"{OLD}/config.yml"), ["--resume", OLD], OLD) for damage in (lose, halved)],
    *[(nothing, ["--resume", OLD, change], change.replace("=", " ")) for change in (
        "model.path=tiny", "model.dtype=bfloat16", "data.held_out=5", "data.fewest_numbers=3", "train.seed=2",
        "train.optimizer=offload", "train.steps=1")],
    *[(damage(f"{NEWEST}/{file}"), ["--resume", OLD], f"{NEWEST} {file}") for damage in (lose, flipped) for file in (
        "state.json", "config.json", "tokenizer.json", "model.safetensors", "optimizer.safetensors")],
    # train.steps=3 would show in a config.yml that was written before the files were looked at
    *[(damage(f"{OLD}/{file}"), ["--resume", OLD, "train.steps=3"], f"{OLD} {file}")
      for damage in (lose, halved) for file in ("metrics.jsonl", "samples.jsonl")],
    *[(damage, ["--resume", OLD], f"{OLD}/checkpoints/step-000003") for damage in (
        put(f"{OLD}/checkpoints/step-000003", ""), folder_at(f"{OLD}/checkpoints/step-000003"))],
    # the model; test_model_folder.py has the rest
    *[(damage(path), [], path) for path in (CONFIG_JSON, BPE, SETTING) for damage in (lose, folder_at, halved)],
    *[(put(path, text), [], path) for path in (CONFIG_JSON, BPE, SETTING) for text in ("", "[]", b"\xff", "[" * 10**5)],
    (keys(CONFIG_JSON, vocab_size=10**400), [], f"{CONFIG_JSON} vocab_size"),
    *[(damage(WEIGHTS), [], f"{WEIGHTS}: ") for damage in (folder_at, halved)], (lose(WEIGHTS), [], "model missing"),
    # the tokenizer; test_tokenizer.py has the rest
    (keys(BPE, "model", vocab={"a": 5000}, merges=[]), [], "tokenizer 5001 388"),
    *[(keys(SETTING, chat_template=value), [], "model chat template") for value in (..., "{% if x %}", "{{ 1 / 0 }}")],
    (keys(SETTING, chat_template="{{ messages[0].content * 200 }}"), [], "model rollout.max_new_tokens"),
    (folder_at(TEMPLATE), [], TEMPLATE), (keys(GENERATION, eos_token_id=496), [], f"{GENERATION} eos_token_id"),
    (lambda: (keys(SETTING, eos_token=...)(), lose(GENERATION)()), [], "model eos_token"),
    # the data; test_countdown_task.py has the rest
    (halved("data.parquet"), [], "data.parquet nums target"), (folder_at("data.parquet"), [], "data.parquet holds no"),
    (put("model/problems.parquet", ""), ["data.path=model"], "model/problems.parquet"),  # there is a good one besides
    (table(nums=[[3, math.nan]], target=[10]), [], "data.parquet nums target row 0"),
    (nothing, ["data.path="], "data.path missing"),
    (nothing, ["data.target_low=20", "data.target_high=15"], "data.parquet data.target_high"),
]  # fmt: skip
NEW = ["--config", "config.yml"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder to train in, with a run that has been trained there."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "tiny", folder / "model")
    (folder / "notes").write_text("a file")
    (folder / "config.yml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        table(nums=[[3, 7, n] for n in range(1, 21)], target=list(range(11, 31)))()
        assert train.main([*NEW, "--name", "old"]) == 0
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, offline, on a machine that has only a CPU."""
    shutil.copytree(trained, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def files_in(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What tells a file from its copy, its successor and itself with another content."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns) if path.is_file() else () for path, s in stats.items()}


def dangerous(text: str) -> str:
    """Control and format characters, surrogates, private and unassigned ones, separators of lines."""
    return "".join(c for c in text if unicodedata.category(c) in "Cc Cf Cs Co Cn Zl Zp" and c != "\n")


def refused(arguments: list[str], words: str, folder: Path, capfd) -> bool:
    """Whether train.py says one harmless line with these words, and leaves no trace; capfd sees the libraries' too."""
    before = files_in(folder)
    assert train.main(arguments if {"--config", "--resume"} & {*arguments} else [*NEW, *arguments]) == 2
    line = capfd.readouterr().err
    assert line.startswith("train.py: ")
    assert [word for word in words.split() if word not in line] == [], line
    return line.endswith("\n") and (line.count("\n"), dangerous(line), files_in(folder)) == (1, "", before)


@pytest.mark.parametrize("row", TABLE, ids=[ascii(" ".join([*row[1], row[2]]))[1:60] for row in TABLE])
def test_bad_input_gets_one_line_and_leaves_no_trace(row, workplace, capfd, recwarn):
    damage, arguments, words = row
    damage()
    assert refused(arguments, words, workplace, capfd)
    shown = (UserWarning, RuntimeWarning, FutureWarning)  # Python does not hide them: further lines for a person
    assert not [str(warning) for warning in recwarn if issubclass(warning.category, shown)]


def test_every_setting_has_a_row():
    assert {argument.partition("=")[0] for _, arguments, _ in TABLE for argument in arguments} >= EVERY_SETTING


@pytest.mark.parametrize("arguments", [[*NEW, "--resume", OLD], ["--resume", OLD, "--name", "new"]])
def test_a_run_is_either_new_or_resumed(arguments, workplace, capfd):
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert end.value.code == 2
    assert "--resume" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("free", "overrides", "words"), [
    (0.5, [], "0.5 train.activation_checkpointing=true"),
    (0.5, ["train.activation_checkpointing=true"], "0.5 train."),
    (70, [], "the weights are next"),
])  # fmt: skip
def test_a_run_must_fit_into_the_memory_that_is_free(free, overrides, words, workplace, monkeypatch, capfd):
    """Others may use the card too: its total says nothing. Else it ends in the first update, after minutes."""
    for name, value in {"is_available": True, "device_count": 1, "set_device": None, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", Mock())
    monkeypatch.setattr("run.load_model", Mock(side_effect=train.UserError("the weights are next")))
    assert refused(["model.device=cuda", *overrides], words, workplace, capfd)


ALL = "".join(map(chr, [sys.maxunicode, 0xF0000, *range(0xE01FF, 0xDFFFF, -1), *range(0x1FFFF, -1, -1)]))
HARMLESS = "".join(c for c in ALL if not dangerous(c) and unicodedata.category(c) != "Zs")
HOSTILE = [
    ALL, HARMLESS, "x" * 200_000, "\0" * 9999, "", "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\x90q\x9c", "sí, 是, 😀",
    "<script>alert(1)</script>", "</pre><img src=x onerror=alert(1)>", "&lt;script&gt;&#60;b&#62;", "%s {0} \\x1b[31m",
    "' onmouseover='alert(1)' \" onclick=\"alert(1)", "[click](javascript:alert(1)) ```\n# big\n```",
    "half \ud800 and \udfff", "\u202edlrow\u2066\u200f\u061c", "\r\tback \b\b",
]  # fmt: skip


def test_hostile_responses_do_no_harm_wherever_they_are_shown(workplace, monkeypatch, capfd):
    """`cat samples.jsonl` must not clear the screen, nor TensorBoard run a script; and nothing is lost.

    The loss is nan, so that the batch is written out too: half a surrogate pair ended the run there.
    """
    stats = dict.fromkeys(("loss", "entropy", "approx_kl", "logprob_gap", "clip_fraction"), math.nan)
    monkeypatch.setattr("grpo.accumulate_gradient", Mock(return_value=stats))
    monkeypatch.setattr(Tokenizer, "decode", Mock(side_effect=HOSTILE * 2))
    settings = ["train.steps=1", "data.held_out=1", "rollout.group_size=16", "output.samples=16"]
    assert train.main([*NEW, "--name", "new", *settings]) == 0
    run, said = Path("runs/new"), "".join(capfd.readouterr())
    lines = (run / "samples.jsonl").read_bytes().splitlines()
    assert dangerous(said + "".join(line.decode("ascii") for line in lines)) == ""
    assert len(said) < 5000
    samples = [json.loads(line) for line in lines]
    assert sorted(sample["response"] for sample in samples) == sorted(ASSISTANT_PREFIX + text for text in HOSTILE)
    evidence = (run / "skipped" / "step-000001.json").read_bytes()
    assert evidence.isascii()
    assert sorted(episode["text"] for episode in json.loads(evidence)) == sorted(HOSTILE)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={TENSORS: 0}).Reload()
    shown = [e.tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"] for e in events.Tensors(tag)]
    for text in shown:
        assert re.findall("<[^>]*>?", text) == ["<pre>", "</pre>"], "the only tags are ours"
        assert not set("'\"") & set(text)
    plain = [html.unescape(text) for text in shown]
    assert all(any(printable(sample["response"]) in text for text in plain) for sample in samples)
    assert any(HARMLESS in text for text in plain), "what harms nobody stays as it is"
    groups = {tag.partition("/")[0] for tag in events.Tags()["scalars"]}
    assert groups == {"rollout", "reward", "update", "eval", "time"}
