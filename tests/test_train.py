"""train.py as a person uses it: short runs of the tiny config, the files and metrics they leave, and determinism."""

import copy
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas
import pytest
import torch
from short_run import ROOT, Done, arguments, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from config import load_config
from countdown_task import ASSISTANT_PREFIX, question_text
from data_types import Episode, Progress, Sampling
from evaluate import load_agent
from logbook import Logbook
from model_folder import load_model
from optimizer import AdamW
from tokenizer import Tokenizer

STEP_KEYS = """step reward reward_std reward_format reward_correct response_length truncated groups zero_variance loss
    entropy approx_kl logprob_gap clip_fraction learning_rate grad_norm skipped rollout_seconds
    rollout_tokens_per_second update_seconds update_tokens_per_second elapsed_seconds"""
GREEDY, SAMPLED = ({f"eval_{kind}", f"eval_{kind}_se"} for kind in ("greedy", "sampled"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Done:
    """A run from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    command = [sys.executable, "train.py", *arguments(folder, "eval.every=2", "checkpoint.keep=2", "output.samples=2")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return Done(folder, done.returncode, done.stdout.splitlines(), done.stderr.splitlines())


def test_the_run_folder_holds_what_the_readme_promises(finished):
    folder, status, printed, complaints = finished
    assert (status, complaints) == (0, [])
    metrics = finished.metrics(times=True)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert [m.keys() & (GREEDY | SAMPLED) for m in metrics] == [GREEDY | SAMPLED, set(), GREEDY, GREEDY | SAMPLED]
    for m in metrics[1:]:
        assert m.keys() - GREEDY - SAMPLED == set(STEP_KEYS.split())
        assert max(m["logprob_gap"], abs(m["approx_kl"])) < 1e-5, "the first update is on-policy"
    assert list((folder / "tensorboard").glob("events.*"))
    assert [sample["step"] for sample in finished.samples()] == [1, 1, 2, 2, 3, 3]
    typed = arguments(folder, "eval.every=2", "checkpoint.keep=2", "output.samples=2")
    assert load_config(folder / "config.yml") == load_config(typed[1], typed[4:])
    shown = {line.partition("  ")[0]: line for line in printed if line.startswith("step ") and "reward" in line}
    assert list(shown) == ["step 1/3", "step 2/3", "step 3/3"]
    assert all(f"{m['reward']:.3f}" in line for m, line in zip(metrics[1:], shown.values(), strict=True))
    for kind, steps in {"sampled": (0, 3), "greedy": (0, 2, 3)}.items():
        *at_steps, line = [line for line in printed if kind in line]
        scores = [(f"{metrics[step][f'eval_{kind}']:.3f}", f"{metrics[step][f'eval_{kind}_se']:.3f}") for step in steps]
        assert [tuple(re.findall(r"0\.\d+", line)) for line in at_steps] == scores
        assert re.findall(r"[\d.]+", line) == [scores[0][0], scores[-1][0]]


def test_checkpoints_and_the_final_model_are_folders_that_transformers_opens(finished):
    """Only the newest checkpoints stay; training has moved the weights; the logits are those of the policy."""
    assert {path.name for path in finished.folder.glob("checkpoints/step-*")} == {"step-000002", "step-000003"}
    assert finished.tensors(2) != finished.tensors(3) == finished.tensors("final") != finished.tensors(ROOT / "tiny")
    tokens = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    for folder in (finished.folder / "final", finished.folder / "checkpoints" / "step-000002"):
        policy = load_model(folder, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits.flatten(0, 1)
            torch.testing.assert_close(policy.logits(policy(tokens).flatten(0, 1)), theirs, atol=1e-4, rtol=0)


def test_the_final_model_answers_in_transformers_as_it_does_here(finished):
    """Opened the usual way it used to get other ids for a prompt, and to talk nonsense."""
    final = str(finished.folder / "final")
    agent = load_agent(final, finished.folder / "config.yml", ["train.threads=1"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    for problem in agent.held_out[:4]:
        chat = [{"role": "user", "content": agent.task.question_text(problem)}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text + agent.task.ASSISTANT_PREFIX, return_tensors="pt")
        theirs = model.generate(**prompt, do_sample=False, max_new_tokens=48)[0, prompt.input_ids.shape[1] :]
        (ours,) = agent.generate([agent.encode_prompt(problem)], torch.zeros(1, 48), Sampling(0.0))
        assert theirs.tolist() == ours.ids


def test_a_run_follows_from_its_seed_however_often_it_is_evaluated(finished, tmp_path):
    """An evaluation that drew from training's generator would change every later step."""
    again, other = run(tmp_path / "again", "eval.every=1", "output.samples=2"), run(tmp_path / "2", "train.seed=2")
    for mine, theirs in zip(again.metrics(), finished.metrics(), strict=True):
        assert {key: mine[key] for key in theirs} == theirs
        assert {key.partition("_")[0] for key in mine.keys() - theirs.keys()} <= {"eval"}
    assert (again.samples(), again.tensors("final")) == (finished.samples(), finished.tensors("final"))
    assert other.metrics()[1:] != finished.metrics()[1:]
    assert len({done.metrics()[0]["eval_greedy"] for done in (finished, other)}) == 1, "greedy depends on no seed"


def test_the_metrics_mean_what_they_say(tmp_path, monkeypatch):
    """Tokens that no update ran made the update look fast: zero-variance groups, masked and surplus responses."""
    steps, write_step, update = [], Logbook.write_step, AdamW.step

    def spying(self: Logbook, step: int, metrics: dict, episodes: list[Episode]) -> None:
        steps.append((dict(metrics), copy.deepcopy(episodes)))
        write_step(self, step, metrics, episodes)

    monkeypatch.setattr(Logbook, "write_step", spying)
    monkeypatch.setattr(AdamW, "step", lambda self: (time.sleep(0.3), update(self)))
    recipe = "train.objective=clipped train.updates_per_batch=2 train.truncated=mask train.steps=2 train.seed=7"
    recipe += " rollout.max_draws=3 rollout.max_new_tokens=29 train.warmup_steps=4"
    assert run(tmp_path / "run", *recipe.split()).status == 0
    files = tmp_path / "run/metrics.jsonl", tmp_path / "run/samples.jsonl"
    metrics, samples = (pandas.read_json(file, lines=True) for file in files)
    kept = [(step, e) for step, (_, episodes) in enumerate(steps) for e in episodes[:16]]
    for sample, (step, e) in zip(samples.to_dict("records"), kept, strict=True):
        texts = {"prompt": question_text(e.problem), "response": ASSISTANT_PREFIX + e.text, "ended": not e.truncated}
        parts = {"reward_format": e.rewards["format"], "reward_correct": e.rewards["correct"]}
        rest = {"step": step, "reward": sum(parts.values()), "length": len(e.response_ids)}
        assert sample == pytest.approx({**texts, **parts, **rest})
        chat = f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n{ASSISTANT_PREFIX}"
        assert Tokenizer(ROOT / "tiny").decode(e.prompt_ids) == chat
    assert metrics["learning_rate"][1:].tolist() == pytest.approx([3e-4 / 4, 3e-4 / 2])
    spent = (metrics["rollout_seconds"] + metrics["update_seconds"]).cumsum()
    assert (spent < metrics["elapsed_seconds"])[1:].all()
    for m, episodes in steps[1:]:
        count = len(episodes)
        groups = [episodes[first : first + 4] for first in range(0, count, 4)]
        active = [group for group in groups if len({e.reward for e in group}) > 1]
        ran = [e for group in active[:4] for e in group if not e.truncated]
        assert (m["groups"], m["zero_variance"]) == (count / 4, len(groups) - len(active))
        assert m["reward"] == pytest.approx(sum(e.rewards["format"] + e.rewards["correct"] for e in episodes) / count)
        assert m["reward_correct"] == sum(e.rewards["correct"] == 1 for e in episodes) / count
        assert m["truncated"] == sum(e.truncated for e in episodes) / count
        sampled = sum(len(e.response_ids) for e in episodes)
        assert m["response_length"] == sampled / count
        assert m["rollout_tokens_per_second"] * m["rollout_seconds"] == pytest.approx(sampled)
        updated = 2 * sum(len(e.prompt_ids) + len(e.response_ids) for e in ran)
        assert m["update_tokens_per_second"] * m["update_seconds"] == pytest.approx(updated)
        assert m["update_seconds"] > 0.6, "the optimizer's steps are part of the update"
        assert min(m["groups"] - m["zero_variance"] - 4, m["zero_variance"], m["truncated"]) > 0, "not the case"


def test_an_epoch_visits_every_problem_once_and_the_next_in_another_order():
    config = load_config(ROOT / "config_tiny.yml", ["rollout.questions_per_step=3"])
    runs = [SimpleNamespace(config=config, training=range(10), progress=Progress(drawn=n)) for n in range(0, 21, 3)]
    problems = [problem for run in runs for problem in train.next_problems(run, 0)]
    assert sorted(problems[:10]) == sorted(problems[10:20]) == list(range(10))
    assert problems[:10] != problems[10:20]
    assert train.next_problems(runs[0], 1) == train.next_problems(runs[1], 0), "a further draw goes on from the first"


def test_generators_of_different_purposes_and_steps_differ():
    cases = [(seed, purpose, step) for seed in (1, 2) for purpose in ("rollout 0", "evaluation") for step in (0, 1, 2)]
    assert len({torch.rand(1, generator=train.make_generator(*case)).item() for case in cases}) == 12
