"""Model folders: read as transformers reads them, written so that it reads them, refused in one clear line.

transformers is the independent judge: it writes the folders that are read here, and reads those that are written.
Every parameter is random: at their first values biases are zero and norms are one, and losing them would not show.
"""

import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_hub import small_hub
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config as ReferenceConfig, Qwen2ForCausalLM

import hub
import model_folder
from data_types import ModelSettings, UserError
from model_folder import find_folder, load_model, read_model_config, read_small_files, save_model
from qwen2_model import Qwen2, Qwen2Config
from tokenizer import TOKENIZER_FILES

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


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder that transformers wrote, the head tied, all in one file."""
    folder = tmp_path_factory.mktemp("written")
    reference_model().save_pretrained(folder)
    edit(folder, {"rope_parameters": ..., "rope_theta": 1e4})  # as published models have it
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def our_logits(model: Qwen2) -> Tensor:
    return model.logits(model(TOKENS).flatten(0, 1)).view(*TOKENS.shape, -1)


def error_of(action, *arguments: object) -> str:
    """The UserError that the call must end in: one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def edit(folder: Path, changes: dict[str, object]) -> None:
    """Set keys of config.json, and tensors, whose names have dots; or take them out (`...`)."""
    content = {**json.loads((folder / CONFIG).read_text()), **load_file(folder / WEIGHTS), **changes}
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps({name: content[name] for name in content if "." not in name}))
    save_file({name: content[name] for name in content if "." in name}, folder / WEIGHTS)


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def shard(folder: Path) -> None:
    """Turn model.safetensors into two files, without an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for half, name in enumerate((FIRST, SECOND)):
        save_file({tensor: tensors[tensor] for tensor in list(tensors)[half::2]}, folder / name)


FORMS = [{"head_dim": 6}, {"rope_parameters": PLAIN_ROPE}, {"rms_norm_eps": 0.01}, {"tie_word_embeddings": False}, {}]
STORED = [*((torch.float32, form) for form in FORMS), (BF16, FORMS[-1]), (torch.float16, FORMS[-2])]


@pytest.mark.parametrize("shard_bytes", [10**9, 6000])
@pytest.mark.parametrize(("stored", "changes"), STORED)
def test_from_transformers_and_back(stored, changes, shard_bytes, tmp_path, monkeypatch):
    """Another order of heads or a lost bias would show in the logits. What only a model's authors know stays, and the
    source may be gone by then: a checkpoint that the run has removed since."""
    source, saved = tmp_path / "source", tmp_path / "new" / "saved"
    reference_model(**changes).to(stored).save_pretrained(source, max_shard_size=shard_bytes)
    model, theirs = load(source), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert (our_logits(model) - theirs(TOKENS).logits).abs().max() < 1e-5
    tensors = theirs.to(BF16).state_dict()
    assert all(torch.equal(view, tensors[name]) for name, view in load(source, dtype=BF16).hf_tensors().items())
    our_logits(model).sum().backward()  # parameters filled in place still have gradients
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    monkeypatch.setattr(model_folder, "SHARD_BYTES", shard_bytes)
    text, config = '{"é": "\\u00e9"}\r\n'.encode(), json.loads((source / CONFIG).read_text())
    for name in (*TOKENIZER_FILES, "pytorch_model.bin"):
        (source / name).write_bytes(text)
    config |= {"mine": {"a": [1]}, "dtype": "float16", "torch_dtype": "float16"}  # its newer name, its older name
    small_files = {**read_small_files(source), CONFIG: json.dumps(config).encode()}
    shutil.rmtree(source)
    save_model(model, small_files, saved)
    del config["dtype"]
    assert json.loads((saved / CONFIG).read_text()) == {**config, "torch_dtype": "float32"}
    assert all((saved / name).read_bytes() == text for name in TOKENIZER_FILES)
    assert torch.equal(our_logits(load(saved)), our_logits(model))
    opened, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert opened.dtype == torch.float32
    assert (our_logits(model) - opened(TOKENS).logits).abs().max() < 1e-5
    assert not any(report.values())  # nothing missing, nothing unexpected
    files = {path.name: load_file(path) for path in sorted(saved.glob("*.safetensors"))}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files.values()]
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {INDEX: {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}} if shard_bytes == 6000 else {}
    assert max(sizes) <= shard_bytes
    assert (len(files) > 2) == (WEIGHTS not in files) == (shard_bytes == 6000)
    assert {path.name for path in saved.iterdir()} == {*TOKENIZER_FILES, CONFIG, *files, *index}
    assert all(json.loads((saved / name).read_text()) == content for name, content in index.items())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in saved.iterdir())  # others may read it


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_may_lie_in_a_folder(dtype, folder):
    """Old checkpoints hold the rotary table of each layer, some tools write the tied head once more, a trainer keeps
    its optimizer there, an index may be out of date or lost, and in a cache all files are links."""
    expected = our_logits(load(folder, dtype=dtype))
    table, head = torch.ones(2).double(), load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    edit(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": table, "lm_head.weight": head.clone()})
    assert torch.equal(our_logits(load(folder, dtype=dtype)), expected)
    shutil.copy(folder / WEIGHTS, folder / "optimizer.safetensors")
    (folder / "adapter_model.safetensors").write_text("damaged")
    (folder / INDEX).write_text('{"weight_map": 5}')
    shard(folder)
    for name, target in ((FIRST, "b"), (SECOND, "a")):
        (folder / name).rename(folder / target)
        (folder / name).symlink_to(target)
    assert torch.equal(our_logits(load(folder, dtype=dtype)), expected)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure the peak")
def test_loading_and_saving_take_the_memory_of_one_model(tmp_path, monkeypatch):
    """A mapped file counts beside the model: the plain way to load needs twice the checkpoint."""
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 2**26)
    large = reference_model(vocab_size=65536, hidden_size=512, intermediate_size=2560, num_hidden_layers=5).to(BF16)
    large.save_pretrained(tmp_path, max_shard_size=2**26)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    status = Path("/proc/self/status").read_text
    before = int(re.search(r"VmRSS:\s+(\d+) kB", status())[1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts again from the present
    save_model(load(tmp_path, dtype=BF16), read_small_files(tmp_path), tmp_path / "again")
    peak = 1024 * (int(re.search(r"VmHWM:\s+(\d+) kB", status())[1]) - before)
    assert 1e8 < 0.9 * size < peak < 1.2 * size


@pytest.mark.parametrize("limit", [0, 1000, 20000])
def test_a_failed_write_is_one_line(limit, folder, tmp_path):
    """The system refuses to let a file grow: the next best thing to a full disk. Or a file has the folder's name."""
    model, small_files, before = load(folder), read_small_files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert re.match(f"{tmp_path}/a: .*File too large", error_of(save_model, model, small_files, tmp_path / "a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (tmp_path / "b").write_text("")
    assert re.match(f"{tmp_path}/b: .*File exists", error_of(save_model, model, small_files, tmp_path / "b"))


COVERED = [  # keys of config.json, and what they change in the model
    ({"sliding_window": 32768, "max_window_layers": 24, "use_mrope": False, "rope_scaling": None}, {}),
    ({"torch_dtype": "float16", "dtype": ..., "use_sliding_window": ..., "pad_token_id": 7, "head_dim": None}, {}),
    ({"layer_types": ..., "head_dim": 128, "rms_norm_eps": 1e-05}, {"head_dim": 128, "rms_norm_eps": 1e-05}),
    ({"rope_theta": 5000, "rope_parameters": PLAIN_ROPE}, {"rope_theta": 5000.0}),
    ({"rope_theta": ..., "rope_scaling": PLAIN_ROPE}, {"rope_theta": 5000.0}),
    ({"rope_scaling": {"type": "default", "rope_type": "default"}, "rope_parameters": {}}, {}),
    ({"rope_parameters": {"rope_theta": 5000.0}, "rope_theta": None}, {"rope_theta": 5000.0}),
]


@pytest.mark.parametrize(("changes", "expected"), COVERED)
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
    "model_type": ["llama", "qwen2_moe", ["qwen2"], None, ...],
    "hidden_act": ["gelu", ...],
    "use_sliding_window": [True, "false"],
    "quantization_config": [{"bits": 4}, {}],
    "tie_word_embeddings": [..., 1, "true"],
    "rope_scaling": ROPES,
    "rope_parameters": [*ROPES, {"full_attention": PLAIN_ROPE}],
    "layer_types": [["full_attention", "sliding_attention"], ["full_attention"], 5],
}
JUNK = [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html>404</html>", b"PK\3\4" + bytes(9)]
NORM, EMBEDDING, DOWN = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
OTHER_TYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32", torch.float64: "F64"}
DAMAGES = [  # what is done to the folder, and what the line must say
    *(({key: value}, f"{CONFIG}: {key} is ") for key, values in REFUSED.items() for value in values),
    ({"rope_parameters": PLAIN_ROPE}, f"{CONFIG}: rope_theta is "),
    ({"rope_theta": "x" * 9000, "rope_parameters": PLAIN_ROPE}, f"{CONFIG}: rope_theta is "),
    ({"num_key_value_heads": 3}, f"{CONFIG}: num_attention_heads is 4"),
    ({"hidden_size": 3, "head_dim": None}, f"{CONFIG}: head_dim is 0"),
    (dict.fromkeys(["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"], 2**24), "head"),
    ({"vocab_size": 2**24, "intermediate_size": 2**20}, "[16777216, 16]"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ({"num_hidden_layers": 1, "layer_types": None}, "model.layers.1.input_layernorm.weight is unknown"),
    ({"num_hidden_layers": 3, "layer_types": None}, "model.layers.2.self_attn.q_proj.weight is missing"),
    ({"num_key_value_heads": 4}, "layers.0.self_attn.k_proj.bias is F32 [8], not BF16/F16/F32 [16]"),
    ({NORM: torch.ones(17), EMBEDDING: torch.ones(976)}, f"{NORM} is F32 [17]", f"{EMBEDDING} is F32"),
    ({DOWN: torch.ones(24, 16)}, f"{DOWN} is F32 [24, 16], not BF16/F16/F32 [16, 24]"),
    *(({NORM: torch.ones(16).to(dtype)}, f"{NORM} is {name} [16]") for dtype, name in OTHER_TYPES.items()),
    ({NORM: ..., "v_head.weight": torch.ones(1)}, f"{NORM} is missing", "v_head.weight is unknown"),
    ({"lm_head.weight": torch.ones(61, 16)}, f"lm_head.weight differs from {EMBEDDING}"),
    ({"lm_head.weight": torch.ones(60, 16)}, "lm_head.weight is F32 [60, 16]"),
    *((rewrite(lambda b, n=n: b[:n]), f"{WEIGHTS}: ") for n in (0, 5, 100, 3000, -1)),
    *((rewrite(lambda b, new=new: new), f"{WEIGHTS}: ", "git-LFS pointer") for new in JUNK),
    *((rewrite(change), f"{WEIGHTS}: ") for change in (lambda b: b + b"\0", lambda b: b"\xff" * 8 + b[8:])),
    (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), f"{EMBEDDING} is missing"),
    (lambda f: (f / SECOND).symlink_to("gone"), f"{SECOND}: "),
    (lambda f: shutil.copy(f / WEIGHTS, f / FIRST), f"is in {FIRST} and in {WEIGHTS}"),
    (lambda f: (shard(f), os.truncate(f / SECOND, 2000)), f"{SECOND}: "),
]


@pytest.mark.parametrize("row", DAMAGES)
def test_damaged_folders_are_refused_by_name(row, folder):
    damage, *words = row
    edit(folder, damage) if isinstance(damage, dict) else damage(folder)
    line = error_of(load, folder)
    assert all(word in line for word in (str(folder), *words)), line


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_flipped_and_lost_bytes_never_end_in_a_traceback(name, folder):
    """Either a model or one line. A flip in the weights cannot be noticed; one in the header mostly is."""
    content, rng, lines = (folder / name).read_bytes(), random.Random(name), []
    for attempt in range(200):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[int(len(content) * rng.random() ** 3)] ^= 1 << rng.randrange(8)  # mostly early: the header
        (folder / name).write_bytes(damaged if attempt % 10 else damaged[: rng.randrange(len(content))])
        try:
            load(folder)
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 80
    assert all(line.startswith(str(folder)) and len(line) < 1000 for line in lines)


def find(path: str, revision: str = "main") -> Path:
    return find_folder(ModelSettings(path=path, revision=revision))


def test_models_of_the_hub(tmp_path, monkeypatch):
    """Only what is needed is downloaded, once, and then found without a network; each failure is told as what it is."""
    needed = [CONFIG, FIRST, SECOND, *TOKENIZER_FILES]
    spare = ["README.md", "pytorch_model.bin", "checkpoint-50/model.safetensors", "models/x.safetensors"]
    refused = {"lab/model": "RevisionNot", "no/such": "RepositoryNot", "gated/model": "GatedRepo", "a--b/c": "HFValid"}
    with small_hub({name: name.encode() for name in needed + spare}) as endpoint:
        here = partial(hub.snapshot_download, endpoint=endpoint, cache_dir=tmp_path, token=False)
        monkeypatch.setattr(hub, "snapshot_download", here)
        folder = find("lab/model")
        lines = [(error_of(find, name, "v9"), name, word) for name, word in refused.items()]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == set(needed)
    assert find("lab/model") == folder  # the server is gone
    lines.append((error_of(find, "no/such"), "no/such", "LocalEntryNotFound"))
    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=OSError(28, "No space left")))  # a full disk
    lines.append((error_of(find, "lab/model"), "lab/model", "No space left"))
    monkeypatch.chdir(tmp_path)
    Path("lab/model").mkdir(parents=True)
    assert find("lab/model", "v1") == Path("lab/model")  # a folder counts more than the hub
    assert all(re.match(f"{name}: .*{word}.*model.path.*HF_TOKEN", line) for line, name, word in lines), lines
