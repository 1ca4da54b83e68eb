"""train.py as a person uses it: short runs, the files and metrics they leave, determinism, and what is sampled."""

import copy
import re
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from countdown_task import ASSISTANT_PREFIX, question_text
from data_types import Episode
from evaluate import load_agent
from optimizer import AdamW
from plumbing import config
from plumbing.logbook import Logbook
from plumbing.memory import Limit
from rollout import Sampler
from short_run import ROOT, Done, arguments, run
from tokenizer import Tokenizer

STEP_KEYS = """step reward reward_std reward_format reward_correct response_length truncated groups zero_variance loss
    entropy approx_kl logprob_gap clip_fraction learning_rate grad_norm skipped rollout_seconds
    update_seconds elapsed_seconds"""
GREEDY, SAMPLED = ({f"eval_{kind}", f"eval_{kind}_se"} for kind in ("greedy", "sampled"))
CHANGES = ("eval.every=2", "checkpoint.keep=2", "output.samples=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Done:
    folder = tmp_path_factory.mktemp("runs") / "one"
    command = [sys.executable, "train.py", *arguments(folder, *CHANGES)]
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
    assert {path.name for path in folder.glob("checkpoints/step-*")} == {"step-000002", "step-000003"}
    assert finished.tensors(2) != finished.tensors(3) == finished.tensors("final") != finished.tensors(ROOT / "tiny")
    assert [sample["step"] for sample in finished.samples()] == [1, 1, 2, 2, 3, 3]
    typed = arguments(folder, *CHANGES)
    assert config.load_config(folder / "config.yml") == config.load_config(typed[1], typed[4:])
    shown = {line.partition("  ")[0]: line for line in printed if line.startswith("step ") and "reward" in line}
    assert list(shown) == ["step 1/3", "step 2/3", "step 3/3"]
    assert all(f"{m['reward']:.3f}" in line for m, line in zip(metrics[1:], shown.values(), strict=True))
    for kind, steps in {"sampled": (0, 3), "greedy": (0, 2, 3)}.items():
        *at_steps, line = [line for line in printed if kind in line]
        scores = [(f"{metrics[step][f'eval_{kind}']:.3f}", f"{metrics[step][f'eval_{kind}_se']:.3f}") for step in steps]
        assert [tuple(re.findall(r"0\.\d+", line)) for line in at_steps] == scores
        assert re.findall(r"[\d.]+", line) == [scores[0][0], scores[-1][0]]


def test_the_models_before_during_and_after_answer_in_transformers_as_they_do_here(finished):
    """Opened the usual way a model used to get other ids for a prompt, and to talk nonsense."""
    for folder in (ROOT / "tiny", finished.folder / "checkpoints" / "step-000002", finished.folder / "final"):
        agent = load_agent(str(folder), finished.folder / "config.yml", ["train.threads=1"])
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        policy, task = agent.sampler.policy, agent.sampler.task
        for ours in agent.sampler.rollout(agent.held_out[:4], 1, 0.0, torch.Generator()):
            chat = [{"role": "user", "content": task.question_text(ours.problem)}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text + task.ASSISTANT_PREFIX, return_tensors="pt")
            theirs = model.generate(**prompt, do_sample=False, max_new_tokens=48)
            assert theirs[0].tolist() == ours.prompt_ids + ours.response_ids
            with torch.no_grad():
                logits = policy.logits(policy(theirs).flatten(0, 1))
                torch.testing.assert_close(logits, model(theirs).logits.flatten(0, 1), atol=1e-4, rtol=0)


def test_a_run_follows_from_its_seed_however_often_it_is_evaluated(small, tmp_path):
    """An evaluation that drew from training's generator would change every later step."""
    more = ("eval.every=0", "eval.every=1", "train.seed=2")
    seldom, often, other = (run(tmp_path / setting, *small, setting) for setting in more)
    for mine, theirs in zip(often.metrics(), seldom.metrics(), strict=True):
        assert {key: mine[key] for key in theirs} == theirs
        assert {key.partition("_")[0] for key in mine.keys() - theirs.keys()} <= {"eval"}
    assert (often.samples(), often.tensors("final")) == (seldom.samples(), seldom.tensors("final"))
    assert other.metrics()[1:] != seldom.metrics()[1:]
    assert len({done.metrics()[0]["eval_greedy"] for done in (seldom, other)}) == 1, "greedy depends on no seed"


def test_each_step_samples_the_next_problems_with_random_numbers_of_its_own(small, tmp_path, monkeypatch):
    """Given the same numbers or problems at each step, a policy learns them by heart and looks healthy."""
    asked, batches, rollout, update = [], [], Sampler.rollout, train.update

    def asking(self: Sampler, problems: list, size: int, temperature: float, generator: torch.Generator) -> list:
        asked.append((size, temperature, generator.initial_seed(), [*map(repr, problems)]))
        assert {parameter.grad for parameter in self.policy.parameters()} == {None}, "in the way of the KV cache"
        return rollout(self, problems, size, temperature, generator)

    monkeypatch.setattr(Sampler, "rollout", asking)
    monkeypatch.setattr(train, "update", lambda run, step, batch: batches.append(batch) or update(run, step, batch))
    changes = "train.steps=5", "eval.every=1", "rollout.max_draws=3", "rollout.group_size=2", "rollout.temperature=0.9"
    metrics = run(tmp_path / "run", *small, *changes).metrics()[1:]
    evaluations, draws = ([each for each in asked if each[0] == size] for size in (1, 2))
    assert [temperature for _, temperature, *_ in evaluations] == [0, 1, 0, 0, 0, 0, 0, 1]
    assert len({(seed, *problems) for *_, seed, problems in evaluations}) == 1
    assert (len({seed for *_, seed, _ in asked}), {draw[1] for draw in draws}) == (len(draws) + 1, {0.9})
    drawn = [problem for *_, problems in draws for problem in problems]
    first, second = drawn[:16], drawn[16:32]  # epochs
    assert len(drawn) == sum(m["groups"] for m in metrics) >= 32
    assert sorted(first) == sorted(second) != first != second
    assert len({*first, *evaluations[0][3]}) == 20
    for m, batch in zip(metrics, batches, strict=True):
        assert len(batch) == 2 * (m["groups"] - m["zero_variance"]) <= 8
        assert all(one.reward != other.reward for one, other in zip(batch[::2], batch[1::2], strict=True))
    assert max(m["groups"] for m in metrics) > 8, "not the case"  # more than two draws


def test_the_metrics_mean_what_they_say(small, tmp_path, monkeypatch):
    """Tokens that no update ran made it look fast, and the smallest micro-batch, sized by them, held two rows."""
    steps, least, write_step, update, attempt = [], [], Logbook.write_step, AdamW.step, Limit.attempt

    def spying(self: Logbook, step: int, metrics: dict, episodes: list[Episode], *others: object) -> None:
        steps.append((metrics | {"step": step}, copy.deepcopy(episodes)))
        write_step(self, step, metrics, episodes, *others)

    monkeypatch.setattr(Logbook, "write_step", spying)
    monkeypatch.setattr(Limit, "attempt", lambda *of, **by: least.append(by["least"]) or attempt(*of, **by))
    monkeypatch.setattr(AdamW, "step", lambda self: (time.sleep(0.1), update(self)))
    recipe = """train.objective=clipped train.updates_per_batch=2 train.truncated=mask train.steps=2
        train.warmup_steps=4 rollout.group_size=2 rollout.questions_per_step=8 rollout.max_draws=3"""
    done, spent = run(tmp_path / "run", *small, "rollout.max_new_tokens=6", *recipe.split()), 0.0
    kept = [(step, e) for step, (_, episodes) in enumerate(steps) for e in episodes[:16]]
    for sample, (step, e) in zip(done.samples(), kept, strict=True):
        texts = {"prompt": question_text(e.problem), "response": ASSISTANT_PREFIX + e.text, "ended": not e.truncated}
        parts = {"reward_format": e.rewards["format"], "reward_correct": e.rewards["correct"]}
        rest = {"step": step, "reward": sum(parts.values())}
        assert sample == pytest.approx({**texts, **parts, **rest})
        chat = f"<|im_start|>user\n{sample['prompt']}<|im_end|>\n<|im_start|>assistant\n{ASSISTANT_PREFIX}"
        assert Tokenizer(ROOT / "tiny").decode(e.prompt_ids) == chat
    for m, episodes in steps[1:]:
        assert m["learning_rate"] == pytest.approx(1e-3 * m["step"] / 4)
        count, sampled = len(episodes), sum(len(e.response_ids) for e in episodes)
        groups = [*zip(episodes[::2], episodes[1::2], strict=True)]
        active = [group for group in groups if group[0].reward != group[1].reward]
        lengths = [len(e.prompt_ids) + len(e.response_ids) for group in active for e in group if not e.truncated]
        assert (m["groups"], m["zero_variance"]) == (count / 2, len(groups) - len(active))
        assert m["reward"] == pytest.approx(sum(e.rewards["format"] + e.rewards["correct"] for e in episodes) / count)
        assert m["reward_correct"] == sum(e.rewards["correct"] == 1 for e in episodes) / count
        assert (m["truncated"], m["response_length"]) == (sum(e.truncated for e in episodes) / count, sampled / count)
        assert m["update_seconds"] > 0.2, "the optimizer's steps are part of the update"
        spent += m["rollout_seconds"] + m["update_seconds"]
        assert spent < m["elapsed_seconds"]
        assert max(lengths) in least
        longest = max(e.length for e in episodes)
        assert (min(m["zero_variance"], m["truncated"]) > 0, max(lengths) < longest) == (True, True), "not the case"
