"""Model folders: read as transformers reads them, written so that it reads them, refused in one clear line.

Every parameter is random: at their first values biases are zero and norms are one, and losing them would not show.
"""

import io
import json
import os
import re
import resource
import shutil
from contextlib import nullcontext, redirect_stderr
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config as ReferenceConfig, Qwen2ForCausalLM

from data_types import DataSettings, ModelSettings
from plumbing import model_folder
from plumbing.model_folder import TOKENIZER_FILES, load_model, read_model_config, read_small_files, save_model
from plumbing.terminal import UserError, exit_status
from qwen2_model import Qwen2, Qwen2Config
from small_hub import small_hub

BF16, TOKENS = torch.bfloat16, torch.arange(24).view(2, 12) % 61
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
load = partial(load_model, device=torch.device("cpu"), dtype=torch.float32)


def reference_model(**changes: object) -> Qwen2ForCausalLM:
    shape = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "rope_theta": 1e4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(ReferenceConfig(**{**shape, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + noise if "norm" in name else noise)
    return model


@pytest.fixture(scope="module")  # by transformers
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    reference_model().save_pretrained(folder)
    edit(folder, {"rope_parameters": ..., "rope_theta": 1e4})  # as published models have it
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def our_logits(model: Qwen2) -> Tensor:
    return model.logits(model(TOKENS).flatten(0, 1)).view(*TOKENS.shape, -1)


def edit(folder: Path, changes: dict[str, object]) -> None:
    """Set keys of config.json, and tensors, whose names have dots; or take them out (`...`)."""
    content = {**json.loads((folder / CONFIG).read_text()), **load_file(folder / WEIGHTS), **changes}
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps({name: content[name] for name in content if "." not in name}))
    save_file({name: content[name] for name in content if "." in name}, folder / WEIGHTS)


FORMS = [{"head_dim": 6}, {"rope_parameters": PLAIN_ROPE}, {"rms_norm_eps": 0.01}, {"tie_word_embeddings": False}, {}]
STORED = [*((torch.float32, form, 6000) for form in FORMS), (torch.float32, {}, 10**9), (BF16, {}, 10**9),
          (torch.float16, {"tie_word_embeddings": False}, 10**9)]  # fmt: skip


@pytest.mark.parametrize(("stored", "changes", "shard_bytes"), STORED)
def test_from_transformers_and_back(stored, changes, shard_bytes, tmp_path, monkeypatch):
    """Another order of heads or a lost bias would show in the logits. The source may be gone when a run is saved."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    reference_model(**changes).to(stored).save_pretrained(source, max_shard_size=shard_bytes)
    model, theirs = load(source), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert (our_logits(model) - theirs(TOKENS).logits).abs().max() < 1e-5
    tensors = theirs.to(BF16).state_dict()
    assert all(torch.equal(view, tensors[name]) for name, view in load(source, dtype=BF16).hf_tensors().items())
    our_logits(model).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    monkeypatch.setattr(model_folder, "SHARD_BYTES", shard_bytes)
    text, config = '{"é": "\\u00e9"}\r\n'.encode(), json.loads((source / CONFIG).read_text())
    for name in (*TOKENIZER_FILES, "pytorch_model.bin"):
        (source / name).write_bytes(text)
    config |= {"mine": {"a": [1]}, "dtype": "float16", "torch_dtype": "float16"}  # its newer name, its older name
    small_files = {**read_small_files(source), CONFIG: json.dumps(config).encode()}
    shutil.rmtree(source)
    saved.mkdir()
    save_model(model, small_files, saved)
    del config["dtype"]
    assert json.loads((saved / CONFIG).read_text()) == {**config, "torch_dtype": "float32"}
    assert all((saved / name).read_bytes() == text for name in TOKENIZER_FILES)
    opened, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert opened.dtype == torch.float32
    assert torch.equal(our_logits(load(saved)), our_logits(model))
    assert (our_logits(model) - opened(TOKENS).logits).abs().max() < 1e-5
    assert not any(report.values())  # nothing missing, nothing unexpected
    files = {path.name: path for path in saved.iterdir()}
    weights = [name for name in files if name.endswith(".safetensors")]
    assert max(sum(tensor.nbytes for tensor in load_file(files[name]).values()) for name in weights) <= shard_bytes
    assert (len(weights) > 2) == (INDEX in files) == (shard_bytes == 6000)
    assert files.keys() - {INDEX} == {*TOKENIZER_FILES, CONFIG, *weights}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_may_lie_in_a_folder(dtype, folder):
    """Some tools write the tied head once more, a trainer keeps its optimizer there, an index may be out of date or
    lost, and in a cache all files are links."""
    expected, head = our_logits(load(folder, dtype=dtype)), load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    edit(folder, {"lm_head.weight": head.clone()})
    assert torch.equal(our_logits(load(folder, dtype=dtype)), expected)
    shutil.copy(folder / WEIGHTS, folder / "optimizer.safetensors")
    tensors, index = load_file(folder / WEIGHTS), {}
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    assert torch.equal(our_logits(load(folder, dtype=dtype)), expected)  # an index left over
    (folder / "adapter_model.safetensors").write_text("damaged")
    (folder / WEIGHTS).unlink()
    for half, name in enumerate((FIRST, SECOND)):
        index |= dict.fromkeys(list(tensors)[half::2], name)
        save_file({tensor: tensors[tensor] for tensor in list(tensors)[half::2]}, folder / f"{name}.blob")
        (folder / name).symlink_to(f"{name}.blob")
    assert torch.equal(our_logits(load(folder, dtype=dtype)), expected)
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / WEIGHTS)  # stale, and not in the index
    shutil.copy(folder / WEIGHTS, folder / "model.fp16.safetensors")
    assert torch.equal(our_logits(load(folder, dtype=dtype)), expected)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure the peak")
def test_loading_and_saving_take_the_memory_of_one_model(folder, monkeypatch):
    """A mapped file counts beside the model: the plain way to load needs twice the checkpoint."""
    shape = {"vocab_size": 2**14, "hidden_size": 512, "intermediate_size": 2560, "num_hidden_layers": 10}
    edit(folder, {**shape, "layer_types": None})
    (folder / WEIGHTS).unlink()
    with torch.device("meta"):
        tensors = Qwen2(read_model_config(folder)).hf_tensors()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: torch.ones(tensor.shape, dtype=BF16)}, folder / f"model-{number}.safetensors")
    size, again = 2 * sum(tensor.numel() for tensor in tensors.values()), folder / "again"
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 2**24)
    again.mkdir()
    status = Path("/proc/self/status").read_text
    before = int(re.search(r"VmRSS:\s+(\d+) kB", status())[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts again from the present
    save_model(load(folder, dtype=BF16), read_small_files(folder), again)
    peak = 1024 * (int(re.search(r"VmHWM:\s+(\d+) kB", status())[1]) - before)
    assert 0.5 * size < peak < 1.4 * size


@pytest.mark.parametrize("limit", [0, 1000, 20000])
def test_a_failed_write_is_one_line(limit, folder, tmp_path):
    """The system refuses to let a file grow: the next best thing to a full disk."""
    model, small_files, before = load(folder), read_small_files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with redirect_stderr(io.StringIO()) as said:
            assert exit_status("program", lambda: save_model(model, small_files, tmp_path)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch("program: .*File too large.*\n", said.getvalue())


@pytest.mark.parametrize(("changes", "expected"), [  # keys of config.json, and what they change in the model
    ({"sliding_window": 32768, "max_window_layers": 24, "use_mrope": False, "rope_scaling": None}, {}),
    ({"torch_dtype": "float16", "dtype": ..., "use_sliding_window": ..., "pad_token_id": 7, "head_dim": None}, {}),
    ({"layer_types": ..., "head_dim": 128, "rms_norm_eps": 1e-05}, {"head_dim": 128, "rms_norm_eps": 1e-05}),
    ({"rope_scaling": {"type": "default", "rope_type": "default"}, "rope_parameters": {}}, {}),
    *(({"rope_theta": theta, key: value}, {"rope_theta": 5000.0}) for theta, key, value in (
        (5000, "rope_parameters", PLAIN_ROPE), (..., "rope_scaling", PLAIN_ROPE),
        (None, "rope_parameters", {"rope_theta": 5000.0}))),
])  # fmt: skip
def test_configs_in_the_wild(changes, expected, folder):
    """Fine-tunes write the same model in many ways; transformers' own reading is the judge."""
    edit(folder, changes)
    config, theirs = read_model_config(folder), ReferenceConfig.from_pretrained(folder)
    assert repr(config) == repr(replace(Qwen2Config(61, 16, 24, 2, 4, 2, 4, 1e-6, 1e4, True, 32768), **expected))
    assert {"rope_theta": config.rope_theta, "rope_type": "default"}.items() <= theirs.rope_parameters.items()
    assert (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads) == config.head_dim
    assert set(theirs.layer_types) == {"full_attention"}


NO_NUMBER = ["7", "x" * 9000, [7], {}, True, 0, -7, 10**13, 10**400, float("nan"), float("inf")]
LLAMA3 = {"rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
ROPES = [LLAMA3, {"type": "yarn"}, {"rope_type": "default", "type": "linear"}, {"factor": 2.0}, "yarn", 5]
REFUSED = {  # values of each key: nothing that changes the logits is guessed
    **{field.name: [..., None, *NO_NUMBER, 7.0] for field in fields(Qwen2Config) if field.type is int},
    **{key: [..., None, *NO_NUMBER] for key in ("rms_norm_eps", "rope_theta")},
    "head_dim": [*NO_NUMBER, 7.0, 7],  # it may be absent
    "model_type": ["llama", "qwen2_moe", ["qwen2"], None, ...], "hidden_act": ["gelu", ...],
    "use_sliding_window": [True, "false"], "quantization_config": [{"bits": 4}, {}],
    "tie_word_embeddings": [..., 1, "true"], "rope_scaling": ROPES,
    "rope_parameters": [*ROPES, {"full_attention": PLAIN_ROPE}],
}  # fmt: skip
JUNK = [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html>404</html>", b"PK\3\4" + bytes(9)]
NORM, EMBEDDING, DOWN = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
DAMAGES = [  # what is done to the folder, and what the line must say
    *(({key: value}, f"{CONFIG}: {key} is ") for key, values in REFUSED.items() for value in values),
    ({"num_key_value_heads": 3}, f"{CONFIG}: num_attention_heads is 4"),
    ({"hidden_size": 3, "head_dim": None}, f"{CONFIG}: head_dim is 0"),
    (dict.fromkeys(["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"], 2**20), "embed_tokens"),
    ({"vocab_size": 2**20, "intermediate_size": 2**20}, "embed_tokens.weight"),
    ({"tie_word_embeddings": False}, "lm_head.weight"), ({"num_key_value_heads": 4}, "layers.0.self_attn.k_proj.bias"),
    *(({"num_hidden_layers": n, "layer_types": None}, f"layers.{m}.input_layernorm") for n, m in ((1, 1), (3, 2))),
    ({NORM: torch.ones(17), EMBEDDING: torch.ones(976)}, "norm.weight", "embed_tokens.weight"),
    ({DOWN: torch.ones(24, 16)}, "mlp.down_proj.weight"), ({NORM: torch.ones(16, 1)}, "norm.weight"),
    *(({NORM: torch.ones(16).to(dtype)}, "norm.weight", f"{dtype}") for dtype in (torch.float8_e4m3fn, torch.int8,
     torch.int32, torch.float64, torch.bool)),
    ({NORM: ..., "v_head.weight": torch.ones(1)}, '"norm.weight"', "v_head.weight"),
    *(({"lm_head.weight": torch.ones(rows, 16)}, "lm_head.weight") for rows in (60, 61)),
    (lambda f: shutil.copy(f / WEIGHTS, f / FIRST), "twice"),
    *((lambda f, new=new: (f / WEIGHTS).write_bytes(new), f"{WEIGHTS}: ", "git-LFS pointer") for new in JUNK),
    *((lambda f, n=n: os.truncate(f / WEIGHTS, n), f"{WEIGHTS}: ") for n in (0, 5, 100, 3000, 99999)),
    (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pytorch_model.bin", "save_pretrained"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json", "merge_and_unload"),
    (lambda f: (f / SECOND).symlink_to("gone"), f"{SECOND}: "), (lambda f: (f / FIRST).write_bytes(b"x"), f"{FIRST}: "),
]  # fmt: skip


@pytest.mark.parametrize("row", DAMAGES)
def test_damaged_folders_are_refused_by_name(row, folder):
    damage, *words = row
    edit(folder, damage) if isinstance(damage, dict) else damage(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert [word for word in (str(folder), *words) if word not in str(caught.value)] == [], caught.value
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("kind", "section", "needed"), [
    (ModelSettings, "model", {CONFIG, FIRST, SECOND, INDEX, *TOKENIZER_FILES}),
    (DataSettings, "data", {"data/0.parquet"}),
])  # fmt: skip
def test_models_and_data_sets_of_the_hub(kind, section, needed, tmp_path, monkeypatch):
    """Only what is needed is downloaded, once, and then found without a network; each failure is told as what it is."""
    spare = {"README.md", "pytorch_model.bin", "checkpoint-50/model.safetensors", "models/x.safetensors"}
    spare |= {WEIGHTS, "merges.txt", "vocab.json"}  # the index does not name it; nothing here reads the other two
    index = {INDEX: json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode()} if section == "model" else {}
    refused = {"lab/any": "RevisionNot", "no/such": "RepositoryNot", "gated/model": "GatedRepo", "a--b/c": "HFValid"}

    def find(path: str, revision: str = "main", why: str = "") -> Path:
        with pytest.raises(UserError, match=f"^{path}: .*{why}.*{section}.path.*HF_TOKEN") if why else nullcontext():
            return model_folder.find_folder(kind(path=path, revision=revision))

    with small_hub({name: name.encode() for name in spare | needed} | index) as endpoint:
        here = partial(model_folder.snapshot_download, endpoint=endpoint, cache_dir=tmp_path, token=False)
        monkeypatch.setattr(model_folder, "snapshot_download", here)
        folder = find("lab/any")
        for name, why in refused.items():
            find(name, "v9", why)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == needed
    assert find("lab/any") == folder  # the server is gone
    find("no/such", why="LocalEntryNotFound")
    monkeypatch.setattr(model_folder, "snapshot_download", Mock(side_effect=OSError(28, "No space left")))
    find("lab/any", why="No space left")
    monkeypatch.chdir(tmp_path)
    Path("lab/any").mkdir(parents=True)
    assert find("lab/any", "v1") == Path("lab/any")  # a folder counts more than the hub
