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
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
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
        cures = f"check {section}.path and revision, the network, HF_TOKEN, the disk of HF_HOME"
        raise UserError(f"{name}: not to be had from the hub ({one_line(error)}): {cures}") from error


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
    raw["rope_theta"] = find_rope_theta(path, raw)
    numbers: dict[str, Any] = {field.name: field.type for field in fields(Qwen2Config) if field.type is not bool}
    for key, kind in numbers.items():  # a bool is no number here, nor is nan
        if key == "head_dim" and raw.get(key) is None:
            raw[key] = raw["hidden_size"] // raw["num_attention_heads"]
        good = type(raw.get(key)) in (int, kind) and 0 < raw[key] <= LARGEST[kind]
        check(key, good, f"it must be a {'whole ' if kind is int else ''}number above 0, at most {LARGEST[kind]:,}")
    layers, heads, kv_heads = (raw[f"num_{what}"] for what in ("hidden_layers", "attention_heads", "key_value_heads"))
    check("num_hidden_layers", layers <= 1024, "it must be at most 1024")
    check("num_attention_heads", heads % kv_heads == 0, f"it must be a multiple of {kv_heads}")
    check("head_dim", raw["head_dim"] % 2 == 0, "it must be a multiple of 2")
    full = raw.get("layer_types") in (None, ["full_attention"] * layers)
    check("layer_types", full, 'only "full_attention" in every layer is covered')
    values = {key: kind(raw[key]) for key, kind in numbers.items()}
    return Qwen2Config(**values, tie_word_embeddings=raw["tie_word_embeddings"])


def find_rope_theta(path: Path, raw: dict[str, Any]) -> Any:
    """The base of the rotary angles: `rope_theta`, which transformers 5 moved into `rope_parameters`.

    What else `rope_parameters` or the older `rope_scaling` holds stretches the positions for long contexts.
    """
    theta = raw.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict) or any(rope[name] not in (None, "default") for name in {*rope} - {"rope_theta"}):
            raise UserError(f"{path}: {key} is {json.dumps(rope):.80}; only plain rotary positions are covered")
        theta, other = rope.get("rope_theta") or theta, theta
        if other not in (None, theta):
            raise UserError(f"{path}: rope_theta is both {other!s:.40} and {theta!s:.40}; keep one")
    return theta


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
        if name.endswith(".rotary_emb.inv_freq"):  # a table that old checkpoints hold
            continue
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
    with suppress(UserError, KeyError, AttributeError):
        content: Any = read_json(folder / f"{stem}.safetensors.index.json")["weight_map"]
        return {name: str(file) for name, file in content.items()}
    return {}


def read_tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is in the safetensors files whose names begin with `stem`.

    Where the files of an index are there, it decides which of them holds a tensor.
    """
    shards, there = read_index(folder, stem), sorted(folder.glob(f"{stem}*.safetensors"))
    if not there:
        how = "convert a pytorch_model.bin with from_pretrained and save_pretrained of transformers"
        raise UserError(f"{folder}: no {stem}.safetensors: {how}")
    if {*shards.values()} - {path.name for path in there}:
        shards = {}  # an index left over from other weights
    for path in [path for path in there if path.name in shards.values()] or there:
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
    for path in folder.glob(pattern.format(suffix="*")):
        path.chmod(0o644)  # the library lets nobody else read it


# ---- The chat template -----------------------------------------------------------------------------------------


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, the mark of what the assistant said, renders what is in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


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

    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own would escape < and >
    try:
        return environment.from_string(source)
    except Exception as error:  # a TemplateError, or what Python says to a program that is nested too deep
        raise UserError(f"{folder}: bad chat template: {one_line(error)}") from None
