"""Model folders in the Hugging Face format: find one, read one into a Qwen2, write one for transformers.

    folder = find_folder("Qwen/Qwen2.5-3B-Instruct")  # a local folder, or fetched from the hub
    policy = load_model(folder, torch.device("cuda"), torch.bfloat16)
    save_model(policy, folder, Path("runs/mine/final"))

A folder holds config.json, the weights in one or several safetensors files, and the tokenizer's files.
Loading is strict where others guess: whatever changes what the model computes must stand in config.json and
be something that qwen2_model.py covers, and every tensor must be there in its shape. A model that is only
nearly right still trains: quietly, and badly.

Left out: pickled weights (loading one can run code), quantised weights, rope scaling, other architectures.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_types import UserError, shown
from hub import HUB_ID, download
from qwen2_model import Qwen2, Qwen2Config
from tokenizer import TOKENIZER_FILES, read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_folder(path: str, revision: str | None = None) -> Path:
    """The model's folder: `path` itself, or for a hub id ("owner/name") the hub's copy, fetched if need be.

    Raises UserError when there is neither, or the hub cannot be reached or refuses.
    """
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such folder, nor a hub id (owner/name): set model.path")
    wanted = [CONFIG, *TOKENIZER_FILES, "*.safetensors", INDEX]
    return download("model", path, revision, wanted, ignored=["*/*"])  # subfolders hold other forms of it


# ------------------------------------------------------------------------------------------------ config.json

COVERED = {  # the values, as JSON, that qwen2_model.py can compute; a key that is absent is null
    "model_type": ['"qwen2"'],
    "hidden_act": ['"silu"'],
    "tie_word_embeddings": ["true", "false"],
    "use_sliding_window": ["false", "null"],
    "quantization_config": ["null"],
}
BOUNDS = {  # of the numbers, far beyond any model; whole numbers have whole bounds
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**18),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (2, 2**12),
    "rms_norm_eps": (1e-12, 0.1),
    "rope_theta": (1.0, 1e12),
    "max_position_embeddings": (1, 2**31),
}


def read_model_config(folder: str | Path) -> Qwen2Config:
    """The model's shape, from config.json; UserError names the key that is missing, wrong or not covered.

    Nothing that changes the logits has a default, but for head_dim, derived as transformers does.
    """
    path = Path(folder) / CONFIG
    raw = read_json(path)
    for key, covered in COVERED.items():
        if json.dumps(raw.get(key)) not in covered:
            raise wrong(path, raw, key, f"only {' or '.join(covered)} is covered")
    if raw.get("head_dim") is None:
        hidden, heads = (read_number(path, raw, key) for key in ("hidden_size", "num_attention_heads"))
        raw["head_dim"] = hidden // heads
    raw["rope_theta"] = find_rope_theta(path, raw)
    numbers = {key: read_number(path, raw, key) for key in BOUNDS}
    # Key and value heads serve groups of query heads; rotary positions turn pairs of a head's dimensions.
    for key, unit in (("num_attention_heads", numbers["num_key_value_heads"]), ("head_dim", 2)):
        if numbers[key] % unit:
            raise wrong(path, raw, key, f"it must be a multiple of {unit}")
    if raw.get("layer_types") not in (None, ["full_attention"] * numbers["num_hidden_layers"]):
        raise wrong(path, raw, "layer_types", 'only "full_attention" in each layer is covered')
    return Qwen2Config(**numbers, tie_word_embeddings=raw["tie_word_embeddings"])


def find_rope_theta(path: Path, raw: dict[str, Any]) -> Any:
    """The base of the rotary angles: `rope_theta`, which transformers 5 moved into `rope_parameters`.

    What else `rope_parameters` or the older `rope_scaling` holds stretches the positions for long contexts.
    """
    plain = {"rope_type": "default", "type": "default"}
    thetas = [raw.get("rope_theta")]
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        rope = rope if isinstance(rope, dict) else {"type": rope}
        names = sorted(rope.keys() - {"rope_theta"}, reverse=True)  # the type before its factor
        scaling = {name: rope[name] for name in names if rope[name] not in (None, plain.get(name))}
        if scaling:
            raise wrong(path, {key: scaling}, key, "only plain rotary positions are covered")
        thetas.append(rope.get("rope_theta"))
    thetas = [theta for theta in thetas if theta is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise UserError(f"{path}: rope_theta is both {shown(thetas[0])} and {shown(thetas[-1])}; keep one")
    return thetas[0] if thetas else None


def read_number(path: Path, raw: dict[str, Any], key: str) -> int | float:
    """raw[key], if it is a number within BOUNDS."""
    low, high = BOUNDS[key]
    value, kind = raw.get(key), type(low)
    if type(value) not in (int, kind) or not low <= value <= high:  # bool is no number here, nor is NaN
        raise wrong(path, raw, key, f"it must be a {'whole ' * (kind is int)}number from {low} to {high}")
    return kind(value)


def wrong(path: Path, raw: dict[str, Any], key: str, advice: str) -> UserError:
    """The error for a key of config.json."""
    value = "missing" if raw.get(key) is None else shown(json.dumps(raw[key]))
    return UserError(f"{path}: {key} is {value}; {advice}")


# --------------------------------------------------------------------------------------------------- loading

STORED_TYPES = ("BF16", "F16", "F32")


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Qwen2:
    """The model of a folder, its weights in `dtype` on `device`, whatever type they have on the disk.

    Raises UserError for a config.json that is not covered, files that are missing or damaged, and tensors
    that are not the model's; nothing is allocated before.
    """
    folder = Path(folder)
    with torch.device("meta"):  # shapes without memory
        model = Qwen2(read_model_config(folder))
    files = find_tensors(folder, model)
    model = model.to(dtype).to_empty(device=device)
    views = model.hf_tensors()
    # The library maps a file into memory, where each page that was read counts until the file is closed. So
    # every tensor opens its file anew, the largest first: the peak is the model and hardly more.
    for name in sorted(views, key=lambda name: views[name].nbytes, reverse=True):
        with safe_open(files[name], framework="pt") as file:
            views[name].copy_(file.get_tensor(name))
    if HEAD in files and HEAD not in views:
        # transformers 4 ignores a head that should be tied but differs, transformers 5 uses it.
        with safe_open(files[HEAD], framework="pt") as file:
            if not torch.equal(file.get_tensor(HEAD).to(views[EMBEDDING]), views[EMBEDDING]):
                raise UserError(f"{folder}: {HEAD} differs from {EMBEDDING}, although {CONFIG} ties them; "
                                "set tie_word_embeddings to false there if the head counts")  # fmt: skip
    return model


def find_tensors(folder: Path, model: Qwen2) -> dict[str, Path]:
    """The file of each tensor of the model; UserError names those that are missing, unknown or misshaped.

    A head that is tied to the embedding may be stored all the same, as some tools do.
    """
    shapes = {name: list(view.shape) for name, view in model.hf_tensors().items()}
    allowed = {HEAD: shapes[EMBEDDING], **shapes}
    files, unknown, unfit = {}, [], []
    for path in weight_files(folder):
        for name, (shape, dtype) in read_header(path).items():
            if name in allowed:
                files[name] = path
                if shape != allowed[name] or dtype not in STORED_TYPES:
                    unfit.append(f"{name} is {dtype} {shape}, not {'/'.join(STORED_TYPES)} {allowed[name]}")
            elif not name.endswith(".rotary_emb.inv_freq"):  # a table that old checkpoints hold
                unknown.append(name)
    faults = {"missing": [name for name in shapes if name not in files], "unknown": unknown, "unfit": unfit}
    told = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
    if told:
        raise UserError(f"{folder}: the weights are not those that {CONFIG} describes: {told}")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The one file of a model's weights, or all that its index names."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not index.exists():
        raise UserError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; no other weights are read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: weight_map must be an object that names the file of each tensor")
    names = {str(name) for name in weight_map.values()}
    absent = names - {path.name for path in folder.iterdir()}  # which "../elsewhere" is, too
    if absent:
        raise UserError(f"{index}: names files that are not in its folder: {listed(sorted(absent))}")
    return [folder / name for name in sorted(names)]


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and type of each tensor in a safetensors file; opening it checks that it is whole."""
    try:
        with open(path, "rb") as file:
            if file.read(20) == b"version https://git-":
                raise UserError(f"{path}: a git-LFS pointer, not the weights: run `git lfs pull` there")
        with safe_open(path, framework="pt") as file:
            slices = ((name, file.get_slice(name)) for name in file.keys())
            return {name: (part.get_shape(), part.get_dtype()) for name, part in slices}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged, cut short or not safetensors ({error}); fetch it again") from None


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# ---------------------------------------------------------------------------------------------------- saving

SHARD_BYTES = 5 * 10**9  # the most that one file of weights holds


def save_model(model: Qwen2, source: str | Path, folder: str | Path) -> None:
    """Write a Hugging Face folder: the model's weights, with tokenizer and settings of the folder `source`.

    config.json is that of `source`, so that nothing in it is lost, with the type of the weights as they are
    now. Raises UserError when something cannot be written.
    """
    source, folder = Path(source), Path(folder)
    with writing(folder):
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    save_weights(model, folder, read_json(source / CONFIG))


def save_weights(model: Qwen2, folder: Path, config: dict[str, Any], most_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and the weights, in files of at most `most_bytes`, or of one tensor if it is more."""
    tensors = model.hf_tensors()
    config = {key: value for key, value in config.items() if key != "dtype"}  # the newer name of the next
    config["torch_dtype"] = str(model.head.dtype).removeprefix("torch.")
    with writing(folder):
        for old in folder.glob("model*.safetensors*"):
            old.unlink()  # of an earlier save: a reader would mix it with this one
        write_json(folder / CONFIG, config)
        weight_map = save_tensors(tensors, folder, "model", most_bytes)
        if WEIGHTS not in weight_map.values():
            total = sum(tensor.nbytes for tensor in tensors.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_tensors(tensors: dict[str, Tensor], folder: Path, stem: str, most_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write tensors to stem.safetensors, or to several numbered files; returns the name of each tensor's file.

    The host holds a copy of one such file at most, and none where the tensors are on the CPU.
    """
    places = assign_files(tensors, stem, most_bytes)
    for file in sorted(set(places.values())):
        on_host = {name: tensors[name].cpu().contiguous() for name in tensors if places[name] == file}
        save_file(on_host, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)  # the library lets nobody else read it
        del on_host  # before the next file's tensors come to the host
    return places


def assign_files(tensors: dict[str, Tensor], stem: str, most_bytes: int) -> dict[str, str]:
    """The name of the file that each tensor goes to; a file ends before it would pass `most_bytes`."""
    numbers, count, size = {}, 1, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > most_bytes and numbers:
            count, size = count + 1, tensor.nbytes
        numbers[name] = count
    if count == 1:
        return dict.fromkeys(tensors, f"{stem}.safetensors")
    return {name: f"{stem}-{number:05}-of-{count:05}.safetensors" for name, number in numbers.items()}


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder; what goes wrong in writing to it becomes one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

