"""Bad input as a person meets it: train.py says one line, exits with 2, and no file has changed.

A table of mistakes, by the place where they sit: config file, overrides, command line, checkpoint to resume, model,
tokenizer, data. Each row begins with a workplace that trains (a config, a copy of tiny/, a few problems, a finished
run), damages one thing in it, and starts train.py there. Paths are relative, so the messages stand here in full;
`…` in one is a part that comes from a library, a figure, or most of a list of tensors.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from checkpoint import text_checksum
from data_types import MOST_CHARACTERS, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """\
rollout: {max_new_tokens: 4, group_size: 2, questions_per_step: 1}
train: {learning_rate: 1e-4, steps: 2, threads: 1}
model: {path: model, device: cpu}
data: {path: data.parquet, held_out: 4}
eval: {size: 4}
checkpoint: {every: 1}
"""
Damage = Callable[[], object]


class Row(NamedTuple):
    name: str
    damage: Damage  # done in the workplace
    arguments: Sequence[str]  # of train.py, after --config config.yml
    message: str


# ------------------------------------------------------------------------------------------ ways to damage a file


def put(path: str, content: str | bytes | None) -> Damage:
    """Another content. As a new file: the old one is a hard link that all rows share."""
    def damage() -> None:
        lose(path)()
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def lose(path: str) -> Damage:
    return lambda: Path(path).unlink(missing_ok=True)


def nothing() -> None:
    """For what is wrong on the command line."""


def folder_at(path: str) -> Damage:
    return lambda: (lose(path)(), Path(path).mkdir())


def altered(path: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda: put(path, change(Path(path).read_bytes()))()


def flipped(content: bytes) -> bytes:
    """One bit in the middle."""
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


def edited(path: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """`change` has been at the JSON object in a file."""
    def damage() -> None:
        content = json.loads(Path(path).read_text())
        change(content)
        put(path, json.dumps(content))()

    return damage


def keys(path: str, **changes: object) -> Damage:
    """Keys of a JSON object set, or taken out (`...`)."""
    return edited(path, lambda content: [content.pop(key, None) if value is ... else content.update({key: value})
                                         for key, value in changes.items()])


WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """`change` has been at the model's tensors."""
    def damage() -> None:
        content = load_file(WEIGHTS)
        change(content)
        lose(WEIGHTS)()
        save_file(content, WEIGHTS)

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """`change` has been at the header of the weights: eight bytes of length, JSON, then the numbers."""
    def rewritten(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:end])
        change(table)
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return altered(WEIGHTS, rewritten)


def shards(change: Callable[[], object] = nothing) -> Damage:
    """The weights in two files and an index; then `change`."""
    def damage() -> None:
        content = load_file(WEIGHTS)
        lose(WEIGHTS)()
        parts = {f"{part}.safetensors": sorted(content)[part::2] for part in (0, 1)}
        for file, names in parts.items():
            save_file({name: content[name] for name in names}, f"model/{file}")
        weight_map = {name: file for file, names in parts.items() for name in names}
        put(INDEX, json.dumps({"weight_map": weight_map}))()
        change()

    return damage


def problems(nums: object, target: object, path: str = "data.parquet") -> Damage:
    def damage() -> None:
        lose(path)()
        Path(path).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"nums": nums, "target": target}), path)

    return damage


def columns(**content: object) -> Damage:
    return lambda: (lose("data.parquet")(), pyarrow.parquet.write_table(pyarrow.table(content), "data.parquet"))


# ------------------------------------------------------------------------------------------------ the config file

SECTIONS = "rollout, train, model, data, eval, checkpoint, output"
MUST_HOLD = "it must hold sections such as rollout and train"
MUST_HAVE_LINES = "it must hold lines such as `key: value`"
KNOWN_EVAL = "known are eval.every, eval.size, eval.temperature"
REFUSED = "bad YAML: anchors and tags are refused"
COUNT_0, COUNT_1 = (f"a whole number, at least {least}" for least in range(2))
GROUP = "a whole number, at least 2 and at most 65536"
TOKENS = f"{COUNT_1} and at most 1048576"
THREADS = f"{COUNT_0} and at most 1024"
POSITIVE = "a number, above 0"


CONFIG_FILES = [  # content, message
    ("", f"config.yml: the file is empty; {MUST_HOLD}"),
    ("null\n", f"config.yml: the file is null; {MUST_HOLD}"),
    ("train\n", f"config.yml: the file is train; {MUST_HOLD}"),
    ("- train\n- 3\n", f"config.yml: the file is ['train', '3']; {MUST_HOLD}"),
    ("rolout: {}\n", "config.yml: unknown section 'rolout'; did you mean rollout?"),
    ("Train:\n  steps: 3\n", "config.yml: unknown section 'Train'; did you mean train?"),
    ("learning_rate: 3\n", "config.yml: unknown section 'learning_rate'; did you mean train.learning_rate?"),
    ("wandb: {}\n", f"config.yml: unknown section 'wandb'; known are {SECTIONS}"),
    ("train: 3\n", f"config.yml: train is 3; {MUST_HAVE_LINES}"),
    ("model: tiny\n", f"config.yml: model is tiny; {MUST_HAVE_LINES}"),
    ("data: [path, held_out]\n", f"config.yml: data is ['path', 'held_out']; {MUST_HAVE_LINES}"),
    ("train:\n  learning_rat: 3\n", "config.yml: unknown key 'train.learning_rat'; did you mean train.learning_rate?"),
    ("train:\n  group_size: 3\n", "config.yml: unknown key 'train.group_size'; did you mean rollout.group_size?"),
    ("eval:\n  often: yes\n", f"config.yml: unknown key 'eval.often'; {KNOWN_EVAL}"),
    ("eval:\n  <<: {size: 3}\n", f"config.yml: unknown key 'eval.<<'; {KNOWN_EVAL}"),
    ("eval:\n  size: 3\n  size: 4\n", "config.yml, line 3: bad YAML: size is given twice"),
    ("eval: {}\nmodel: {}\neval: {}\n", "config.yml, line 3: bad YAML: eval is given twice"),
    ("eval:\n\tsize: 3\n", "config.yml, line 2: bad YAML: found character '\\t' that cannot start any token"),
    ("eval:\n  size: 3\n every: 1\n",
     "config.yml, line 3: bad YAML: expected <block end>, but found '<block mapping start>'"),
    ("data:\n  path: a: b\n", "config.yml, line 2: bad YAML: mapping values are not allowed here"),
    ("eval: {size: 3\n", "config.yml, line 2: bad YAML: expected ',' or '}', but got '<stream end>'"),
    ("model:\n  path: 'tiny\n", "config.yml, line 3: bad YAML: found unexpected end of stream"),
    ("model:\n  path: @tiny\n", "config.yml, line 2: bad YAML: found character '@' that cannot start any token"),
    ("eval: {}\n---\nmodel: {}\n", "config.yml, line 2: bad YAML: but found another document"),
    ("eval: &all\n  size: 3\n", f"config.yml, line 1: {REFUSED}"),
    ("model:\n  path: *tiny\n", f"config.yml, line 2: {REFUSED}"),
    ("model:\n  x: 1\n  path: !!python/object/apply:os.getcwd []\n", f"config.yml, line 3: {REFUSED}"),
    ('model: {path: "\\UFFFFFFFF"}\n', "config.yml: bad YAML: Python int too large to convert to C int"),
    ("[" * 60_000, "config.yml: bad YAML: maximum recursion depth exceeded…"),
    ("#" * (MOST_CHARACTERS + 1), "config.yml: longer than 65536 characters; this is no config"),
    (b"\0\1\2", "config.yml: bad YAML: unacceptable character #x0000: special characters are not allowed"),
    (b"model:\n  path: caf\xe9\n", "cannot read the config 'config.yml': 'utf-8' codec can't decode byte 0xe9…"),
    (CONFIG.encode("utf-16"), "cannot read the config 'config.yml': 'utf-8' codec can't decode byte 0xff…"),
    (CONFIG.replace("steps: 2", "steps: 1.5"),
     "config.yml: train.steps is 1.5; it must be a whole number, at least 1 and at most 999999"),
    (CONFIG.replace("1e-4", "fast"), f"config.yml: train.learning_rate is fast; it must be {POSITIVE}"),
    (CONFIG.replace("1e-4", ".nan"), f"config.yml: train.learning_rate is .nan; it must be {POSITIVE}"),
    (CONFIG.replace("group_size: 2", "group_size: 1"),
     f"config.yml: rollout.group_size is 1; it must be {GROUP}"),
    (CONFIG.replace("group_size: 2", "group_size:"), f"config.yml: rollout.group_size is empty; it must be {GROUP}"),
    (CONFIG.replace("eval: {size: 4", "eval: {size: 5"),
     "config.yml: eval.size is 5; it must be at most data.held_out, which is 4"),
    (CONFIG.replace("threads: 1", "optimizer: split"),
     "config.yml: train.optimizer split is for model.dtype bfloat16; fp32 weights need master"),
    (CONFIG.replace("max_new_tokens: 4, ", ""),
     f"config.yml: rollout.max_new_tokens is missing: an answer is cut off there, in tokens ({TOKENS})"),
    (CONFIG.replace("learning_rate: 1e-4, ", ""),
     f"config.yml: train.learning_rate is missing: the step size of AdamW ({POSITIVE})"),
    (CONFIG.replace("steps: 2, ", ""),
     "config.yml: train.steps is missing: training steps: a rollout and an update each "
     f"({COUNT_1} and at most 999999)"),
    (CONFIG.replace("path: model, ", ""),
     "config.yml: model.path is missing: a folder or hub id of a Qwen2.5 model (text)"),
    (CONFIG.replace("path: data.parquet, ", ""),
     "config.yml: data.path is missing: a folder or hub id of a data set with the columns nums and target (text)"),
]

# ------------------------------------------------------------------------------------------------------ overrides

HOW = "write it as section.key=value, such as rollout.group_size=16"
OVERRIDES = [  # override, message after "in the override `...`: "
    ("rollout.group_size", HOW),
    ("group_size=16", HOW),
    ("=16", HOW),
    ("train.learningrate=1", "unknown key 'train.learningrate'; did you mean train.learning_rate?"),
    ("rolout.group_size=4", "unknown key 'rolout.group_size'; did you mean rollout.group_size?"),
    (".=16", f"unknown key '.'; known are {SECTIONS}"),
    ("eval.on=1", f"unknown key 'eval.on'; {KNOWN_EVAL}"),
    ("data.number_counts=[3", "bad YAML: expected ',' or ']', but got '<stream end>'"),
    ("data.number_counts=*all", REFUSED),
    ("data.number_counts=[3, 7]",
     "data.number_counts is ['3', '7']; it must be a list, each a whole number, at least 2 and at most 6"),
    ("model.path=", "model.path is empty; it must be text"),
    ("model.path=[tiny]", "model.path is ['tiny']; it must be text"),
    ("model.revision={a: b}", "model.revision is {'a': 'b'}; it must be text, or null"),
    ("data.revision=[main]", "data.revision is ['main']; it must be text, or null"),
    ('output.folder=""', "output.folder is empty; it must be text"),
]
VALUES = [  # setting, value, what it must be
    ("rollout.group_size", "16.0", GROUP),
    ("rollout.group_size", "65537", GROUP),
    ("rollout.questions_per_step", "0", f"{COUNT_1} and at most 65536"),
    ("rollout.questions_per_step", "2147483648", f"{COUNT_1} and at most 65536"),
    ("rollout.most_draws", "-1", f"{COUNT_1} and at most 100"),
    ("rollout.most_draws", "101", f"{COUNT_1} and at most 100"),
    ("rollout.max_new_tokens", "0x10", TOKENS),
    ("rollout.max_new_tokens", "1048577", TOKENS),
    ("rollout.temperature", "0", POSITIVE),
    ("rollout.top_p", "1.01", "a number, above 0 and at most 1"),
    ("rollout.top_k", "-1", COUNT_0),
    ("rollout.kv_cache_gib", "none", "a number, above 0, or null"),
    ("train.learning_rate", "1e400", POSITIVE),  # inf, once it is read
    ("train.steps", "1000000", f"{COUNT_1} and at most 999999"),
    ("train.seed", "4294967296", f"{COUNT_0} and at most 4294967295"),
    ("train.warmup_steps", "few", COUNT_0),
    ("train.schedule", "linear", "constant or cosine"),
    ("train.weight_decay", "-0.1", "a number, at least 0"),
    ("train.optimizer", "adam", "master or split or offload"),
    ("train.beta1", "1", "a number, at least 0 and below 1"),
    ("train.beta2", "nan", "a number, at least 0 and below 1"),
    ("train.max_grad_norm", "inf", POSITIVE),
    ("train.divide_by_std", "1", "true or false"),
    ("train.objective", "ppo", "plain or clipped or weighted"),
    ("train.updates_per_batch", "0", COUNT_1),
    ("train.clip_low", "2", "a number, above 0 and at most 1"),
    ("train.clip_high", "0", POSITIVE),
    ("train.weight_cap", "-2", POSITIVE),
    ("train.divide_loss_by", "token", "tokens or answers or limit"),
    ("train.truncated", "drop", "keep or mask or penalize"),
    ("train.penalty_tokens", "0", COUNT_1),
    ("train.tokens_per_microbatch", "8k", COUNT_1),
    ("train.activation_checkpointing", "off", "true or false"),
    ("train.most_skips", "0", COUNT_1),
    ("train.threads", "-2", THREADS),
    ("train.threads", "2147483648", THREADS),  # torch takes 32 bits
    ("model.device", "gpu", "auto or cpu or mps or cuda or cuda:[0-9]"),
    ("model.dtype", "float16", "float32 or bfloat16"),
    ("data.path", "null", "text"),
    ("data.held_out", "0", COUNT_1),
    ("data.target_low", "low", "a whole number, or null"),
    ("data.target_high", "1.5", "a whole number, or null"),
    ("eval.every", "-1", COUNT_0),
    ("eval.size", "1e2", COUNT_1),
    ("eval.temperature", "-0.1", "a number, at least 0"),
    ("checkpoint.every", "-5", COUNT_0),
    ("checkpoint.keep", "0", COUNT_1),
    ("output.samples", "two", COUNT_0),
]

# ------------------------------------------------------------------------------------------------ the command line

LONG = "x" * 300
THERE = "is already there: go on with --resume"
NO_RUN = "no run there (a run's folder holds config.yml)"
NO_NAME = "must be a plain name, for a folder in"
NO_HUB = "no folder here, not cached, no way to the hub: check"
UNREACHED = "network, HF_ENDPOINT, HF_HUB_OFFLINE"
NO_MODEL = "no such folder, nor a hub id (owner/name): set model.path"
NO_DATA = "no such file or folder, nor a hub data set (owner/name): set data.path"
NOT_HERE = ("which this machine does not have (it has cpu); to train on a CPU: "
            "python train.py --config config_tiny.yml")  # fmt: skip
COMMANDS = [  # name, arguments, message
    ("no such config", ["--config", "absent.yml"], "cannot read the config 'absent.yml': No such file or directory"),
    ("no name of a config", ["--config", ""], "cannot read the config '': No such file or directory"),
    ("a folder as config", ["--config", "model"], "cannot read the config 'model': Is a directory"),
    ("a config below a file", ["--config", "notes/c.yml"], "cannot read the config 'notes/c.yml': Not a directory"),
    ("a config of a long name", ["--config", LONG], f"cannot read the config '{LONG}': File name too long"),
    ("a data set as config", ["--config", "data.parquet"], "cannot read the config 'data.parquet': 'utf-8' codec…"),
    ("the name of a run", ["--name", "old"], f"runs/old {THERE} runs/old, or choose another --name"),
    ("the name of a file", ["--name", "notes", "output.folder=."],
     f"notes {THERE} notes, or choose another --name"),
    ("a name that leaves the runs", ["--name", "../other"], f"--name ../other: {NO_NAME} runs"),
    ("a name that is the runs", ["--name", "."], f"--name .: {NO_NAME} runs"),
    ("a name above the runs", ["--name", ".."], f"--name ..: {NO_NAME} runs"),
    ("a name from the root", ["--name", "/other"], f"--name /other: {NO_NAME} runs"),
    ("a name of two folders", ["--name", "a/b", "output.folder=none"], f"--name a/b: {NO_NAME} none"),
    ("a long name for a run", ["--name", LONG], f"runs/{LONG}: cannot be written: File name too long"),
    ("a long name for the runs", ["--name", "new", f"output.folder={LONG}"],
     f"{LONG}/new: cannot be written: File name too long"),
    ("no run to resume", ["--resume", "runs/none"], f"--resume runs/none: {NO_RUN}"),
    ("a file to resume", ["--resume", "notes"], f"--resume notes: {NO_RUN}"),
    ("a long name to resume", ["--resume", LONG], f"--resume {LONG}: {NO_RUN}"),
    ("too long an answer for the model", ["rollout.max_new_tokens=1024"],
     "model: a prompt of … tokens and rollout.max_new_tokens of 1024 do not fit max_position_embeddings, 1024 in "
     "config.json"),
    ("no latest run", ["--resume", "latest", "output.folder=none"],
     "--resume latest: none holds no run; check output.folder"),
    ("runs in a file", ["--name", "new", "output.folder=notes"], "notes/new: cannot be written: Not a directory"),
    ("device without its like", ["model.device=cuda"], f"model.device is cuda, {NOT_HERE}"),
    ("the tenth GPU", ["model.device=cuda:9"], f"model.device is cuda:9, {NOT_HERE}"),
    ("an Apple GPU", ["model.device=mps"], f"model.device is mps, {NOT_HERE}"),
    ("a real model without a GPU", ["model.device=cuda", "model.path=Qwen/Qwen2.5-3B-Instruct"],
     f"model.device is cuda with about … GiB of memory, {NOT_HERE}"),
    ("no such model", ["model.path=none"], f"none: {NO_MODEL}"),
    ("no such model anywhere", ["model.path=/none/at/all"], f"/none/at/all: {NO_MODEL}"),
    ("a model deep down", ["model.path=a/b/c"], f"a/b/c: {NO_MODEL}"),
    ("a file as model", ["model.path=model/model.safetensors"], f"model/model.safetensors: {NO_MODEL}"),
    ("a model of a long name", [f"model.path={LONG}"], f"{LONG}: {NO_MODEL}"),
    ("a model out of reach", ["model.path=no/such"],
     f"no/such: cannot get this model from the hub: {NO_HUB} model.path, {UNREACHED}"),
    ("a revision out of reach", ["model.path=no/such", "model.revision=v9"],
     f"no/such at revision v9: cannot get this model from the hub: {NO_HUB} model.path, {UNREACHED}"),
    ("a name the hub refuses", ["model.path=no/such--model"],
     "no/such--model: cannot get this model from the hub: HFValidationError: …"),
    ("no such data", ["data.path=none.parquet"], f"none.parquet: {NO_DATA}"),
    ("no such data on the hub", ["data.path=no/such.parquet"], f"no/such.parquet: {NO_DATA}"),
    ("neither file nor folder as data", ["data.path=/dev/null"], f"/dev/null: {NO_DATA}"),
    ("data out of reach", ["data.path=no/such"],
     f"no/such: cannot get this data set from the hub: {NO_HUB} data.path, {UNREACHED}"),
]

# ---------------------------------------------------------------------------------------- the run to be resumed

OLD, NEWEST = "runs/old", "runs/old/checkpoints/step-000002"
STATE = f"{NEWEST}/state.json"
FIXED = "when this run began; it cannot change within a run: set it back, or start another run with --name"
REMOVE = "remove this folder to go on from the checkpoint before it"
CHANGED = f"{NEWEST}: not as it was saved: state.json; {REMOVE}"
ANOTHER = f"{STATE}: written by another version of this program; go on with that one"


def sealed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """`change` has been at the state of the checkpoint, and its checksum is right: another program wrote it."""
    def rewritten(content: dict[str, Any]) -> None:
        del content["checksum"]
        change(content)
        content["checksum"] = text_checksum(content)

    return edited(STATE, rewritten)


RESUMED = [  # damage, further arguments, message
    (lose(f"{OLD}/config.yml"), [], f"--resume runs/old: {NO_RUN}"),
    (put(f"{OLD}/config.yml", ""), [], f"runs/old/config.yml: the file is empty; {MUST_HOLD}"),
    (altered(f"{OLD}/config.yml", lambda content: content + b"wandb: {}\n"), [],
     f"runs/old/config.yml: unknown section 'wandb'; known are {SECTIONS}"),
    (nothing, ["model.path=tiny"], f"model.path is tiny but was model {FIXED}"),
    (nothing, ["model.dtype=bfloat16"], f"model.dtype is bfloat16 but was float32 {FIXED}"),
    (nothing, ["data.held_out=5"], f"data.held_out is 5 but was 4 {FIXED}"),
    (nothing, ["data.number_counts=3"], f"data.number_counts is (3,) but was () {FIXED}"),
    (nothing, ["train.seed=2"], f"train.seed is 2 but was 1 {FIXED}"),
    (nothing, ["train.optimizer=offload"], f"train.optimizer is offload but was master {FIXED}"),
    (nothing, ["train.steps=1"], f"{NEWEST}: is 2 steps on, and train.steps is 1; raise it to go on"),
    (lose(STATE), [], CHANGED),
    (put(STATE, ""), [], CHANGED),
    (put(STATE, "[]"), [], CHANGED),
    (edited(STATE, lambda state: state["progress"].update(step=1)), [],
     CHANGED),
    (sealed(lambda state: state.pop("files")), [], CHANGED),
    (sealed(lambda state: state.update(files=list(state["files"]))), [], CHANGED),
    (sealed(lambda state: state.pop("progress")), [], ANOTHER),
    (sealed(lambda state: state["progress"].update(epoch=1)), [], ANOTHER),
    (sealed(lambda state: state["progress"].pop("drawn")), [], ANOTHER),
    (sealed(lambda state: state["progress"].update(step="2")), [], ANOTHER),
    # train.steps=3 would show in a config.yml that was written before the files were looked at
    (altered(f"{OLD}/metrics.jsonl", lambda content: content[:50]), ["train.steps=3"],
     f"{OLD}/metrics.jsonl: shorter than the … bytes it had at the checkpoint; put it back to resume"),
    (lose(f"{OLD}/samples.txt"), ["train.steps=3"],
     f"{OLD}/samples.txt: shorter than the … bytes it had at the checkpoint; put it back to resume"),
    (altered(f"{NEWEST}/model.safetensors", flipped), [],
     f"{NEWEST}: not as it was saved: model.safetensors; {REMOVE}"),
    (altered(f"{NEWEST}/optimizer.safetensors", flipped), [],
     f"{NEWEST}: not as it was saved: optimizer.safetensors; {REMOVE}"),
    (lambda: (lose(f"{NEWEST}/tokenizer.json")(), keys(f"{NEWEST}/config.json", rope_theta=1e6)()), [],
     f"{NEWEST}: not as it was saved: config.json, tokenizer.json; {REMOVE}"),
    (put(f"{OLD}/checkpoints/step-000003", ""), [],
     f"{OLD}/checkpoints/step-000003: not as it was saved: state.json; {REMOVE}"),
    (folder_at(f"{OLD}/checkpoints/step-000004"), [],
     f"{OLD}/checkpoints/step-000004: not as it was saved: state.json; {REMOVE}"),
]

# ------------------------------------------------------------------------------------------------ the model folder

CONFIG_JSON = "model/config.json"
WHOLE = "it must be a whole number from 1 to"
THETA = "it must be a number from 1.0 to 1000000000000.0"
PLAIN = "only plain rotary positions are covered"
MODEL_CONFIG = [  # changes to config.json (`...`: the key is gone), message after its path
    *[({key: ...}, f"{key} is missing; {WHOLE} {high}") for key, high in [
        ("vocab_size", 2**24), ("hidden_size", 2**18), ("intermediate_size", 2**20), ("num_hidden_layers", 2**10),
        ("num_attention_heads", 2**12), ("num_key_value_heads", 2**12), ("max_position_embeddings", 2**31)]],
    ({"rms_norm_eps": ...}, "rms_norm_eps is missing; it must be a number from 1e-12 to 0.1"),
    ({"rope_theta": ...}, f"rope_theta is missing; {THETA}"),
    ({"model_type": ...}, 'model_type is missing; only "qwen2" is covered'),
    ({"hidden_act": ...}, 'hidden_act is missing; only "silu" is covered'),
    ({"tie_word_embeddings": ...}, "tie_word_embeddings is missing; only true or false is covered"),
    ({"model_type": "llama"}, 'model_type is "llama"; only "qwen2" is covered'),
    ({"model_type": ["qwen2"]}, 'model_type is ["qwen2"]; only "qwen2" is covered'),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is covered'),
    ({"use_sliding_window": True}, "use_sliding_window is true; only false or null is covered"),
    ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; only null is covered'),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; only true or false is covered"),
    ({"vocab_size": "496"}, f'vocab_size is "496"; {WHOLE} 16777216'),
    ({"vocab_size": 496.0}, f"vocab_size is 496.0; {WHOLE} 16777216"),
    ({"hidden_size": -128}, f"hidden_size is -128; {WHOLE} 262144"),
    ({"intermediate_size": [384]}, f"intermediate_size is [384]; {WHOLE} 1048576"),
    ({"num_hidden_layers": 10**12}, f"num_hidden_layers is 1000000000000; {WHOLE} 1024"),
    ({"num_hidden_layers": True}, f"num_hidden_layers is true; {WHOLE} 1024"),
    ({"num_attention_heads": 0}, f"num_attention_heads is 0; {WHOLE} 4096"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 8; it must be a multiple of 3"),
    ({"head_dim": 15}, "head_dim is 15; it must be a multiple of 2"),
    ({"head_dim": 0}, "head_dim is 0; it must be a whole number from 2 to 4096"),
    ({"max_position_embeddings": float("inf")}, f"max_position_embeddings is Infinity; {WHOLE} 2147483648"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be a number from 1e-12 to 0.1"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; it must be a number from 1e-12 to 0.1"),
    ({"rope_theta": 10**400}, f"rope_theta is 1{'0' * 49}... (401 characters); {THETA}"),
    ({"rope_theta": {"a": 1}}, f'rope_theta is {{"a": 1}}; {THETA}'),
    ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is both 10000.0 and 500000.0; keep one"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, f'rope_scaling is {{"type": "yarn", "factor": 4.0}}; {PLAIN}'),
    ({"rope_scaling": "linear"}, f'rope_scaling is {{"type": "linear"}}; {PLAIN}'),
    ({"rope_parameters": {"rope_type": "llama3"}}, f'rope_parameters is {{"rope_type": "llama3"}}; {PLAIN}'),
    ({"layer_types": 5}, 'layer_types is 5; only "full_attention" in each layer is covered'),
]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
NO_JSON = "cannot be read as JSON"
BROKEN = "model/model.safetensors: damaged, cut short or not safetensors (…); fetch it again"
UNFIT = "model: the weights are not those that config.json describes: "
ABSENT = f"{INDEX}: names files that are not in its folder: "
NORM, EMBEDDING, DOWN = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
KINDS = "not BF16/F16/F32"
TOGETHER = "tokenizer and weights must belong together"
MODELS = [  # name, damage, message
    ("no config.json", lose(CONFIG_JSON), f"{CONFIG_JSON}: cannot be read: No such file or directory"),
    ("a folder as config.json", folder_at(CONFIG_JSON), f"{CONFIG_JSON}: cannot be read: Is a directory"),
    ("empty config.json", put(CONFIG_JSON, ""), f"{CONFIG_JSON}: {NO_JSON} (Expecting value…)"),
    ("half a config.json", put(CONFIG_JSON, '{"model_type": "qwen2"'), f"{CONFIG_JSON}: {NO_JSON} (Expecting ',' …)"),
    ("a list as config.json", put(CONFIG_JSON, "[]"), f"{CONFIG_JSON}: must hold a JSON object, found list"),
    ("deep config.json", put(CONFIG_JSON, "[" * 10**5), f"{CONFIG_JSON}: {NO_JSON} (maximum recursion depth…)"),
    ("binary config.json", put(CONFIG_JSON, b"\xff\xfe{\0}\0"), f"{CONFIG_JSON}: cannot be read: 'utf-8' codec…"),
    ("no weights", lose(WEIGHTS), "model: holds neither model.safetensors nor model.safetensors.index.json; "
                                  "no other weights are read"),
    ("git-LFS pointer", put(WEIGHTS, POINTER),
     "model/model.safetensors: a git-LFS pointer, not the weights: run `git lfs pull` there"),
    ("a folder as weights", folder_at(WEIGHTS), BROKEN),
    ("empty weights", put(WEIGHTS, b""), BROKEN),
    ("weights cut within the length", altered(WEIGHTS, lambda content: content[:5]), BROKEN),
    ("weights cut within the header", altered(WEIGHTS, lambda content: content[:100]), BROKEN),
    ("weights cut within the numbers", altered(WEIGHTS, lambda content: content[: len(content) // 2]), BROKEN),
    ("weights without their last byte", altered(WEIGHTS, lambda content: content[:-1]), BROKEN),
    ("weights and a byte", altered(WEIGHTS, lambda content: content + b"\0"), BROKEN),
    ("a header of exabytes", altered(WEIGHTS, lambda content: b"\xff" * 7 + b"\x7f" + content[8:]), BROKEN),
    ("a header of nothing", altered(WEIGHTS, lambda content: bytes(8) + content[8:]), BROKEN),
    ("a header that is no JSON", altered(WEIGHTS, lambda content: content[:8] + b"[" + content[9:]), BROKEN),
    ("a web page as weights", put(WEIGHTS, "<!doctype html><html>not found</html>"), BROKEN),
    ("a pickle as weights", put(WEIGHTS, b"PK\3\4" + bytes(500)), BROKEN),
    ("tensors that overlap", header(lambda table: table[NORM].update(data_offsets=[0, 512])), BROKEN),
    ("a tensor beyond the file", header(lambda table: table[NORM].update(data_offsets=[10**9, 10**9 + 512])), BROKEN),
    ("a tensor of an unknown type", header(lambda table: table[NORM].update(dtype="Q4_K")), BROKEN),
    ("a tensor of another size", header(lambda table: table[NORM].update(shape=[129])), BROKEN),
    ("a tensor missing", tensors(lambda t: t.pop(NORM)), UNFIT + "missing: model.norm.weight"),
    ("a tensor unknown", tensors(lambda t: t.update(v_head=torch.ones(1))), UNFIT + "unknown: v_head"),
    ("a tensor misnamed", tensors(lambda t: t.update(norm=t.pop(NORM))),
     UNFIT + "missing: model.norm.weight; unknown: norm"),
    ("a tensor misshaped", tensors(lambda t: t.update({NORM: torch.ones(127)})),
     UNFIT + f"unfit: model.norm.weight is F32 [127], {KINDS} [128]"),
    ("a tensor transposed", tensors(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})),
     UNFIT + f"unfit: {DOWN} is F32 [384, 128], {KINDS} [128, 384]"),
    ("a flat embedding", tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING].flatten()})),
     UNFIT + f"unfit: {EMBEDDING} is F32 [63488], {KINDS} [496, 128]"),
    ("two tensors swapped", tensors(lambda t: t.update({DOWN: t[EMBEDDING], EMBEDDING: t[DOWN]})),
     UNFIT + f"unfit: {EMBEDDING} is F32 [128, 384], {KINDS} [496, 128], {DOWN} is F32 [496, 128], {KINDS} [128, 384]"),
    ("a tensor in float8", tensors(lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
     UNFIT + f"unfit: model.norm.weight is F8_E4M3 [128], {KINDS} [128]"),
    ("a tensor of integers", tensors(lambda t: t.update({NORM: t[NORM].int()})),
     UNFIT + f"unfit: model.norm.weight is I32 [128], {KINDS} [128]"),
    ("a tied head that differs", tensors(lambda t: t.update({"lm_head.weight": torch.ones(496, 128)})),
     "model: lm_head.weight differs from model.embed_tokens.weight, although config.json ties them; "
     "set tie_word_embeddings to false there if the head counts"),
    ("an untied head missing", keys(CONFIG_JSON, tie_word_embeddings=False), UNFIT + "missing: lm_head.weight"),
    ("a layer too few", keys(CONFIG_JSON, num_hidden_layers=3), UNFIT + "unknown: model.layers.3.… and 7 more"),
    ("a layer too many", keys(CONFIG_JSON, num_hidden_layers=5),
     UNFIT + "missing: " + ", ".join(f"model.layers.4.self_attn.{name}" for name in (
         "q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias")) + " and 7 more"),
    ("other heads", keys(CONFIG_JSON, num_key_value_heads=4), UNFIT + "unfit: model.layers.0.self_attn.k_proj.…"),
    ("a vocabulary of millions", keys(CONFIG_JSON, vocab_size=2**24),
     UNFIT + f"unfit: {EMBEDDING} is F32 [496, 128], {KINDS} [16777216, 128]"),
    ("a vocabulary too small", keys(CONFIG_JSON, vocab_size=495),
     f"model: the tokenizer has 496 ids, but vocab_size in config.json is 495; {TOGETHER}"),
    ("a shard lost", shards(lose("model/1.safetensors")), ABSENT + "1.safetensors"),
    ("a shard cut short", shards(altered("model/1.safetensors", lambda content: content[:2000])),
     BROKEN.replace("model.safetensors", "1.safetensors")),
    ("a shard that is a folder", shards(folder_at("model/0.safetensors")),
     BROKEN.replace("model.safetensors", "0.safetensors")),
    ("a shard twice", shards(altered("model/0.safetensors", lambda _: Path("model/1.safetensors").read_bytes())),
     UNFIT + "missing: … and 20 more"),
    ("an index to elsewhere", shards(keys(INDEX, weight_map={"a": "../data.parquet"})), ABSENT + "../data.parquet"),
    ("an index to a path", shards(keys(INDEX, weight_map={"a": "/etc/passwd"})), ABSENT + "/etc/passwd"),
    ("an index to other files", shards(keys(INDEX, weight_map={"a": "config.json"})),
     BROKEN.replace("model.safetensors", "config.json")),
    ("an index of numbers", shards(keys(INDEX, weight_map={"a": 5, "b": []})), ABSENT + "5, []"),
    ("an index without a map", shards(keys(INDEX, weight_map=...)),
     f"{INDEX}: weight_map must be an object that names the file of each tensor"),
    ("an index that is no JSON", shards(put(INDEX, POINTER)), f"{INDEX}: {NO_JSON} (Expecting value…)"),
]

# -------------------------------------------------------------------------------------------------- the tokenizer

BPE, SETTING, GENERATION, TEMPLATE = (f"model/{name}" for name in (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"))
NO_BPE = f"{BPE}: not a tokenizer that the tokenizers library can read (…)"
NO_TEMPLATE = "model: no chat template in chat_template.jinja or tokenizer_config.json"
NO_EOS = "model: tokenizer_config.json names no eos_token of tokenizer.json"
BAD_TEMPLATE = "model: bad chat template: "
TOO_MANY = [{"id": 496, "content": "<|one too many|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}]  # fmt: skip


def end_ids(value: object) -> tuple[str, Damage, str]:
    shown = f"eos_token_id is {value}; the tokenizer's ids are 0 to 495"
    return f"end ids {value}", keys(GENERATION, eos_token_id=value), f"{GENERATION}: {shown}"


TOKENIZERS = [  # name, damage, message
    ("no tokenizer.json", lose(BPE), f"{BPE}: cannot be read: No such file or directory"),
    ("a folder as tokenizer.json", folder_at(BPE), f"{BPE}: cannot be read: Is a directory"),
    ("empty tokenizer.json", put(BPE, ""), f"{BPE}: {NO_JSON} (Expecting value…)"),
    ("half a tokenizer.json", altered(BPE, lambda content: content[: len(content) // 2]), f"{BPE}: {NO_JSON} (…)"),
    ("tokenizer.json not UTF-8", put(BPE, b"\xff\xfe"), f"{BPE}: cannot be read: 'utf-8' codec…"),
    ("a list as tokenizer.json", put(BPE, "[]"), f"{BPE}: must hold a JSON object, found list"),
    ("a number too long", put(BPE, '{"x": ' + "9" * 5000 + "}"), f"{BPE}: {NO_JSON} (Exceeds the limit …)"),
    ("an empty tokenizer", put(BPE, "{}"), NO_BPE),
    ("a tokenizer without a model", keys(BPE, model=None), NO_BPE),
    ("an unknown normalizer", keys(BPE, normalizer={"type": "NFX"}), NO_BPE),
    ("merges of unknown tokens", edited(BPE, lambda content: content["model"].update(merges=[["no", "ne"]])), NO_BPE),
    ("a negative id", edited(BPE, lambda content: content["model"].update(vocab={"a": -1})), NO_BPE),
    ("a token too many", edited(BPE, lambda content: content["added_tokens"].extend(TOO_MANY)),
     f"model: the tokenizer has 497 ids, but vocab_size in config.json is 496; {TOGETHER}"),
    ("a vocabulary with a hole", edited(BPE, lambda content: content["model"]["vocab"].update({"3": 5000})),
     f"model: the tokenizer has 5001 ids, but vocab_size in config.json is 496; {TOGETHER}"),
    ("no tokenizer_config.json", lose(SETTING), f"{SETTING}: cannot be read: No such file or directory"),
    ("empty tokenizer_config.json", put(SETTING, ""),
     f"{SETTING}: {NO_JSON} (Expecting value…)"),
    ("null as tokenizer_config.json", put(SETTING, "null"), f"{SETTING}: must hold a JSON object, found NoneType"),
    ("no template", keys(SETTING, chat_template=...), NO_TEMPLATE),
    ("a number as template", keys(SETTING, chat_template=5), NO_TEMPLATE),
    ("no default among templates", keys(SETTING, chat_template=[{"name": "rag", "template": "x"}]), NO_TEMPLATE),
    ("a template that does not end", keys(SETTING, chat_template="{% if x %}"), BAD_TEMPLATE + "Unexpected end of …"),
    ("a mistyped template", keys(SETTING, chat_template="{% fro x %}"), BAD_TEMPLATE + "…unknown tag 'fro'."),
    ("a template with an unknown filter", keys(SETTING, chat_template="{{ x | nothing }}"),
     BAD_TEMPLATE + "No filter named 'nothing'."),
    ("a template of brackets", keys(SETTING, chat_template="{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"),
     BAD_TEMPLATE + "maximum recursion depth…"),
    ("a template that raises", keys(SETTING, chat_template="{{ raise_exception('no') }}"),
     "model: the chat template fails: no"),
    ("a template of many words", keys(SETTING, chat_template="{{ messages[0].content * 200 }}"),
     "model: a prompt of … tokens and rollout.max_new_tokens of 4 do not fit max_position_embeddings, 1024 in "
     "config.json"),
    ("a template file that is none", put(TEMPLATE, b"\x80"), f"{TEMPLATE}: cannot be read: 'utf-8' codec…"),
    ("a folder as template", folder_at(TEMPLATE), f"{TEMPLATE}: cannot be read: Is a directory"),
    ("no JSON as generation_config.json", put(GENERATION, "{,}"), f"{GENERATION}: {NO_JSON} (Expecting …)"),
    ("a list as generation_config.json", put(GENERATION, "[495]"),
     f"{GENERATION}: must hold a JSON object, found list"),
    *map(end_ids, (496, -1, True, 495.0, [[495]], {"a": 1}, [495, None])),
    ("an unknown end token", keys(SETTING, eos_token="</s>"), NO_EOS),
    ("no end at all", lambda: (keys(SETTING, eos_token=...)(), lose(GENERATION)()), NO_EOS),
]

# ------------------------------------------------------------------------------------------------------- the data

NO_PARQUET = "data.parquet: not a readable parquet file with columns 'nums' and 'target' (…)"
NONE_GOOD = "data.parquet: holds no problem: row 0: "
NOT_WHOLE = "not a whole number from 1 to 1,000,000"
NOT_NUMBERS = "nums is not a list of 2 to 6 numbers but "
EMPTY = pyarrow.array([], pyarrow.list_(pyarrow.int64())), pyarrow.array([], pyarrow.int64())
NONE_FIT = ("data.parquet: none of its 20 problems passes the filters: widen data.number_counts ({}), data.target_low "
            "({}) or data.target_high ({})")  # fmt: skip
DATA = [  # name, damage, further arguments, message
    ("empty file", put("data.parquet", b""), [], NO_PARQUET),
    ("a table of text", put("data.parquet", "nums,target\n[3, 7],10\n"), [], NO_PARQUET),
    ("data as git-LFS pointer", put("data.parquet", POINTER), [], NO_PARQUET),
    ("half of the data", altered("data.parquet", lambda content: content[: len(content) // 2]), [], NO_PARQUET),
    ("data without its end", altered("data.parquet", lambda content: content[:-1]), [], NO_PARQUET),
    ("data without its start", altered("data.parquet", lambda content: content[4:]), [], NO_PARQUET),
    ("no target", columns(nums=[[3, 7]]), [], NO_PARQUET),
    ("no nums", columns(target=[10]), [], NO_PARQUET),
    ("Nums", columns(Nums=[[3, 7]], target=[10]), [], NO_PARQUET),
    ("an empty folder as data", folder_at("data.parquet"), [],
     "data.parquet: holds no .parquet file: give a file, a folder or a data set that has one"),
    ("a folder of other files as data", nothing, ["data.path=runs"],
     "runs: holds no .parquet file: give a file, a folder or a data set that has one"),
    ("a broken file among others", lambda: (problems([[3, 7]], [10], "some/a.parquet")(), put("some/b.parquet", "")()),
     ["data.path=some"], NO_PARQUET.replace("data", "some/b", 1)),
    ("an empty file among others", lambda: (problems([[3, 7]], [10], "some/a.parquet")(),
                                            problems(*EMPTY, "some/b.parquet")()),
     ["data.path=some"], "some/b.parquet: holds no problem: it has no rows"),
    ("no rows", problems(*EMPTY), [], "data.parquet: holds no problem: it has no rows"),
    ("numbers as text", problems([["3", "7"]], [10]), [], f"{NONE_GOOD}nums holds '3', {NOT_WHOLE}"),
    ("one text for all numbers", problems(["3, 7"], [10]), [], f"{NONE_GOOD}{NOT_NUMBERS}'3, 7'"),
    ("one number", problems([[3]], [10]), [], f"{NONE_GOOD}{NOT_NUMBERS}array([3])"),
    ("no numbers", problems([[], [3]], [10, 3]), [],
     f"{NONE_GOOD}{NOT_NUMBERS}array([], dtype=int64); row 1: {NOT_NUMBERS}array([3])"),
    ("seven numbers", problems([[1, 2, 3, 4, 5, 6, 7]], [10]), [],
     f"{NONE_GOOD}{NOT_NUMBERS}array([1, 2, 3, 4, 5, 6, 7])"),
    ("null for numbers", problems(pyarrow.array([None], pyarrow.list_(pyarrow.int64())), [10]), [],
     f"{NONE_GOOD}{NOT_NUMBERS}None"),
    ("numbers in lists", problems([[[3, 7], [5, 6]]], [10]), [], f"{NONE_GOOD}nums holds array([3, 7]), {NOT_WHOLE}"),
    ("a bare number for numbers", problems([3], [10]), [], f"{NONE_GOOD}{NOT_NUMBERS}3"),
    ("fractions", problems([[3.0, 7.5]], [10]), [], f"{NONE_GOOD}nums holds 7.5, {NOT_WHOLE}"),
    ("NaN among the numbers", problems([[3.0, float("nan")]], [10]), [], f"{NONE_GOOD}nums holds nan, {NOT_WHOLE}"),
    ("zero", problems([[0, 7]], [7]), [], f"{NONE_GOOD}nums holds 0, {NOT_WHOLE}"),
    ("a negative number", problems([[-3, 7]], [4]), [], f"{NONE_GOOD}nums holds -3, {NOT_WHOLE}"),
    ("a huge number", problems([[3, 2**62]], [10]), [], f"{NONE_GOOD}nums holds {2**62}, {NOT_WHOLE}"),
    ("truth values", problems([[True, False]], [1]), [], f"{NONE_GOOD}nums holds True, {NOT_WHOLE}"),
    ("a target as text", problems([[3, 7]], ["10"]), [], f"{NONE_GOOD}target holds '10', {NOT_WHOLE}"),
    ("null and zero for targets", problems([[3, 7], [3, 7]], [None, 0]), [],
     f"{NONE_GOOD}target holds nan, {NOT_WHOLE}; row 1: target holds 0, {NOT_WHOLE}"),
    ("a NaN target", problems([[3, 7]], [float("nan")]), [], f"{NONE_GOOD}target holds nan, {NOT_WHOLE}"),
    ("an infinite target", problems([[3, 7]], [float("inf")]), [], f"{NONE_GOOD}target holds inf, {NOT_WHOLE}"),
    ("a negative target", problems([[3, 7]], [-4]), [], f"{NONE_GOOD}target holds -4, {NOT_WHOLE}"),
    ("a huge target", problems([[3, 7]], [1e30]), [], f"{NONE_GOOD}target holds {int(1e30)}, {NOT_WHOLE}"),
    ("a list of targets", problems([[3, 7]], [[10]]), [], f"{NONE_GOOD}target holds array([10]), {NOT_WHOLE}"),
    ("more than three bad rows", problems([[3, 7]] * 5, [0, -1, -2, -3, -4]), [],
     f"{NONE_GOOD}target holds 0, {NOT_WHOLE}; row 1: target holds -1, {NOT_WHOLE}; "
     f"row 2: target holds -2, {NOT_WHOLE}"),
    ("no problem of six numbers", nothing, ["data.number_counts=[6]"], NONE_FIT.format([6], None, None)),
    ("no target so high", nothing, ["data.target_low=1000"], NONE_FIT.format([], 1000, None)),
    ("no target so low", nothing, ["data.target_high=-1"], NONE_FIT.format([], None, -1)),
    ("from above to below", nothing, ["data.target_low=20", "data.target_high=15"], NONE_FIT.format([], 20, 15)),
    ("all held out", nothing, ["data.held_out=20"],
     "20 different problems are too few to hold out 20 and train on the rest: lower data.held_out, "
     "widen the data's filters or use more data"),
    ("all alike", problems([[3, 7], [7, 3]] * 10, [10] * 20), [],
     "1 different problems are too few to hold out 4 and train on the rest: lower data.held_out, "
     "widen the data's filters or use more data"),
    ("a bad row, then too few", problems([[3, 7], [1], [4, 5]], [10, 10, 9]), [],
     "2 different problems are too few to hold out 4 and train on the rest: lower data.held_out, "
     "widen the data's filters or use more data"),
]

# ------------------------------------------------------------------------------------------------------- the table

TABLE = [
    *[Row(f"config {content!r:.40}", put("config.yml", content), [], message) for content, message in CONFIG_FILES],
    *[Row(typed, nothing, [typed], f"in the override `{typed}`: {message}") for typed, message in OVERRIDES],
    *[Row(f"{name}={typed}", nothing, [f"{name}={typed}"],
          f"in the override `{name}={typed}`: {name} is {typed}; it must be {allowed}")
      for name, typed, allowed in VALUES],
    *[Row(name, nothing, arguments, message) for name, arguments, message in COMMANDS],
    *[Row(message, damage, ["--resume", OLD, *more], message) for damage, more, message in RESUMED],
    *[Row(f"config.json {changes}", keys(CONFIG_JSON, **changes), [], f"{CONFIG_JSON}: {message}")
      for changes, message in MODEL_CONFIG],
    *[Row(name, damage, [], message) for name, damage, message in (*MODELS, *TOKENIZERS)],
    *[Row(*row) for row in DATA],
]
SHOWN = (UserWarning, RuntimeWarning, FutureWarning)  # warnings that Python does not hide
SHARED = {BROKEN, NO_BPE, NO_TEMPLATE, NO_EOS, NO_PARQUET, CHANGED, ANOTHER}  # said of several mistakes


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder to train in, with a run that has been trained there."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "tiny", folder / "model")
    (folder / "notes").write_text("a file")
    (folder / "config.yml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        problems([[3, 7, n] for n in range(1, 21)], list(range(11, 31)))()
        assert train.main(["--config", "config.yml", "--name", "old"]) == 0
    return folder


def files_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells a file from its copy, its successor and itself with another content."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {str(path): (s.st_ino, s.st_size, s.st_mtime_ns) if path.is_file() else () for path, s in stats.items()}


@pytest.mark.parametrize("row", TABLE, ids=[ascii(row.name)[1:-1][:60] for row in TABLE])
def test_bad_input_gets_one_line_and_leaves_no_trace(row, workplace, tmp_path, monkeypatch, capfd, recwarn):
    """capfd sees what libraries write, too; a warning would be further lines on a person's terminal."""
    shutil.copytree(workplace, tmp_path / "here", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whatever machine runs this test
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    row.damage()
    before = files_in(tmp_path)
    assert train.main(["--config", "config.yml", *row.arguments]) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(re.escape(f"train.py: {row.message}\n").replace("…", ".*"), said), said
    assert not [str(warning) for warning in recwarn if issubclass(warning.category, SHOWN)]
    assert files_in(tmp_path) == before


def test_the_table_is_long_and_its_messages_tell_the_mistakes_apart():
    assert len(TABLE) >= 150
    assert {message for message, count in Counter(row.message for row in TABLE).items() if count > 1} == SHARED
    tried = {argument.partition("=")[0] for row in TABLE for argument in row.arguments}
    assert tried >= set(SETTINGS), "a setting that no row gives a bad value"
