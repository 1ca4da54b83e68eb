"""Model folders in the Hugging Face format: find one, read one into a Qwen2, write one for transformers.

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
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_types import ModelSettings, UserError
from files import listed, read_json, write_json, writing
from hub import HUB_ID, download
from qwen2_model import Qwen2, Qwen2Config
from tokenizer import TOKENIZER_FILES

CONFIG = "config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED_TYPES = ("BF16", "F16", "F32")
SHARD_BYTES = 5 * 10**9  # the most that one file of weights holds


def find_folder(model: ModelSettings) -> Path:
    """The model's folder: `model.path` itself, or for a hub id ("owner/name") the hub's copy, fetched if need be.

    Raises UserError when there is neither, or the hub cannot be reached or refuses.
    """
    if os.path.isdir(model.path):
        return Path(model.path)
    if os.path.exists(model.path) or not HUB_ID.fullmatch(model.path):
        raise UserError(f"{model.path}: no such folder, nor a hub id (owner/name): set model.path")
    return download("model", model.path, model.revision, [CONFIG, *TOKENIZER_FILES, "model*.safetensors"])


# ---- config.json -----------------------------------------------------------------------------------------------

COVERED = {  # the values, as JSON, that qwen2_model.py can compute; a key that is absent is null
    "model_type": ['"qwen2"'],
    "hidden_act": ['"silu"'],
    "tie_word_embeddings": ["true", "false"],
    "use_sliding_window": ["false", "null"],
    "quantization_config": ["null"],
}
LARGEST = {int: 2**24, float: 1e12}  # of the numbers in config.json; far beyond any model


def read_model_config(folder: str | Path) -> Qwen2Config:
    """The model's shape, from config.json; UserError names the key that is missing, wrong or not covered.

    Nothing that changes the logits has a default, but for head_dim, derived as transformers does.
    """
    path = Path(folder) / CONFIG
    raw = read_json(path)

    def check(key: str, good: bool, rule: str) -> None:
        if not good:
            value = "missing" if raw.get(key) is None else f"{json.dumps(raw[key]):.80}"
            raise UserError(f"{path}: {key} is {value}; {rule}")

    for key, covered in COVERED.items():
        check(key, json.dumps(raw.get(key)) in covered, f"only {' or '.join(covered)} is covered")
    raw["rope_theta"] = find_rope_theta(path, raw)
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if raw.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        raw["head_dim"] = hidden // heads
    numbers: dict[str, Any] = {field.name: field.type for field in fields(Qwen2Config) if field.type is not bool}
    for key, kind in numbers.items():  # a bool is no number here, nor is nan
        good = type(raw.get(key)) in (int, kind) and 0 < raw[key] <= LARGEST[kind]
        check(key, good, f"it must be a {'whole ' if kind is int else ''}number above 0, at most {LARGEST[kind]:,}")
    layers, kv_heads = raw["num_hidden_layers"], raw["num_key_value_heads"]
    check("num_hidden_layers", layers <= 1024, "it must be at most 1024")
    check("num_attention_heads", heads % kv_heads == 0, f"it must be a multiple of {kv_heads}")
    check("head_dim", raw["head_dim"] % 2 == 0, "it must be a multiple of 2")
    check("head_dim", heads * raw["head_dim"] <= LARGEST[int], f"with all heads it must be at most {LARGEST[int]:,}")
    full = raw.get("layer_types") in (None, ["full_attention"] * layers)
    check("layer_types", full, 'only "full_attention" in every layer is covered')
    values = {key: kind(raw[key]) for key, kind in numbers.items()}
    return Qwen2Config(**values, tie_word_embeddings=raw["tie_word_embeddings"])


def find_rope_theta(path: Path, raw: dict[str, Any]) -> Any:
    """The base of the rotary angles: `rope_theta`, which transformers 5 moved into `rope_parameters`.

    What else `rope_parameters` or the older `rope_scaling` holds stretches the positions for long contexts.
    """
    thetas = [raw.get("rope_theta")]
    for key in ("rope_parameters", "rope_scaling"):
        found = raw.get(key)
        rope: dict[str, Any] = found if isinstance(found, dict) else {"type": found}
        thetas.append(rope.get("rope_theta"))
        if any(value not in (None, "default") for name, value in rope.items() if name != "rope_theta"):
            raise UserError(f"{path}: {key} is {json.dumps(rope):.80}; only plain rotary positions are covered")
    given = [theta for theta in thetas if theta is not None]
    if any(theta != given[0] for theta in given):
        raise UserError(f"{path}: rope_theta is both {given[0]!s:.40} and {given[-1]!s:.40}; keep one")
    return given[0] if given else None


# ---- Loading ---------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """The model of a folder, its weights in `dtype` on `device`, whatever type they have on the disk.

    Raises UserError for a config.json that is not covered, files that are missing or damaged, and tensors that are not
    the model's; nothing is allocated before.
    """
    folder = Path(folder)
    with torch.device("meta"):  # shapes without memory
        model = Qwen2(read_model_config(folder))
    files = find_tensors(folder, model)
    model = model.to(dtype).to_empty(device=device)
    views = model.hf_tensors()
    # A file is mapped into memory, where each page that was read counts until the file is closed. So every tensor
    # opens its file anew, the largest first: the peak is the model and hardly more.
    for name in sorted(views, key=lambda name: views[name].nbytes, reverse=True):
        views[name].copy_(read_tensor(files[name], name))
    tied_head = HEAD in files and HEAD not in views
    if tied_head and not torch.equal(read_tensor(files[HEAD], HEAD).to(views[EMBEDDING]), views[EMBEDDING]):
        # transformers 4 ignores such a head, transformers 5 uses it
        raise UserError(f"{folder}: {HEAD} differs from {EMBEDDING}, although {CONFIG} ties them")
    return model


def find_tensors(folder: Path, model: Qwen2) -> dict[str, Path]:
    """The file of each tensor of the model; UserError names those that are missing, unknown, misshaped or there twice.

    A head that is tied to the embedding may be stored all the same, as some tools do.
    """
    shapes = {name: list(view.shape) for name, view in model.hf_tensors().items()}
    allowed = {HEAD: shapes[EMBEDDING], **shapes}
    files: dict[str, Path] = {}
    faults = []
    for path in sorted(folder.glob("model*.safetensors")):
        for name, (shape, dtype) in read_header(path).items():
            if name.endswith(".rotary_emb.inv_freq"):  # a table that old checkpoints hold
                continue
            if name not in allowed:
                faults.append(f"{name} is unknown")
            elif name in files:
                faults.append(f"{name} is in {files[name].name} and in {path.name}")
            elif shape != allowed[name] or dtype not in STORED_TYPES:
                faults.append(f"{name} is {dtype} {shape}, not {'/'.join(STORED_TYPES)} {allowed[name]}")
            files[name] = path
    faults += [f"{name} is missing" for name in shapes if name not in files]
    if faults:
        raise UserError(f"{folder}: model*.safetensors are not the weights that {CONFIG} describes: {listed(faults)}")
    return files


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of each tensor in a safetensors file; opening it checks that it is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged, incomplete or a git-LFS pointer ({error}); fetch it again") from None


# ---- Saving ----------------------------------------------------------------------------------------------------


def read_small_files(folder: Path) -> dict[str, bytes]:
    """What a model folder holds besides its weights: config.json and the tokenizer's files, by name."""
    return {name: (folder / name).read_bytes() for name in (CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()}


def save_model(model: Qwen2, small_files: dict[str, bytes], folder: Path) -> None:
    """Write a Hugging Face folder: the model's weights, and the small files of the folder it came from.

    config.json stays as it was, so that nothing in it is lost, but for the type of the weights. Raises UserError when
    something cannot be written.
    """
    config = json.loads(small_files[CONFIG])
    config.pop("dtype", None)  # the newer name of the next
    config["torch_dtype"] = str(model.head.dtype).removeprefix("torch.")
    with writing(folder):
        for name, content in small_files.items():
            (folder / name).write_bytes(content)
        write_json(folder / CONFIG, config)
        save_tensors(model.hf_tensors(), folder, "model")


def save_tensors(tensors: dict[str, Tensor], folder: Path, stem: str) -> None:
    """Write tensors to stem.safetensors, or to several numbered files and their index.

    The host holds a copy of one such file at most, and none where the tensors are on the CPU.
    """
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].cpu() for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library lets nobody else read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)
