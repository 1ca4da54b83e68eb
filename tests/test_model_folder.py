"""Model folders: read as transformers reads them, written so that it reads them, refused in one clear line.

transformers is the independent party throughout: it writes the folders that are read here, and reads those
that are written. Every parameter is random, for at their first values biases are zero and norms one, and
losing them would show nowhere.
"""

import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_hub import small_hub
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers import Qwen2Config as ReferenceConfig

import hub
from model_folder import find_folder, load_model, read_model_config, save_model, save_weights
from data_types import UserError
from qwen2_model import Qwen2, Qwen2Config, head_logits

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHAPE = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) % 61
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
files = pytest.mark.parametrize("most_bytes", [10**9, 6000], ids=["one file", "shards"])


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)


def reference_model(tied: bool, **changes: object) -> Qwen2ForCausalLM:
    settings = {**SHAPE, "rope_theta": 1e4, "tie_word_embeddings": tied, **changes}
    model = Qwen2ForCausalLM(ReferenceConfig(**settings)).eval()
    randomise(model)
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[bool, Path]:
    """Folders written by transformers, tied and untied; tests change copies of them."""
    folders = {tied: tmp_path_factory.mktemp("written") for tied in (True, False)}
    for tied, folder in folders.items():
        reference_model(tied).save_pretrained(folder)
    return folders


def small_model(tied: bool) -> Qwen2:
    rest = dict(head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=tied)
    model = Qwen2(Qwen2Config(**SHAPE, **rest))
    randomise(model)
    return model


@torch.no_grad()
def our_logits(model: Qwen2) -> Tensor:
    return head_logits(model(TOKENS).flatten(0, 1), model.head).view(*TOKENS.shape, -1)


@torch.no_grad()
def their_logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen2:
    return load_model(folder, CPU, dtype)


def said(action: Callable, *arguments: object) -> str:
    """What the UserError says that the call must end in: one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file, or take them out (`...`)."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """Add, replace or take out (None) tensors; `__` in a name stands for its dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@files
@ties
def test_loads_what_transformers_wrote(tied, most_bytes, stored, tmp_path):
    """Whatever the files and their type; another order of heads or a lost bias would show in the logits."""
    reference_model(tied).to(stored).save_pretrained(tmp_path, max_shard_size=most_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (most_bytes == 6000)
    assert (our_logits(load(tmp_path)) - their_logits(tmp_path)).abs().max() < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, view in load(tmp_path, torch.bfloat16).hf_tensors().items():
        assert view.dtype == torch.bfloat16 and torch.equal(view, theirs[name])


def test_a_loaded_model_can_be_trained(written):
    """Parameters made on the meta device or filled under no_grad must not have lost their gradient."""
    model = load(written[True])
    our_logits.__wrapped__(model).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_old_and_redundant_tensors_are_harmless(written, tmp_path):
    """Old checkpoints hold the rotary table of each layer, and some tools write the tied head once more."""
    shutil.copytree(written[True], tmp_path, dirs_exist_ok=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(2).double(),
                 lm_head__weight=embedding.clone())  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):  # the copies are compared as they are used
        assert torch.equal(our_logits(load(tmp_path, dtype)), our_logits(load(written[True], dtype)))


MEMORY = """
import re, sys
from pathlib import Path
import torch
from model_folder import load_model, save_weights

def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large, again = map(Path, sys.argv[1:])
load_model(small, torch.device("cpu"), torch.bfloat16)
before = memory("VmRSS")
model = load_model(large, torch.device("cpu"), torch.bfloat16)
loaded = memory("VmHWM")
save_weights(model, again, {"model_type": "qwen2"}, most_bytes=2**26)
print(loaded - before, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_loading_and_saving_take_the_memory_of_one_model(written, tmp_path):
    """A mapped file counts beside the model: the plain way to load needs twice the checkpoint.

    Half of the checkpoint is the embedding; that of the 0.5B model is a quarter. The largest tensor decides.
    """
    config = Qwen2Config(65536, 512, 2560, 5, 14, 2, 64, 1e-6, 1e6, True, 32768)
    with torch.device("meta"):
        model = Qwen2(config)
    model = model.to(torch.bfloat16).to_empty(device=CPU)
    for parameter in model.parameters():
        parameter.detach().fill_(1.0)
    raw = {"model_type": "qwen2", "hidden_act": "silu", **vars(config)}
    save_weights(model, tmp_path / "large", raw, most_bytes=2**26)
    size = sum(view.nbytes for view in model.hf_tensors().values())
    assert size > 1e8 and len(list((tmp_path / "large").glob("*.safetensors"))) == 2
    command = [sys.executable, "-c", MEMORY, written[True], tmp_path / "large", tmp_path / "again"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loading, saving = map(int, run.stdout.split())
    assert 0.9 * size < loading < 1.2 * size and saving < 1.2 * size


# --------------------------------------------------------------------------------------------- config.json


REAL = dict(  # Qwen2.5-0.5B-Instruct, as it is published
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
    hidden_act="silu", hidden_size=896, initializer_range=0.02, intermediate_size=4864,
    max_position_embeddings=32768, max_window_layers=24, model_type="qwen2", num_attention_heads=14,
    num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0,
    sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.43.1",
    use_cache=True, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5000.0}

COVERED = [  # changes to it, and what they change in the model
    ({}, {}),
    ({"sliding_window": None, "use_mrope": False, "pad_token_id": 151665, "rope_scaling": None}, {}),
    ({"torch_dtype": ..., "dtype": "bfloat16"}, {}),
    ({"torch_dtype": ..., "use_sliding_window": ...}, {}),
    ({"vocab_size": 151665, "eos_token_id": 151643, "pad_token_id": 151654}, {"vocab_size": 151665}),
    ({"head_dim": 128}, {"head_dim": 128}),
    ({"head_dim": None}, {}),
    ({"layer_types": ["full_attention"] * 24}, {}),
    ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
    ({"rope_theta": ..., "rope_parameters": PLAIN_ROPE}, {"rope_theta": 5000.0}),
    ({"rope_theta": ..., "rope_scaling": PLAIN_ROPE}, {"rope_theta": 5000.0}),
    ({"rope_theta": 5000, "rope_parameters": PLAIN_ROPE}, {"rope_theta": 5000.0}),
    ({"rope_scaling": {"type": "default", "rope_type": "default"}, "rope_parameters": {}}, {}),
    ({"rope_parameters": {"rope_theta": 5000.0}, "rope_theta": None}, {"rope_theta": 5000.0}),
    ({"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    ({"rms_norm_eps": 1e-05}, {"rms_norm_eps": 1e-05}),
]


@pytest.mark.parametrize("changes, expected", COVERED)
def test_configs_in_the_wild(changes, expected, tmp_path):
    """Fine-tunes write the same model in many ways; transformers' own reading is the judge."""
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    edit_json(tmp_path / "config.json", **changes)
    config = read_model_config(tmp_path)
    plain = Qwen2Config(151936, 896, 4864, 24, 14, 2, 64, 1e-6, 1e6, True, 32768)
    assert config == replace(plain, **expected)
    assert type(config.rope_theta) is float
    theirs = ReferenceConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    derived = theirs.hidden_size // theirs.num_attention_heads
    assert (getattr(theirs, "head_dim", None) or derived) == config.head_dim
    assert set(theirs.layer_types) == {"full_attention"} and theirs.rope_parameters["rope_type"] == "default"


FORMS = [{}, {"head_dim": 6}, {"rope_parameters": PLAIN_ROPE}, {"rms_norm_eps": 0.01}]


@pytest.mark.parametrize("changes", FORMS)
def test_each_form_of_config_gives_the_same_logits(changes, tmp_path):
    reference_model(False, **changes).save_pretrained(tmp_path)
    assert (our_logits(load(tmp_path)) - their_logits(tmp_path)).abs().max() < 1e-5


WHOLE = "it must be a whole number from 1 to"
ONLY_PLAIN = "only plain rotary positions are covered"
REFUSED = [
    ({"model_type": "llama"}, 'model_type is "llama"; only "qwen2" is covered'),
    ({"model_type": "qwen2_moe"}, 'model_type is "qwen2_moe"; only "qwen2" is covered'),
    ({"model_type": ...}, 'model_type is missing; only "qwen2" is covered'),
    ({"model_type": ["qwen2"]}, 'model_type is ["qwen2"]; only "qwen2" is covered'),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is covered'),
    ({"hidden_act": ...}, 'hidden_act is missing; only "silu" is covered'),
    ({"use_sliding_window": True}, "use_sliding_window is true; only false or null is covered"),
    ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; only null is covered'),
    ({"tie_word_embeddings": ...}, "tie_word_embeddings is missing; only true or false is covered"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; only true or false is covered"),
    ({"tie_word_embeddings": "true"}, 'tie_word_embeddings is "true"; only true or false is covered'),
    *[({key: ...}, f"{key} is missing; {WHOLE} {high}") for key, high in [
        ("vocab_size", 16777216), ("hidden_size", 262144), ("intermediate_size", 1048576),
        ("num_hidden_layers", 1024), ("num_attention_heads", 4096), ("num_key_value_heads", 4096),
        ("max_position_embeddings", 2147483648)]],
    ({"vocab_size": "151936"}, f'vocab_size is "151936"; {WHOLE} 16777216'),
    ({"vocab_size": 151936.0}, f"vocab_size is 151936.0; {WHOLE} 16777216"),
    ({"num_hidden_layers": 10**12}, f"num_hidden_layers is 1000000000000; {WHOLE} 1024"),
    ({"num_hidden_layers": True}, f"num_hidden_layers is true; {WHOLE} 1024"),
    ({"num_key_value_heads": None}, f"num_key_value_heads is missing; {WHOLE} 4096"),
    ({"num_attention_heads": 0}, f"num_attention_heads is 0; {WHOLE} 4096"),
    ({"num_key_value_heads": 4}, "num_attention_heads is 14; it must be a multiple of 4"),
    ({"head_dim": 7}, "head_dim is 7; it must be a multiple of 2"),
    ({"head_dim": 0}, "head_dim is 0; it must be a whole number from 2 to 4096"),
    ({"hidden_size": 13}, "head_dim is 0; it must be a whole number from 2 to 4096"),
    ({"rms_norm_eps": ...}, "rms_norm_eps is missing; it must be a number from 1e-12 to 0.1"),
    ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6"; it must be a number from 1e-12 to 0.1'),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be a number from 1e-12 to 0.1"),
    ({"rope_theta": ...}, "rope_theta is missing; it must be a number from 1.0 to 1000000000000.0"),
    ({"rope_theta": "x" * 90}, f"rope_theta is \"{'x' * 49}... (92 characters); "
                               "it must be a number from 1.0 to 1000000000000.0"),
    ({"rope_theta": 10**400}, f"rope_theta is 1{'0' * 49}... (401 characters); "
                              "it must be a number from 1.0 to 1000000000000.0"),
    ({"rope_parameters": PLAIN_ROPE}, "rope_theta is both 1000000.0 and 5000.0; keep one"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
     "rope_scaling is {\"type\": \"yarn\", \"original_max_position_embeddings\": 32768, \"factor\": 4.0}; "
     + ONLY_PLAIN),
    ({"rope_parameters": {"rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
     'rope_parameters is {"rope_type": "llama3", "original_max_position_emb... (129 characters); '
     + ONLY_PLAIN),
    ({"rope_scaling": {"rope_type": "default", "type": "linear"}},
     'rope_scaling is {"type": "linear"}; ' + ONLY_PLAIN),
    ({"rope_scaling": {"factor": 2.0}}, 'rope_scaling is {"factor": 2.0}; ' + ONLY_PLAIN),
    ({"rope_scaling": "yarn"}, 'rope_scaling is {"type": "yarn"}; ' + ONLY_PLAIN),
    ({"rope_parameters": {"full_attention": PLAIN_ROPE}},
     'rope_parameters is {"full_attention": {"rope_type": "default", "rope_theta": 5000.0}}; ' + ONLY_PLAIN),
    ({"layer_types": ["full_attention"] * 23 + ["sliding_attention"]},
     'layer_types is ["full_attention", "full_attention", "full_attenti... (435 characters); '
     'only "full_attention" in each layer is covered'),
    ({"layer_types": 5}, 'layer_types is 5; only "full_attention" in each layer is covered'),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED)
def test_configs_that_are_refused(changes, message, tmp_path):
    """Nothing that changes the logits is guessed: with a wrong base, or unscaled, a model would still run."""
    (tmp_path / "config.json").write_text(json.dumps(REAL))
    edit_json(tmp_path / "config.json", **changes)
    assert said(read_model_config, tmp_path) == f"{tmp_path / 'config.json'}: {message}"


# ------------------------------------------------------------------------------------------- damaged folders


def shard(folder: Path) -> None:
    """Turns a folder with one file of weights into one with two and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"{half}.safetensors": list(tensors)[half::2] for half in (0, 1)}
    for name, names in halves.items():
        save_file({tensor: tensors[tensor] for tensor in names}, folder / name)
    weight_map = {tensor: name for name, names in halves.items() for tensor in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard_then(change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: (shard(folder), change(folder))


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def replace_weights_by_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
DAMAGED = "{folder}/model.safetensors: damaged, cut short or not safetensors (*); fetch it again"
UNFIT = "{folder}: the weights are not those that config.json describes: "
INDEX = "model.safetensors.index.json"
ABSENT = "{folder}/" + INDEX + ": names files that are not in its folder: "
DAMAGES = {  # what happened to the folder, and what is said; * stands for the library's own words
    "no config": (lambda f: (f / "config.json").unlink(),
                  "{folder}/config.json: cannot be read: No such file or directory"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"),
                          "{folder}/config.json: cannot be read as JSON (*)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(),
                   "{folder}: holds neither model.safetensors nor " + INDEX + "; no other weights are read"),
    "git-LFS pointer": (weights(lambda content: POINTER),
                        "{folder}/model.safetensors: a git-LFS pointer, not the weights: "
                        "run `git lfs pull` there"),
    "empty": (weights(lambda content: b""), DAMAGED),
    "no data": (weights(lambda content: content[: 8 + int.from_bytes(content[:8], "little")]), DAMAGED),
    "last byte lost": (weights(lambda content: content[:-1]), DAMAGED),
    "a byte too many": (weights(lambda content: content + b"\0"), DAMAGED),
    "within the header": (weights(lambda content: content[:100]), DAMAGED),
    "a web page": (weights(lambda content: b"<!doctype html><html>not found</html>"), DAMAGED),
    "a zip file": (weights(lambda content: b"PK\3\4" + bytes(500)), DAMAGED),
    "a folder": (replace_weights_by_folder, DAMAGED),
    "misshaped": (lambda f: edit_weights(f, model__norm__weight=torch.ones(17)),
                  UNFIT + "unfit: model.norm.weight is F32 [17], not BF16/F16/F32 [16]"),
    "flat embedding": (lambda f: edit_weights(f, model__embed_tokens__weight=torch.ones(61 * 16)),
                       UNFIT + "unfit: model.embed_tokens.weight is F32 [976], not BF16/F16/F32 [61, 16]"),
    "transposed": (lambda f: edit_weights(f, model__layers__1__mlp__down_proj__weight=torch.ones(24, 16)),
                   UNFIT + "unfit: model.layers.1.mlp.down_proj.weight is F32 [24, 16], "
                           "not BF16/F16/F32 [16, 24]"),
    "another type": (lambda f: edit_weights(f, model__norm__weight=torch.ones(16).to(torch.float8_e4m3fn)),
                     UNFIT + "unfit: model.norm.weight is F8_E4M3 [16], not BF16/F16/F32 [16]"),
    "integers": (lambda f: edit_weights(f, model__norm__weight=torch.ones(16, dtype=torch.int32)),
                 UNFIT + "unfit: model.norm.weight is I32 [16], not BF16/F16/F32 [16]"),
    "missing": (lambda f: edit_weights(f, model__norm__weight=None), UNFIT + "missing: model.norm.weight"),
    "unknown": (lambda f: edit_weights(f, v_head__weight=torch.ones(1)), UNFIT + "unknown: v_head.weight"),
    "all at once": (lambda f: edit_weights(f, model__norm__weight=None, v_head__weight=torch.ones(1),
                                           model__embed_tokens__weight=torch.ones(1)),
                    UNFIT + "missing: model.norm.weight; unknown: v_head.weight; "
                            "unfit: model.embed_tokens.weight is F32 [1], not BF16/F16/F32 [61, 16]"),
    "a layer too few": (lambda f: edit_json(f / "config.json", num_hidden_layers=1, layer_types=None),
                        UNFIT + "unknown: model.layers.1.*, model.layers.1.*, model.layers.1.*, "
                                "model.layers.1.*, model.layers.1.* and 7 more"),
    "a layer too many": (lambda f: edit_json(f / "config.json", num_hidden_layers=3, layer_types=None),
                         UNFIT + "missing: model.layers.2.self_attn.q_proj.weight, "
                                 "model.layers.2.self_attn.k_proj.weight, *, *, * and 7 more"),
    "other heads": (lambda f: edit_json(f / "config.json", num_key_value_heads=4),
                    UNFIT + "unfit: model.layers.0.self_attn.k_proj.bias is F32 [8], not BF16/F16/F32 [16], "
                            "* and 3 more"),
    "far too large": (lambda f: edit_json(f / "config.json", vocab_size=2**24, intermediate_size=2**20),
                      UNFIT + "unfit: *"),
    "no tied head": (lambda f: edit_json(f / "config.json", tie_word_embeddings=False),
                     UNFIT + "missing: lm_head.weight"),
    "a tied head that differs": (
        lambda f: edit_weights(f, lm_head__weight=torch.ones(61, 16)),
        "{folder}: lm_head.weight differs from model.embed_tokens.weight, although config.json ties them; "
        "set tie_word_embeddings to false there if the head counts"),
    "a tied head of another size": (
        lambda f: edit_weights(f, lm_head__weight=torch.ones(60, 16)),
        UNFIT + "unfit: lm_head.weight is F32 [60, 16], not BF16/F16/F32 [61, 16]"),
    "a shard lost": (shard_then(lambda f: (f / "1.safetensors").unlink()),
                     ABSENT + "1.safetensors"),
    "a shard cut short": (shard_then(lambda f: os.truncate(f / "1.safetensors", 2000)),
                          DAMAGED.replace("model", "1")),
    "a shard twice": (shard_then(lambda f: shutil.copy(f / "0.safetensors", f / "1.safetensors")),
                      UNFIT + "missing: *"),
    "an index to elsewhere": (shard_then(lambda f: edit_json(f / INDEX, weight_map={"a": "../0.safetensors"})
                                         ), ABSENT + "../0.safetensors"),
    "an index of numbers": (shard_then(lambda f: edit_json(f / INDEX, weight_map={"a": 5, "b": []})),
                            ABSENT + "5, []"),
    "an index without a map": (
        shard_then(lambda f: edit_json(f / INDEX, weight_map=[])),
        "{folder}/" + INDEX + ": weight_map must be an object that names the file of each tensor"),
    "an empty index": (shard_then(lambda f: edit_json(f / INDEX, weight_map={})), UNFIT + "missing: *"),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_folders_are_refused_by_name(damage, message, written, tmp_path):
    shutil.copytree(written[True], tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    pattern = re.escape(message.replace("{folder}", str(tmp_path))).replace(r"\*", ".+")
    assert re.fullmatch(pattern, said(load, tmp_path))


def test_one_whole_file_counts_more_than_an_index(written, tmp_path):
    """As in transformers: an index may be left over from before somebody joined the shards."""
    shutil.copytree(written[True], tmp_path, dirs_exist_ok=True)
    save_file({"v_head.weight": torch.ones(1)}, tmp_path / "older.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"v_head.weight": "older.safetensors"}}))
    assert torch.equal(our_logits(load(tmp_path)), our_logits(load(written[True])))
    assert (our_logits(load(tmp_path)) - their_logits(tmp_path)).abs().max() < 1e-5


def test_shards_in_any_order_are_one_model(written, tmp_path):
    """What counts is which tensors the files hold, so two that have swapped their names are no damage."""
    shutil.copytree(written[False], tmp_path, dirs_exist_ok=True)
    shard(tmp_path)
    for old, new in (("0", "tmp"), ("1", "0"), ("tmp", "1")):
        (tmp_path / f"{old}.safetensors").rename(tmp_path / f"{new}.safetensors")
    assert torch.equal(our_logits(load(tmp_path)), our_logits(load(written[False])))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "0.safetensors", INDEX])
def test_flipped_and_lost_bytes_never_end_in_a_traceback(name, written, tmp_path):
    """Either a model or one line. A flip in the weights cannot be noticed; one in a header mostly is."""
    shutil.copytree(written[True], tmp_path, dirs_exist_ok=True)
    if name in ("0.safetensors", INDEX):
        shard(tmp_path)
    content, rng, refused = (tmp_path / name).read_bytes(), random.Random(name), 0
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith(".safetensors") else len(content)
    for attempt in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header if attempt % 5 else len(content))] ^= 1 << rng.randrange(8)
        if attempt % 10 == 0:
            damaged = damaged[: rng.randrange(len(content))]
        (tmp_path / name).write_bytes(damaged)
        try:
            assert isinstance(load(tmp_path), Qwen2)
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
    assert refused > 60


# -------------------------------------------------------------------------------------------------- saving

SOURCE = {  # a fine-tune's folder: what is not the model's shape must come through untouched
    "config.json": json.dumps({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 61,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 64,
        "use_sliding_window": False, "sliding_window": 4096, "torch_dtype": "float16", "pad_token_id": 7,
        "mine": {"a": [1]}}),
    "tokenizer.json": '{"any": "\\u00e9"}', "tokenizer_config.json": '{"x":1}',
    "chat_template.jinja": "{{ x }}\n",
    "generation_config.json": '{"eos_token_id": [5, 7]}', "pytorch_model.bin": "not to be copied",
}  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in SOURCE.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@files
@ties
def test_transformers_opens_what_is_saved(tied, most_bytes, source, tmp_path):
    model, folder = small_model(tied), tmp_path / "a" / "b"
    config = {**json.loads((source / "config.json").read_text()), "tie_word_embeddings": tied}
    save_weights(model, folder, config, most_bytes)
    assert (our_logits(model) - their_logits(folder)).abs().max() < 1e-5
    assert torch.equal(our_logits(load(folder)), our_logits(model))
    _, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())  # nothing missing, nothing unexpected
    tensors = stored_tensors(folder)
    assert ("lm_head.weight" in tensors) == (not tied) and len(tensors) == 26 + (not tied)
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    for name in shards:
        with safe_open(folder / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    if most_bytes == 10**9:
        assert shards == ["model.safetensors"] and not (folder / INDEX).exists()
        return
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    sizes = [sum(tensor.nbytes for tensor in load_file(folder / name).values()) for name in shards]
    assert len(shards) > 2 and max(sizes) <= most_bytes and min(sizes[:-1]) > most_bytes / 2
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {name: file for file in shards for name in load_file(folder / file)} == index["weight_map"]


def test_a_saved_folder_keeps_what_the_source_had(source, tmp_path):
    """The pad id or a key that only the fine-tune's authors know; and the type is that of the weights now."""
    edit_json(source / "config.json", tie_word_embeddings=True)
    model, folder = small_model(True).to(torch.bfloat16), tmp_path / "final"
    save_model(model, source, folder)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    assert after == {**before, "torch_dtype": "bfloat16"}
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in folder.iterdir()} == {*copied, "config.json", "model.safetensors"}
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in copied)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert opened.dtype == torch.bfloat16 and opened.generation_config.eos_token_id == [5, 7]
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in model.hf_tensors().items())


def test_the_newer_name_of_the_type_does_not_stay_behind(source, tmp_path):
    """`dtype: float16` left beside the right torch_dtype would win in transformers 5."""
    edit_json(source / "config.json", tie_word_embeddings=False, torch_dtype=..., dtype="float16")
    save_model(small_model(False), source, tmp_path / "final")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").dtype == torch.float32


def test_saving_again_leaves_no_part_of_the_earlier_save(source, tmp_path):
    """transformers and this repository take model.safetensors if it is there: before the shards."""
    config = {**json.loads((source / "config.json").read_text()), "tie_word_embeddings": False}
    older, newer = small_model(False), small_model(False)
    with torch.no_grad():
        newer.norm.weight.mul_(2)
    for first, second in ((10**9, 6000), (6000, 10**9), (6000, 12000)):
        save_weights(older, tmp_path / "x", config, first)
        save_weights(newer, tmp_path / "x", config, second)
        assert torch.equal(our_logits(load(tmp_path / "x")), our_logits(newer))
        assert torch.equal(their_logits(tmp_path / "x"), AutoModelForCausalLM.from_pretrained(tmp_path / "x")(
            TOKENS).logits)  # fmt: skip
        assert len(stored_tensors(tmp_path / "x")) == 27
        assert len(list((tmp_path / "x").glob("*00001-of-*"))) == (second != 10**9)


@pytest.mark.parametrize("limit", [0, 1000, 20000])
def test_a_failed_write_is_one_line(limit, source, tmp_path):
    """The system refuses to let a file grow: the next best thing to a full disk that a test can have."""
    edit_json(source / "config.json", tie_word_embeddings=True)
    now, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        message = said(save_model, small_model(True), source, tmp_path / "final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (now, most))
    assert message.startswith(f"{tmp_path / 'final'}: cannot be written: ") and "File too large" in message


def test_saving_where_a_file_is_or_onto_the_source(source, tmp_path):
    (tmp_path / "taken").write_text("")
    edit_json(source / "config.json", tie_word_embeddings=True)
    assert said(save_model, small_model(True), source, tmp_path / "taken") == (
        f"{tmp_path / 'taken'}: cannot be written: File exists")
    assert "are the same file" in said(save_model, small_model(True), source, source)
    assert {path.name for path in source.iterdir()} == set(SOURCE)


# ------------------------------------------------------------------------------------------------- the hub


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)  # looks like a hub id
    assert find_folder("owner/name", "v1") == Path("owner/name")
    assert find_folder(str(tmp_path)) == tmp_path


NO_PATHS = ["none", "/none/at/all", "./no", "a/b/c", "a file/", "file/x", "", "x" * 400, "a\0b"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_a_path_that_is_nothing(path, tmp_path, monkeypatch):
    """It may not be taken for a hub id, nor may a file: a typing error is not to be asked of the network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "x").write_text("")
    shown = str(UserError(path))
    assert said(find_folder, path) == f"{shown}: no such folder, nor a hub id (owner/name): set model.path"


FIND = """
import json, sys
from model_folder import find_folder
from data_types import UserError
for name, revision in json.loads(sys.argv[1]):
    try:
        folder = find_folder(name, revision)
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    except UserError as error:
        found = str(error)
    print(json.dumps(found))
"""


def find_each(wanted: list, endpoint: str, home: Path, offline: str) -> list:
    """What find_folder gives for each (name, revision): the files in the folder, or what is said.

    In a process of its own, as huggingface_hub reads its environment when it is imported.
    """
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    command = [sys.executable, "-c", FIND, json.dumps(wanted)]
    environment = {**os.environ, **settings}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_models_of_the_hub(tmp_path):
    """Only what is needed is downloaded, once, and then found without a network."""
    needed = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors",
              "model-00002-of-00002.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json",
              "chat_template.jinja"]  # fmt: skip
    spare = ["README.md", "pytorch_model.bin", "vocab.json", "checkpoint-50/model.safetensors", "onnx/x.json"]
    served = {name: name.encode() for name in needed + spare}
    names = ["lab/model", "no/such", "gated/model", "sealed/model"]
    get = "cannot get this model from the hub"
    unreachable = (f"{get}: no folder here, not cached, no way to the hub: "
                   "check model.path, network, HF_ENDPOINT, HF_HUB_OFFLINE")  # fmt: skip
    consent = f"{get}: its owner asks for consent: accept the terms on its page, then set HF_TOKEN"
    with small_hub(served) as endpoint:
        wanted = [("lab/model", "v9"), *((name, None) for name in names)]
        answers = find_each(wanted, endpoint, tmp_path, offline="0")
    assert answers == [
        f"lab/model at revision v9: {get}: it has no such revision: "
        "set model.revision to a branch, tag or commit of it",
        sorted(needed),
        f"no/such: {get}: no folder here, no model there you may see: check model.path, set HF_TOKEN",
        f"gated/model: {consent}",
        f"sealed/model: {consent}",
    ]
    wanted = [("lab/model", None), ("no/such", None)]  # the server is gone
    assert find_each(wanted, endpoint, tmp_path, offline="1") == [sorted(needed), f"no/such: {unreachable}"]


def test_a_full_disk_is_told_as_such(monkeypatch):
    """Stands in for the download only: a full disk cannot be had in a test."""

    def download(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert said(find_folder, "lab/model") == (
        "lab/model: cannot get this model from the hub: the disk is full: "
        "free some space or set HF_HOME to a folder on another disk")
