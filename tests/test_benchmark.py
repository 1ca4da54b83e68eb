"""The benchmark compares equal work and counts what it says it counts. No test here looks at a time."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from data_types import Progress
from plain_policy import DEVICES, active_episodes, small_policy
from short_run import ROOT, byte_rewards, small_world
from test_without_a_card import OneDevice
from tools import benchmark, cost_model
from tools.benchmark import Decoder, KVCache, Workload, load_config, main

SIZE = ["train.threads=1", "rollout.group_size=4", "rollout.questions_per_step=4", "rollout.max_new_tokens=64"]
LONG = [*SIZE, "rollout.max_new_tokens=1024"]


@pytest.fixture(scope="module", autouse=True)
def work():
    """A small random model and 16 rows of real lengths, shortened to a ninth: the numbers that are not zero count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setitem(benchmark.SHAPES, "0.5B", (32, 48, 2, 4, 2, True, 231))
        changes = [*LONG, "rollout.temperature=0.7", "train.objective=clipped"]
        work = Workload(load_config("config_tiny.yml", changes), "0.5B")
        work.uniforms = work.uniforms[:, ::9]
        yield work


def test_forced_lengths_are_obeyed_in_every_wave_and_bring_nothing_from_the_cpu_into_a_graph(work, monkeypatch):
    monkeypatch.setattr(work, "plan", replace(work.plan, rows=8))
    lengths = [len(response.ids) for response in work.sample()]
    assert lengths == (work.uniforms > 0).sum(dim=1).tolist() != sorted(lengths)
    assert [bool(episode.advantage) for episode in work.episodes] == [True] * 12 + [False] * 4
    more = Workload(load_config("config_tiny.yml", [*LONG, "rollout.group_size=256"]), "0.5B")
    assert 290 < (more.uniforms > 0).sum(dim=1).float().mean() < 331  # a few are truncated
    policy = small_policy(1).to("meta")
    decoder = benchmark.ForcedDecoder(policy, KVCache(policy, [3], 6, 5), torch.empty(6, 5, device="meta"), [], 1.0)
    monkeypatch.setattr(Decoder, "record", lambda decoder, logits: None)
    with OneDevice():
        decoder.record(torch.empty(6, 231, device="meta"))


def larger(facts):  # "=+": the second fact is larger than the first variant's
    return ["".join("+" if a > b else "=" for a, b in zip(fact, facts[0], strict=True)) for fact in facts]


def test_a_rival_of_the_update_does_more_work_for_the_same_gradient(work, monkeypatch):
    """Rows run, positions with padding, logits at a time. A stand-in that grpo.py no longer uses would change none."""
    episodes = [replace(e, old_logprobs=[value - 0.3 for value in e.old_logprobs]) for e in work.episodes]
    shapes, chunks, facts, gradients, original = [], [], [], [], work.policy.logits
    monkeypatch.setattr(work, "episodes", episodes)
    monkeypatch.setattr(benchmark.grpo, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(work.policy, "logits", lambda hidden: chunks.append(len(hidden)) or original(hidden))

    def update(gradient=benchmark.accumulate_gradient):
        gradient(work.policy, work.episodes, work.config, 2048)

    rivals = [lambda: update(benchmark.naive_gradient), *benchmark.update_ablations(work, update).values()]
    with work.policy.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape)):
        for variant in (update, *rivals):
            shapes.clear(), chunks.clear(), variant()
            gradients.append(torch.cat([weight.grad.flatten() for weight in work.policy.parameters()]))
            facts.append((sum(shape.numel() for shape in shapes), max(chunks)))
    assert all((gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm() for gradient in gradients)
    assert larger(facts) == ["==", "++", "+=", "+=", "=+"]
    figures = benchmark.update_in_mode(work, "master", Namespace(parts="all", ablate=False, rounds=1))
    tokens = sum(len(e.prompt_ids + e.response_ids) for e in work.episodes[:12])
    assert (figures["line_tokens"], figures["row_tokens"]) == (facts[0][0], tokens)
    assert figures["ours"]["tokens_per_second"] * figures["ours"]["seconds"] == pytest.approx(tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_flops_are_those_of_the_model(tied):
    """torch counts the matmuls of each row alone, without padding, the head at response tokens only."""
    policy, episodes = small_policy(4, tied=tied), active_episodes((5, 3), (1, 9))
    with FlopCounterMode(display=False) as counter:
        for e in episodes:
            hidden = policy(torch.tensor([e.prompt_ids + e.response_ids]))[0, len(e.prompt_ids) - 1 : -1]
            (hidden @ policy.head[: policy.vocabulary].t()).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    pairs = sum(sum(range(1, 1 + e.length)) for e in episodes)  # of a token and one it attends to; 4 heads, 2 layers
    matmuls = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    assert benchmark.useful_flops(policy, episodes) == matmuls + 3 * 2 * 2 * 8 * 4 * 2 * pairs
    unread = [policy.norm.weight, *([] if tied else [policy.embed_tokens.weight])]
    weights = sum(weight.numel() for weight in policy.parameters()) - sum(weight.numel() for weight in unread)
    read = sum(len(e.prompt_ids) + step for e in episodes for step in range(1, len(e.response_ids) + 1))
    column = KVCache(policy, [64], 1, 64).data.nbytes // 128
    assert benchmark.bytes_to_move(policy, episodes) == 4 * weights * 9 + column * read


@pytest.mark.parametrize("device", DEVICES)
def test_everything_is_written_part_by_part_and_shown_in_the_table(device, tmp_path, monkeypatch, capsys):
    make = {"split": benchmark.AdamW, "offload": benchmark.AdamW, "master": lambda *_: torch.empty(2**60)}
    monkeypatch.setattr(benchmark, "AdamW", lambda weights, settings: make[settings.optimizer](weights, settings))
    monkeypatch.setattr(benchmark, "grade", byte_rewards)
    path, changes = tmp_path / "new/card.json", [*SIZE, *small_world(tmp_path / "world"), "train.optimizer=split"]
    command = ["--json", str(path), *changes, f"model.device={device}", "model.dtype=bfloat16"]
    assert main(["--everything", *command]) == 0
    report, text = json.loads(path.read_text()), path.read_text()
    parts = report["parts"]
    assert list(parts) == ["matmul", "attention", "decode", "sampling", "update", "memory", "step"]
    assert ("failed" in text, "left out" in text) == (False, device == "cpu")
    assert (parts["update"]["master"], "ours" in parts["update"]["offload"]) == ("out of memory", True)
    assert main(["--table", str(path.parent)]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == [report["device"], report["model"], f"{parts['sampling']['ours']['tokens_per_second']:,.0f}"]
    assert cells[5] == f"{parts['update']['split']['flop_utilisation']:.0%}"
    assert (cells[6] == "-", cells[7]) == (device == "cpu", f"{parts['step']['step_seconds']:.1f}")
    assert main(["--part", "memory", *command]) == 0
    assert {**json.loads(path.read_text())["parts"], "memory": parts["memory"]} == parts
    assert main(["--part", "memory", *command, "train.seed=9"]) == 0
    assert list(json.loads(path.read_text())["parts"]) == ["memory"]  # figures of another config are not kept


def test_parts_for_cuda_run_as_far_as_they_can_without_a_card(work, monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**29)
    monkeypatch.setattr(benchmark, "graph_seconds", benchmark.timed)
    assert len(benchmark.matmul(work, None)) == 6
    assert all(figures["math_seconds"] > 0 for figures in benchmark.attention(work, None).values())
    assert [*benchmark.memory(work, None)["update"].values()] == [0.5, 0.5, work.plan.peaks[1] / 2**30]


def test_plans_tables_and_comparisons_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "grade", byte_rewards)
    compare = ["--rounds", "1", "--json", str(tmp_path / "figures.json"), *SIZE, *small_world(tmp_path / "world")]
    for arguments, status, expected in (
        (["--config", "config.yml", "--fits"], 0, ["| 3B | does not fit |", "| 72B |", " GiB |"]),
        (["--config", "config.yml", "--plan", "12", "--shape", "3B"], 0, ["weights", "does not fit"]),
        (compare, 0, ["ours", "transformers", "bandwidth"]),
        (["--update", *compare], 0, ["ours", "naive", "line_tokens"]),
        (["--update", *compare, "rollout.temperature=0.01"], 2, ["rollout.group_size"]),  # all of a group are alike
        (["--table", "benchmarks"], 0, ["| device |"]),
    ):
        assert main(arguments) == status
        printed = "".join(capsys.readouterr())
        assert all(words in printed for words in expected), printed
    assert printed in (ROOT / "benchmarks/README.md").read_text()
    cost_model.main([])
    lines = {line.strip() for line in capsys.readouterr().out.splitlines() if "0.5B" not in line}  # a small one here
    assert lines <= {*(ROOT / "docs/scaling.md").read_text().splitlines()}


def test_a_benchmark_without_shape_takes_the_questions_of_the_runs_first_step():
    """It took the first of the file, which are the easiest: 28 tokens per response instead of 35."""
    asked, work = [], Workload(load_config("config_tiny.yml", SIZE), None)
    run = benchmark.set_up(work.config, ROOT / "tiny", max_rows=1)
    run.progress, run.sampler = Progress(), Namespace(rollout=lambda problems, *_: asked.extend(problems))
    train.rollout(run, 1, 4)
    assert (work.problems, max(e.rewards["format"] for e in work.episodes)) == (asked, 0.1)
