"""Bad input as a person meets it: train.py says one line, exits with 2, and no file has changed. And hostile text."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import unicodedata
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pandas
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from countdown_task import ASSISTANT_PREFIX, Settings, load_problems
from plumbing.model_folder import load_model, read_model_config
from plumbing.run import free_cores
from plumbing.terminal import UserError
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
FOLDER, HALVED = object(), object()  # in the place of a file, a half of it


def change_files(changes: dict[str, object]) -> None:
    """Path to new content: bytes, text, a function of the old content, HALVED, FOLDER, or None for no file."""
    for path, change in changes.items():
        content = Path(path).read_bytes() if Path(path).is_file() else b""
        Path(path).unlink(missing_ok=True)  # a hard link that all rows share
        Path(path).parent.mkdir(exist_ok=True)
        new = change(content) if callable(change) else content[: len(content) // 2] if change is HALVED else change
        if new is FOLDER:
            Path(path).mkdir()
        elif new is not None:
            Path(path).write_bytes(new.encode() if isinstance(new, str) else new)


def keys(content: bytes, **changes: object) -> str:  # set, or taken out (`...`)
    return json.dumps({key: value for key, value in (json.loads(content) | changes).items() if value is not ...})


def table(numbers: list[list[float]]) -> bytes:
    return pandas.DataFrame({"nums": numbers, "target": range(11, 11 + len(numbers))}).to_parquet()


LONG = "x" * 300
HOSTILE_NAME = "a\x1b[2J\x1b]0;owned\x07\u202e\r\n\u2028train.py: all is well"  # hides an error, or forges another
TABLE = [  # changes of files, arguments of train.py, words (file, key, value) that the line must hold
    # the config, and overrides; test_config.py has the rest
    *[({"config.yml": content}, [], f"config.yml {words}") for content, words in (
        ("", ""), ("train:\n  learning_rat: 3\n", "train.learning_rat"), ("eval: {every: 3\n", "line 2"))],
    *[({"config.yml": CONFIG.replace("path: model", path)}, [], "model.path") for path in (
        "revision: main", "path: !!python/object/apply:os.getcwd []")],
    *[({}, [override], override.replace("=", " ")) for override in (
        "rollout.group_size", "rollout.group_siz=", "rollout.group_size=1", "train.optimizer=split", "data.path=[3")],
    # the command line
    *[({}, ["--config", path], path) for path in ("absent.yml", "model", "notes/c.yml", "data.parquet", LONG)],
    ({}, ["--name", LONG], LONG), ({}, ["--name", "old"], "runs/old --name --resume"),
    ({}, ["--name", "notes", "output.folder=."], "notes --name"), ({}, ["--resume", OLD, "--name", "x"], "--name"),
    *[({}, ["--resume", name], name) for name in ("runs/none", "none", "notes", "model", LONG)],
    *[({}, [f"model.device={device}"], f"model.device {device} cpu") for device in ("cuda", "cuda:9")],
    ({}, ["model.path=no/such", "model.device=cuda"], "model.device cuda"),  # before gigabytes are fetched
    ({}, ["model.path=no/such", "data.path=no/such"], "data.path"),
    # "(owner/name)": a typing error is not asked of the hub
    *[({}, [f"{part}.path={path}"], f"{path} {part}.path (owner/name)") for part in ("model", "data")
      for path in ("none", "/none", "../no", "a/b/c", LONG)],
    *[({}, [f'{part}.path="a\\0b"'], f"a\\x00b: {part}.path (owner/name)") for part in ("model", "data")],
    ({}, [f"model.path={WEIGHTS}"], f"{WEIGHTS} model.path (owner/name)"),
    *[({}, [f"data.path={path}"], f"{path} data.path") for path in ("no/such.parquet", "/dev/null")],
    *[({}, [f"{part}.path=no/such"], f"no/such hub {part}.path") for part in ("model", "data")],
    ({}, ["rollout.max_new_tokens=1024"], "model rollout.max_new_tokens 1024"),
    *[({}, [*before, HOSTILE_NAME], "all is well") for before in (["--config"], ["--resume"], [])],
    *[({}, [f"{name}={HOSTILE_NAME}"], name) for name in ("model.path", "data.path", "train.schedule", "train.x")],
    # the run to resume; test_resume.py has the rest
    *[({f"{OLD}/config.yml": change}, ["--resume", OLD], OLD) for change in (None, "train: {")],
    *[({}, ["--resume", OLD, change], change.replace("=", " ")) for change in (
        "model.path=tiny", "model.dtype=bfloat16", "train.seed=2", "train.optimizer=offload")],
    ({}, ["--resume", OLD, "data.held_out=5"], "data.parquet problems"),
    *[({f"{NEWEST}/{WEIGHTS[6:]}": change}, ["--resume", OLD], NEWEST) for change in (None, lambda c: c[:-1] + b" ")],
    ({f"runs/none/{file}": CONFIG for file in ("config.yml", "metrics.jsonl", "lock")}, ["--resume", "none"], "none"),
    ({"data.parquet": table([[3, 7, n] for n in range(1, 9)])}, ["--resume", OLD], "data.parquet"),
    *[({f"{OLD}/checkpoints/step-000003": change}, ["--resume", OLD], "step-000003") for change in ("", FOLDER)],
    # model, tokenizer and data; their own tests have the rest
    *[({path: change}, [], path) for path in (CONFIG_JSON, BPE, SETTING)
      for change in (None, FOLDER, HALVED, "", "[]", b"\xff", "[" * 10**5)],
    ({CONFIG_JSON: partial(keys, vocab_size=10**400)}, [], f"{CONFIG_JSON} vocab_size"),
    *[({WEIGHTS: change}, [], f"{WEIGHTS}: ") for change in (FOLDER, HALVED)], ({WEIGHTS: None}, [], "model convert"),
    ({BPE: partial(keys, model={"type": "BPE", "vocab": {"a": 5000}, "merges": []})}, [], "tokenizer 5001 388"),
    *[({SETTING: partial(keys, chat_template=value)}, [], "chat template") for value in (..., "{% if", "{{ 1/0 }}")],
    ({SETTING: partial(keys, chat_template="{{ messages[0].content * 200 }}")}, [], "model rollout.max_new_tokens"),
    ({TEMPLATE: FOLDER}, [], TEMPLATE), ({GENERATION: partial(keys, eos_token_id=496)}, [], "model eos_token_id 496"),
    ({CONFIG_JSON: partial(keys, eos_token_id=[388])}, [], "model eos_token_id config.json 388"),
    # what looks like a path is one; an adapter; a setting of the data that fits no file
    ({}, ["model.path=runs/ol"], "runs/ol model.path (owner/name)"),
    ({"model/adapter_config.json": "{}"}, [], "model adapter_config.json merge_and_unload"),
    ({"more/a.parquet": lambda _: table([[3, 7]])}, ["data.path=more", "data.files=test-*"], "data.path=more"),
    ({SETTING: partial(keys, eos_token=..., chat_template="{{ messages[0].content }}"), GENERATION: None,
      CONFIG_JSON: partial(keys, eos_token_id=None)}, [], "model eos_token"),
    ({"data.parquet": HALVED}, [], "data.parquet"), ({"data.parquet": FOLDER}, [], "data.parquet"),
    ({"model/problems.parquet": ""}, ["data.path=model"], "model/problems.parquet"),
    ({"data.parquet": table([[3, math.nan]])}, [], "data.parquet nums target"),
    ({}, ["data.path="], "data.path"), ({}, ["data.target_high=1"], "data.parquet target_high"),
]  # fmt: skip
NEW = ["--config", "config.yml"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder to train in, with a run that has been trained there."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "tiny", folder / "model")
    (folder / "notes").write_text("a file")
    (folder / "runs" / "none").mkdir(parents=True)
    (folder / "config.yml").write_text(CONFIG)
    (folder / "data.parquet").write_bytes(table([[3, 7, n] for n in range(1, 21)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*NEW, "--name", "old"]) == 0
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, offline, on a machine that has only a CPU."""
    shutil.copytree(trained, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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


def check_refusal(arguments: list[str], words: str, folder: Path, capfd) -> None:
    """train.py says one harmless line with these words, and leaves no trace; capfd sees the libraries' lines too."""
    before = files_in(folder)
    assert train.main(arguments if {"--config", "--resume"} & {*arguments} else [*NEW, *arguments]) == 2
    line = capfd.readouterr().err
    assert [word for word in ["train.py: ", *words.split()] if word not in line] == [], line
    assert (line[-1], line.count("\n"), dangerous(line), files_in(folder)) == ("\n", 1, "", before)


@pytest.mark.parametrize("row", TABLE, ids=[ascii(" ".join([*row[1], row[2]]))[1:60] for row in TABLE])
def test_bad_input_gets_one_line_and_leaves_no_trace(row, workplace, capfd, recwarn):
    changes, arguments, words = row
    change_files(changes)
    check_refusal(arguments, words, workplace, capfd)
    shown = (UserWarning, RuntimeWarning, FutureWarning)  # Python does not hide them: further lines for a person
    assert not [str(warning) for warning in recwarn if issubclass(warning.category, shown)]


@pytest.mark.parametrize("arguments", [[], ["my.yml"], ["--name", "x", "train.steps=3"], [*NEW, "--resume", OLD]])
def test_a_run_is_either_new_or_resumed(arguments, workplace, capfd):
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert end.value.code == 2
    assert re.search("--config.*--resume|--resume.*--config", capfd.readouterr().err.splitlines()[-1])


LAUNCHED = [  # the environment, what the line must say; nothing: one process that trains and writes
    ({"WORLD_SIZE": "2"}, "RANK torchrun WORLD_SIZE"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR torchrun"),
    ({}, "fcntl Linux macOS WSL"),  # as on Windows
    ({"WORLD_SIZE": "two"}, "torchrun"), ({"RANK": "1"}, ""), ({"LOCAL_WORLD_SIZE": "0", "RANK": "3"}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "words"), LAUNCHED, ids=str)
def test_half_a_launcher_or_another_system_is_one_line_or_one_process(variables, words, workplace, monkeypatch, capfd):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not variables:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.delattr(signal, "SIGHUP")
    if words:
        return check_refusal([], words, workplace, capfd)
    assert train.main([*NEW, "--name", "new", "train.steps=1"]) == 0
    assert (Path("runs/new/metrics.jsonl").is_file(), "step 1/1" in capfd.readouterr().out) == (True, True)


def test_threads_are_as_many_as_cores_are_free(monkeypatch):
    """Beside other work, a thread that waited for its core made the demo five times slower than one thread."""
    for cores, load, allowed, quota, threads in ((8, 0.2, 4, "max 100000", 4), (64, 0.0, 64, "max 100000", 8),
            (8, 5.9, 64, "", 2), (64, 0, 3, "", 3), (64, 90, 64, "", 1), (64, 0, 64, "250000 100000", 2)):  # fmt: skip
        for name, value in {
            "cpu_count": cores,
            "getloadavg": (load, 0, 0),
            "sched_getaffinity": range(allowed),
        }.items():
            monkeypatch.setattr(os, name, Mock(return_value=value))
        monkeypatch.setattr(Path, "read_text", Mock(return_value=quota))
        assert free_cores() == threads


@pytest.mark.parametrize(("free", "words"), [(0.5, "0.5 train.activation_checkpointing"), (70, "weights are next")])
def test_a_run_must_fit_into_the_memory_that_is_free(free, words, workplace, monkeypatch, capfd):
    """Others may use the card too: its total says nothing. Else it ends in the first update, after minutes."""
    values = {"is_available": True, "device_count": 1, "set_device": None, "is_bf16_supported": True}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", Mock())
    monkeypatch.setattr("plumbing.model_folder.load_model", Mock(side_effect=UserError("the weights are next")))
    check_refusal(["model.device=cuda"], words, workplace, capfd)


READERS = {  # of a file
    WEIGHTS: lambda: load_model("model", torch.device("cpu"), torch.float32), SETTING: lambda: Tokenizer("model"),
    CONFIG_JSON: lambda: read_model_config("model"), BPE: lambda: Tokenizer("model").encode("12 <|im_end|> e\u0301"),
    "data.parquet": lambda: load_problems(Settings(path="data.parquet")),
}  # fmt: skip


@pytest.mark.parametrize("path", READERS)
def test_damaged_bytes_never_end_in_a_traceback(path, workplace):
    """Flipped, lost, or in JSON replaced by another value: what is read makes sense, or one line names the file."""
    content, rng, lines = Path(path).read_bytes(), random.Random(path), []
    places = [match.span() for match in re.finditer(rb'"[^"]*"|\d+|true|false|null', content[:5000])]
    for attempt in range(60):
        damaged, (start, end) = bytearray(content), rng.choice(places)
        if attempt % 2 and path.endswith(".json"):
            damaged[start:end] = rng.choice(b'null -1 1e9 9999999999999999999999 "" [] {} true "((("'.split())
        for _ in range(0 if attempt % 2 else 3):
            damaged[int(len(content) * rng.random() ** rng.choice((1, 9)))] ^= 1 << rng.randrange(8)  # often the header
        change_files({path: bytes(damaged if attempt % 10 else damaged[: rng.randrange(len(content))])})
        try:
            READERS[path]()
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 10
    assert all(path.partition("/")[0] in line and len(line) < 1000 for line in lines)


ALL = "".join(map(chr, [sys.maxunicode, 0xF0000, *range(0xE01FF, 0xDFFFF, -1), *range(0x1FFFF, -1, -1)]))
HARMLESS = "".join(c for c in ALL if not dangerous(c) and unicodedata.category(c) != "Zs")
HOSTILE = [
    ALL, HARMLESS, "x" * 200_000, "\0" * 9999, "", "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\x90q\x9c", "sí, 是, 😀",
    "<script>alert(1)</script>", "%s {0} \\x1b[31m", "[click](javascript:alert(1)) ```\n# big\n```",
    "half \ud800 and \udfff", "\u202edlrow\u2066\u200f\u061c", "\r\tback \b\b",
]  # fmt: skip


def test_hostile_responses_do_no_harm_to_a_terminal_and_none_is_lost(workplace, monkeypatch, capfd):
    monkeypatch.setattr(Tokenizer, "decode", Mock(side_effect=["the end"] * 2 + HOSTILE[:2] + HOSTILE * 2))
    settings = ["train.steps=1", "data.held_out=1", f"rollout.group_size={len(HOSTILE)}", "output.samples=99"]
    assert train.main([*NEW, "--name", "new", *settings]) == 0
    run, said = Path("runs/new"), "".join(capfd.readouterr())
    lines = (run / "samples.jsonl").read_bytes().splitlines()
    assert dangerous(said + "".join(line.decode("ascii") for line in lines)) == ""
    assert len(said) < 5000
    assert [json.loads(line)["response"] for line in lines] == [ASSISTANT_PREFIX + text for text in HOSTILE]
    assert not EventAccumulator(str(run / "tensorboard")).Reload().Tags()["tensors"]  # it shows no texts
