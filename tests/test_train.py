"""train.py as a person uses it: short real runs of the tiny config, their files, and what bad input gets."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train
from data_types import load_config
from model_folder import load_model
from qwen2_model import head_logits

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["rollout.group_size=4", "rollout.questions_per_step=4", "rollout.max_new_tokens=48", "train.steps=3",
         "eval.size=32", "eval.every=2", "train.threads=1"]
STEP_KEYS = {"step", "reward", "success", "format_rate", "answer_length", "truncated", "zero_spread", "entropy",
             "grad_norm", "logprob_gap", "rollout_tokens_per_second", "update_tokens_per_second", "rollout_seconds",
             "update_seconds"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The config names `tiny` relative to the repository, as a person at its root would."""
    monkeypatch.chdir(ROOT)


def run(folder: Path, name: str, *overrides: str) -> list[dict]:
    """One run in this process; its metrics, times taken out."""
    status = train.main(["--config", "config_tiny.yml", "--name", name, f"output.folder={folder}", *SMALL, *overrides])
    assert status == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that several tests look at: its folder, its metrics and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "train.py", "--config", "config_tiny.yml", "--name", "one", f"output.folder={folder}"]
    done = subprocess.run(command + SMALL, capture_output=True, text=True, check=True, cwd=ROOT)
    metrics = [json.loads(line) for line in (folder / "one" / "metrics.jsonl").read_text().splitlines()]
    return folder / "one", metrics, done.stdout


def test_the_run_folder_holds_what_the_readme_promises(finished):
    folder, metrics, printed = finished
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert {"eval_success", "eval_success_se"} <= metrics[0].keys()
    for m in metrics[1:]:
        assert STEP_KEYS <= m.keys()
        assert ("eval_success" in m) == (m["step"] in (2, 3))
    assert all(m["logprob_gap"] < 1e-5 for m in metrics[1:] if m["logprob_gap"] is not None)
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "samples.txt").read_text().count("--- step") == 6  # two a step
    assert load_config(str(folder / "config.yml")) == load_config(
        "config_tiny.yml", [*SMALL, f"output.folder={folder.parent}"])
    lines = printed.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["0/3", "1/3", "2/3", "3/3"]
    assert "held-out success, sampled" in lines[-4] and "held-out success, greedy" in lines[-3]


def test_the_final_model_opens_in_transformers_with_the_logits_of_the_policy(finished):
    final = finished[0] / "final"
    theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    ours = load_model(final, torch.device("cpu"), torch.float32)
    start = load_model(ROOT / "tiny", torch.device("cpu"), torch.float32)
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = head_logits(ours(tokens).flatten(0, 1), ours.head)
        torch.testing.assert_close(logits, theirs(tokens).logits.flatten(0, 1), atol=1e-4, rtol=0)
        before = head_logits(start(tokens).flatten(0, 1), start.head)
    assert (logits - before).abs().max() > 1e-4, "training must have moved the weights"


def test_checkpoints_are_model_folders_and_only_the_newest_stay(tmp_path):
    run(tmp_path, "saved", "checkpoint.every=1", "checkpoint.keep=2", "eval.size=4")
    folders = sorted((tmp_path / "saved" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000003"]
    second, third, final = (load_model(folder, torch.device("cpu"), torch.float32).state_dict()
                            for folder in (*folders, tmp_path / "saved" / "final"))
    assert all(torch.equal(third[name], final[name]) for name in final)
    assert any(not torch.equal(second[name], final[name]) for name in final)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    again = run(tmp_path, "again")
    assert again == [{k: v for k, v in m.items() if "second" not in k} for m in finished[1]]
    assert run(tmp_path, "other", "train.seed=2")[1:] != again[1:]


def test_evaluations_leave_training_alone(finished, tmp_path):
    """An evaluation that drew from training's generator would change every later step."""
    def training_only(metrics):
        return [{k: v for k, v in m.items() if not k.startswith("eval")} for m in metrics]

    without = run(tmp_path, "without", "eval.every=0", "eval.size=8", "eval.temperature=0")
    assert training_only(without) == training_only(run(tmp_path, "with", "eval.every=1"))


def test_an_epoch_visits_every_problem_once_and_the_next_in_another_order():
    config = load_config("config_tiny.yml", ["rollout.questions_per_step=7"])
    state = train.Run(config, None, None, None, None, list(range(50)), [], 0.0, 1.0, None)
    seen = [p for step in range(15) for p in train.draw_problems(state, 7 * step)]  # 105 = two epochs and a bit
    assert sorted(seen[:50]) == sorted(seen[50:100]) == list(range(50))
    assert seen[:50] != seen[50:100]


def test_generators_of_different_purposes_and_steps_differ():
    firsts = {torch.rand(1, generator=train.make_generator(seed, purpose, step)).item()
              for seed in (1, 2) for purpose in ("rollout", "evaluation") for step in (0, 1, 2)}
    assert len(firsts) == 12


def broken_copy(tmp_path: Path, *missing: str) -> Path:
    """tiny/ without some of its files."""
    shutil.copytree(ROOT / "tiny", tmp_path / "model")
    for name in missing:
        (tmp_path / "model" / name).unlink()
    return tmp_path / "model"


def complaint(capsys, *arguments: str) -> str:
    """The one line that train.py prints for bad input, with exit code 2."""
    assert train.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err.strip()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config", "absent.yml"], r"train.py: cannot read the config 'absent.yml': No such file or directory"),
    (["--config", "tiny"], r"train.py: cannot read the config 'tiny': Is a directory"),
    (["--config", "config_tiny.yml", "rollout.groupsize=8"],
     r".*unknown key 'rollout.groupsize'; did you mean rollout.group_size\?"),
    (["--config", "config_tiny.yml", "rollout.group_size=1"],
     r".*rollout.group_size is 1; it must be a whole number, at least 2 and at most 65536"),
    (["--config", "config_tiny.yml", "train.learning_rate=fast"],
     r".*train.learning_rate is fast; it must be a number.*"),
    (["--config", "config_tiny.yml", "model.device=cuda:7"], r".*model.device is cuda:7, which this machine.*"),
    (["--config", "config_tiny.yml", "model.path=nowhere/at/all"], r".*nowhere/at/all.*"),
    (["--config", "config_tiny.yml", "data.path=tiny/none.parquet"], r".*tiny/none.parquet.*"),
])
def test_bad_input_gets_one_clear_line(arguments, message, capsys, tmp_path):
    line = complaint(capsys, *arguments, *([f"output.folder={tmp_path}/runs"] if "=" in arguments[-1] else []))
    assert re.fullmatch(message, line), line
    assert not (tmp_path / "runs").exists(), "nothing is written before the input is known to be good"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_folder_without_a_file_is_named(missing, capsys, tmp_path):
    folder = broken_copy(tmp_path, missing)
    line = complaint(capsys, "--config", "config_tiny.yml", f"model.path={folder}", f"output.folder={tmp_path}/runs")
    assert missing in line


def test_a_vocabulary_that_does_not_match_the_tokenizer_is_refused(capsys, tmp_path):
    folder = broken_copy(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    count = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": count, "content": "<|one too many|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = complaint(capsys, "--config", "config_tiny.yml", f"model.path={folder}", f"output.folder={tmp_path}/runs")
    assert re.search(r"the tokenizer has \d+ ids, but vocab_size in config.json is \d+", line)


def test_a_run_folder_that_holds_a_run_is_never_written_into(finished, capsys):
    folder = finished[0]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    line = complaint(capsys, "--config", "config_tiny.yml", "--name", "one", f"output.folder={folder.parent}", *SMALL)
    assert f"{folder} is already there: go on with --resume {folder}" in line
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
