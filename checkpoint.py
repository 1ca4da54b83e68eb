"""Model folders in the Hugging Face format: read one into a Qwen2, write one that transformers can open."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data_types import UserError
from qwen2_model import Qwen2, Qwen2Config
from tokenizer import TOKENIZER_FILES, read_json


def read_model_config(folder: Path) -> Qwen2Config:
    raw = read_json(folder / "config.json")
    heads = raw["num_attention_heads"]
    return Qwen2Config(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
        num_key_value_heads=raw["num_key_value_heads"], head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_norm_eps=raw["rms_norm_eps"], rope_theta=raw["rope_theta"], tie_word_embeddings=raw["tie_word_embeddings"],
        max_position_embeddings=raw["max_position_embeddings"],
    )


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Qwen2:
    folder = Path(folder)
    with torch.device("meta"):
        model = Qwen2(read_model_config(folder))
    model = model.to(dtype).to_empty(device=device)
    with safe_open(folder / "model.safetensors", framework="pt") as file, torch.no_grad():
        for name, view in model.hf_tensors().items():
            view.copy_(file.get_tensor(name))
    return model


def write_model(model: Qwen2, folder: str | Path, end_id: int, pad_id: int) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: view.contiguous() for name, view in model.hf_tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", **asdict(model.config),
              "torch_dtype": "float32", "use_sliding_window": False, "bos_token_id": pad_id, "eos_token_id": end_id}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_model(model: Qwen2, source: str | Path, folder: str | Path) -> None:
    """Write `model` as a Hugging Face folder; tokenizer and generation settings come from the folder `source`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            shutil.copy(Path(source) / name, folder / name)
    generation = read_json(folder / "generation_config.json")
    write_model(model, folder, generation["eos_token_id"][0], generation["pad_token_id"])
