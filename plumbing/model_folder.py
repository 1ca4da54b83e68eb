"""Model folders in the Hugging Face format, local or from the hub: find one, read one into a Qwen2, write one.

    folder = find_folder(config.model)  # a local folder, or fetched from the hub
    policy = load_model(folder, torch.device("cuda:0"), torch.bfloat16)
    save_model(policy, read_small_files(folder), Path("runs/mine/final"))

A folder holds config.json, the weights in one or several safetensors files, and the tokenizer's files. Loading is
strict where others guess: whatever changes what the model computes must stand in config.json and be something that
qwen2_model.py covers, and every tensor must be there once, in its shape. A model that is only nearly right still
trains: quietly, and badly.

Left out: pickled weights (loading one can run code), quantized weights, rope scaling, other architectures.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_types import DataSettings, ModelSettings
from plumbing.files import read_json, read_text, write_json
from plumbing.terminal import UserError, one_line
from qwen2_model import Qwen2, Qwen2Config

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", GENERATION]
ADAPTER, INDEX = "adapter_config.json", "model.safetensors.index.json"
STORED_TYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARD_BYTES = 5 * 10**9  # the most that one file of weights holds
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)  # owner/name


# ---- Local, or from the hub ------------------------------------------------------------------------------------


def find_folder(settings: ModelSettings | DataSettings) -> Path:
    """`settings.path` (a data set may be a file), or the folder of that hub id ("owner/name"), fetched if need be.

    A name in a folder that is here is a path, no hub id.

    The huggingface_hub library does the work, so its environment variables hold: HF_TOKEN, HF_ENDPOINT, HF_HOME for the
    cache, HF_HUB_OFFLINE. Raises UserError when the hub cannot be reached, refuses, or the disk is full.
    """
    name, of_model = settings.path, isinstance(settings, ModelSettings)
    if os.path.isdir(name) or (os.path.isfile(name) and not of_model):
        return Path(name)
    section, kind = ("model", "model") if of_model else ("data", "dataset")
    is_path = os.path.exists(name) or os.path.isdir(os.path.dirname(name)) or name.endswith(".parquet")
    if is_path or not HUB_ID.fullmatch(name):
        raise UserError(f"{name}: nothing usable there, nor is it a hub id (owner/name): set {section}.path")
    # subfolders of a model hold other forms of it
    patterns, others = ([CONFIG, *TOKENIZER_FILES, ADAPTER, INDEX], ["*/*"]) if of_model else (["*.parquet"], [])
    fetch = partial(snapshot_download, name, repo_type=kind, revision=settings.revision, ignore_patterns=others)
    try:
        folder = Path(fetch(allow_patterns=patterns))
        shards = {*read_index(folder, "model").values()} or {"model*.safetensors"}
        return Path(fetch(allow_patterns=[*patterns, *shards])) if of_model else folder
    except Exception as error:  # the hub's, the HTTP client's and the system's errors have no common base
        raise UserError(f"{name}: not from the hub ({one_line(error)}): {section}.path, HF_TOKEN, disk?") from error


# ---- config.json -----------------------------------------------------------------------------------------------

COVERED = {  # the values, as JSON, that qwen2_model.py can compute; a key that is absent is null
    "model_type": ['"qwen2"'],
    "hidden_act": ['"silu"'],
    "tie_word_embeddings": ["true", "false"],
    "use_sliding_window": ["false", "null"],
    "quantization_config": ["null"],
}
LARGEST = {int: 2**20, float: 1e12}  # of the numbers in config.json; beyond any model


def read_model_config(folder: str | Path) -> Qwen2Config:
    """The model's shape, from config.json; UserError names the key that is missing, wrong or not covered.

    Nothing that changes the logits has a default, but for head_dim, derived as transformers does.
    """
    path = Path(folder) / CONFIG
    if path.with_name(ADAPTER).is_file():
        how = "merge it into its base with merge_and_unload of peft, then save_pretrained"
        raise UserError(f"{folder}: an adapter, says {ADAPTER}, no whole model: {how}")
    raw = read_json(path)

    def check(key: str, good: bool, rule: str) -> None:
        if not good:
            value = "missing" if raw.get(key) is None else f"{json.dumps(raw[key]):.80}"
            raise UserError(f"{path}: {key} is {value}; {rule}")

    for key, covered in COVERED.items():
        check(key, json.dumps(raw.get(key)) in covered, f"only {' or '.join(covered)} is covered")
    for key in ("rope_parameters", "rope_scaling"):  # what else they hold stretches the positions for long contexts
        rope = raw.get(key) or {}
        plain = isinstance(rope, dict) and all(rope[name] in (None, "default") for name in {*rope} - {"rope_theta"})
        check(key, plain, "only plain rotary positions are covered")
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))  # transformers 5 moved it there
    numbers: dict[str, Any] = {field.name: field.type for field in fields(Qwen2Config) if field.type is not bool}
    for key, kind in numbers.items():  # a bool is no number here, nor is nan
        if key == "head_dim" and raw.get(key) is None:
            raw[key] = raw["hidden_size"] // raw["num_attention_heads"]
        good = type(raw.get(key)) in (int, kind) and 0 < raw[key] <= LARGEST[kind]
        check(key, good, f"it must be a {'whole ' if kind is int else ''}number above 0, at most {LARGEST[kind]:,}")
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    check("num_hidden_layers", raw["num_hidden_layers"] <= 1024, "it must be at most 1024")
    check("num_attention_heads", heads % kv_heads == 0, f"it must be a multiple of {kv_heads}")
    check("head_dim", raw["head_dim"] % 2 == 0, "it must be a multiple of 2")
    values = {key: kind(raw[key]) for key, kind in numbers.items()}
    return Qwen2Config(**values, tie_word_embeddings=raw["tie_word_embeddings"])


# ---- Loading ---------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """The model of a folder, its weights in `dtype` on `device`, whatever type they have on the disk.

    Raises UserError for a config.json that is not covered, files that are missing or damaged, and tensors that are not
    the model's.
    """
    folder, weights = Path(folder), {}
    with torch.device("meta"):  # shapes without memory
        model = Qwen2(read_model_config(folder))
    for stored_name, tensor in read_tensors(folder, "model"):
        name = stored_name.removeprefix("model.")
        if name in weights or tensor.dtype not in STORED_TYPES:
            fault = "is there twice" if name in weights else f"is {tensor.dtype}, not one of {STORED_TYPES}"
            raise UserError(f"{folder}: {name} {fault}")
        weights[name] = tensor.to(device, dtype, copy=True)
    if model.config.tie_word_embeddings:  # such a head may be stored all the same, as some tools do
        embedding = weights.get("embed_tokens.weight", torch.empty(0))
        if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
            # transformers 4 ignores such a head, transformers 5 uses it
            raise UserError(f"{folder}: lm_head.weight differs from the embedding, although {CONFIG} ties them")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: not the weights that {CONFIG} describes: {one_line(error)}") from None
    model.dtype = dtype
    return model


def read_index(folder: Path, stem: str) -> dict[str, str]:
    """The file that holds each tensor; empty where no index says so."""
    path = folder / f"{stem}.safetensors.index.json"
    weight_map = read_json(path).get("weight_map") if path.is_file() else None
    return {name: str(file) for name, file in weight_map.items()} if isinstance(weight_map, dict) else {}


def read_tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is in the safetensors files whose names begin with `stem`.

    Where the files of an index are there, it decides which of them holds a tensor.
    """
    shards = read_index(folder, stem)
    files = sorted({folder / name for name in shards.values()})
    if not files or not all(path.is_file() for path in files):  # no index, or one left over from other weights
        shards, files = {}, sorted(folder.glob(f"{stem}*.safetensors"))
    if not files:
        how = "convert a pytorch_model.bin with from_pretrained and save_pretrained of transformers"
        raise UserError(f"{folder}: no {stem}.safetensors: {how}")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if shards.get(name, path.name) == path.name]  # noqa: SIM118
                yield from ((name, file.get_tensor(name)) for name in names)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: damaged, incomplete or a git-LFS pointer ({error}); fetch it again") from None


# ---- Saving ----------------------------------------------------------------------------------------------------


def read_small_files(folder: Path, end_ids: list[int] | None = None) -> dict[str, bytes]:
    """What a model folder holds besides its weights: config.json and the tokenizer's files, by name.

    With `end_ids`, generation_config.json ends a response there.
    """
    files = {name: (folder / name).read_bytes() for name in (CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()}
    if end_ids:
        generation = json.loads(files.get(GENERATION, "{}")) | {"eos_token_id": end_ids}
        files[GENERATION] = json.dumps(generation, indent=2).encode()
    return files


def save_model(model: Qwen2, small_files: dict[str, bytes], folder: Path) -> None:
    """Write a Hugging Face folder: the model's weights, and the small files of the folder it came from.

    config.json stays as it was, so that nothing in it is lost, but for the type of the weights.
    """
    config = json.loads(small_files[CONFIG])
    config.pop("dtype", None)  # the newer name of the next
    config["torch_dtype"] = str(model.head.dtype).removeprefix("torch.")
    for name, content in small_files.items():
        (folder / name).write_bytes(content)
    write_json(folder / CONFIG, config)
    save_tensors(model.hf_tensors(), folder, "model")


def save_tensors(tensors: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Write tensors to stem.safetensors, or to several numbered files and their index."""
    pattern = stem + "{suffix}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=SHARD_BYTES)


# ---- The chat template -----------------------------------------------------------------------------------------


# {% generation %} marks what the assistant said; for the text it is a scope like any other
GENERATION_TAG = re.compile(r"(\{%[-+]?\s*(?:end)?)generation(?=\s*[-+]?%\})")


def compile_template(folder: Path, settings: dict[str, Any]) -> jinja2.Template:
    """The folder's chat template in jinja2's sandbox, with the settings and helpers that templates expect.

    settings: of tokenizer_config.json.
    """
    path = folder / "chat_template.jinja"
    source = read_text(path) if path.exists() else settings.get("chat_template")
    if isinstance(source, list):  # the older form: several named templates
        source = {str(t.get("name")): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    if not isinstance(source, str):
        raise UserError(f"{folder}: no chat template in chat_template.jinja or tokenizer_config.json")

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own would escape < and >
    try:
        return environment.from_string(GENERATION_TAG.sub(r"\1with", source))
    except Exception as error:  # a TemplateError, or what Python says to a program that is nested too deep
        raise UserError(f"{folder}: bad chat template: {one_line(error)}") from None
