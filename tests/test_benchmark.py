"""The benchmark compares equal work and counts what it says it counts. No test here looks at a time.

A ratio of two ways to a gradient means something only if it is the same gradient, and a utilisation only if its bytes
and FLOPs are those of the model. No card has run the parts for CUDA, so here they run with CUDA's own calls replaced.
"""

import inspect
import json
import sys
import textwrap
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_policy import DEVICES, active_episodes, small_policy
from test_without_a_card import OneDevice
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import ForcedDecoder, Workload, accumulate_gradient, main, naive_gradient
from config import load_config
from countdown_task import Problem
from data_types import Progress, Sampling
from rollout import Decoder, KVCache
from run import Agent
from train import next_problems

ROOT = Path(__file__).resolve().parent.parent
SIZE = ["train.threads=1", "rollout.group_size=4", "rollout.questions_per_step=4", "rollout.max_new_tokens=64"]


@pytest.fixture(scope="module", autouse=True)
def work():
    """A small random model and 16 rows of real lengths, shortened to a ninth: the numbers that are not zero count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setitem(benchmark.SHAPES, "0.5B", (32, 48, 2, 4, 2, True, 231))
        changes = ["rollout.max_new_tokens=1024", "train.tokens_per_microbatch=3000"]
        work = Workload(load_config("config_tiny.yml", [*SIZE, *changes]), "0.5B")
        work.uniforms = work.uniforms[:, ::9]
        yield work


def test_forced_lengths_are_obeyed_in_every_wave_and_bring_nothing_from_the_cpu_into_a_graph(work, monkeypatch):
    monkeypatch.setattr(work, "plan", replace(work.plan, rows=8))
    lengths = [len(response.ids) for response in work.sample()]
    assert lengths == (work.uniforms > 0).sum(dim=1).tolist() != sorted(lengths)
    assert [bool(episode.advantage) for episode in work.episodes] == [True] * 12 + [False] * 4
    config = load_config("config_tiny.yml", [*SIZE, "rollout.max_new_tokens=1024", "rollout.group_size=256"])
    assert 290 < (Workload(config, "0.5B").uniforms > 0).sum(dim=1).float().mean() < 331  # a few are truncated
    policy = small_policy(1).to("meta")
    decoder = ForcedDecoder(policy, KVCache(policy, [3], 6, 5), torch.empty(6, 5, device="meta"), [], Sampling())
    monkeypatch.setattr(Decoder, "record", lambda decoder, logits: None)
    with OneDevice():
        decoder.record(torch.empty(6, 231, device="meta"))


def larger(facts):  # "=+": the second fact is larger than the first variant's
    return ["".join("+" if a > b else "=" for a, b in zip(fact, facts[0], strict=True)) for fact in facts]


def test_a_rival_of_the_update_does_more_work_for_the_same_gradient(work, monkeypatch):
    """Rows run, positions with padding, logits at a time. A stand-in that grpo.py no longer uses would change none."""
    settings, original = replace(work.config.train, objective="clipped"), work.policy.logits
    episodes = [replace(e, old_logprobs=[value - 0.3 for value in e.old_logprobs]) for e in work.episodes]
    shapes, chunks, facts, gradients = [], [], [], []
    monkeypatch.setattr(work, "episodes", episodes)
    monkeypatch.setattr(benchmark.grpo, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(work.policy, "logits", lambda hidden: chunks.append(len(hidden)) or original(hidden))

    def run(gradient=accumulate_gradient):
        gradient(work.policy, work.episodes, Sampling(0.7, 50, 0.9), settings, 3000)

    with work.policy.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape)):
        for variant in (run, lambda: run(naive_gradient), *benchmark.update_ablations(work, run).values()):
            shapes.clear(), chunks.clear(), variant()
            gradients.append(torch.cat([weight.grad.flatten() for weight in work.policy.parameters()]))
            facts.append((sum(rows for rows, _ in shapes), sum(shape.numel() for shape in shapes), max(chunks)))
    assert all((gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm() for gradient in gradients)
    assert (facts[0][0], larger(facts)) == (12, ["===", "+++", "++=", "=+=", "=+=", "==+"])
    figures = benchmark.update_in_mode(work, "master", Namespace(parts="all", ablate=False, rounds=1))
    tokens = sum(len(e.prompt_ids + e.response_ids) for e in work.episodes[:12])
    assert figures["padding_share"] == pytest.approx(1 - tokens / facts[0][1])
    assert figures["ours"]["tokens_per_second"] * figures["ours"]["seconds"] == pytest.approx(tokens)


def test_an_ablated_sampler_does_more_work_for_as_many_tokens(work, monkeypatch):
    """Rows prefilled, rows in the last step, kv heads, columns in the first step: each idea keeps one of them small."""
    attention, calls, facts = torch.nn.functional.scaled_dot_product_attention, [], []

    def spy(q, k, v, **options):
        calls.append((q.shape[0], k.shape[1], k.shape[2], "is_causal" in options))
        return attention(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for run in (work.count_sampled, *benchmark.sampler_ablations(work).values()):
        calls.clear()
        assert run() == (work.uniforms > 0).sum()
        first = next(call for call in calls if not call[3])
        facts.append((calls[0][0], calls[-1][0], first[1], first[2]))
    assert larger(facts) == ["====", "+===", "=+==", "==+=", "===+", "++++"]


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_flops_are_those_of_the_model(tied):
    """torch counts the matmuls of each row alone, without padding, the head at response tokens only."""
    policy, counter = small_policy(4, tied=tied), FlopCounterMode(display=False)
    episodes = active_episodes((5, 3), (1, 9))
    with counter:
        for e in episodes:
            hidden = policy(torch.tensor([e.prompt_ids + e.response_ids]))[0, len(e.prompt_ids) - 1 : -1]
            (hidden @ policy.head[: policy.vocabulary].t()).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    pairs = sum(sum(range(1, 1 + e.length)) for e in episodes)  # of a token and one it attends to; 4 heads, 2 layers
    matmuls = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    assert benchmark.useful_flops(policy, episodes) == matmuls + 3 * 2 * 2 * 8 * 4 * 2 * pairs
    weights = sum(weight.numel() for weight in policy.parameters()) - 32  # the last norm
    weights -= 0 if tied else policy.embed_tokens.weight.numel()
    read = sum(len(e.prompt_ids) + step for e in episodes for step in range(1, len(e.response_ids) + 1))
    column = KVCache(policy, [64], 1, 64).data.nbytes // 128
    assert benchmark.bytes_to_move(policy, episodes) == 4 * weights * 9 + column * read


@pytest.mark.parametrize("device", DEVICES)
def test_everything_is_written_part_by_part_and_shown_in_the_table(device, tmp_path, monkeypatch, capsys):
    def refuse(parameters, settings, original=benchmark.AdamW):
        if settings.optimizer == "master":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(parameters, settings)

    monkeypatch.setattr(benchmark, "AdamW", refuse)
    path, model = tmp_path / "new" / "card.json", [f"model.device={device}", "model.dtype=bfloat16"]
    command = ["--json", str(path), *model, "train.optimizer=split", *SIZE]
    assert main(["--everything", *command]) == 0
    report = json.loads(path.read_text())
    parts = report["parts"]
    assert list(parts) == ["matmul", "attention", "decode", "sampling", "update", "memory", "step"]
    assert ("failed" in path.read_text(), "left out" in path.read_text()) == (False, device == "cpu")
    assert (parts["update"]["master"], "ours" in parts["update"]["offload"]) == ("out of memory", True)
    capsys.readouterr()
    assert main(["--table", str(path.parent)]) == 0
    cells = capsys.readouterr().out.splitlines()[2].strip("| ").split(" | ")
    assert cells[:3] == [report["device"], "tiny", f"{parts['sampling']['ours']['tokens_per_second']:,.0f}"]
    assert cells[5] == f"{parts['update']['split']['flop_utilisation']:.0%}"
    assert (cells[6] == "-", cells[7]) == (device == "cpu", f"{parts['step']['step_seconds']:.1f}")
    assert main(["--part", "decode", *command]) == 0
    assert {**json.loads(path.read_text())["parts"], "decode": parts["decode"]} == parts
    assert main(["--part", "decode", *command, "train.seed=9"]) == 0
    assert list(json.loads(path.read_text())["parts"]) == ["decode"]  # figures of another config are not kept


def test_parts_for_cuda_run_as_far_as_they_can_without_a_card(work, monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**29)
    monkeypatch.setattr(benchmark, "graph_seconds", benchmark.timed)
    assert len(benchmark.matmul(work, None)) == 6
    assert all(figures["math_seconds"] > 0 for figures in benchmark.attention(work, None).values())
    figures = {"allocated_gib": 0.5, "reserved_gib": 0.5, "planned_gib": work.plan.peaks[1] / 2**30}
    assert benchmark.memory(work, None)["update"] == figures


def test_plans_tables_and_comparisons_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHAPES", {name: benchmark.SHAPES[name] for name in ("3B", "72B")})
    compare = ["--rounds", "1", "--json", str(tmp_path / "figures.json"), *SIZE]
    for arguments, status, expected in (
        (["--config", "config.yml", "--fits"], 0, ["| 3B | does not fit |", "| 72B |", " GiB |"]),
        (["--config", "config.yml", "--plan", "12", "--shape", "3B"], 0, ["weights", "does not fit: "]),
        (compare, 0, ["ours", "transformers", "bandwidth"]),
        (["--update", *compare], 0, ["ours", "naive", "padding_share"]),
        (["--update", *compare, "rollout.max_new_tokens=1"], 2, ["rollout.group_size"]),  # nothing earns anything
        (["--table", "benchmarks"], 0, ["| device |"]),
    ):
        assert main(arguments) == status
        printed = "".join(capsys.readouterr())
        assert all(words in printed for words in expected), printed
    assert printed in (ROOT / "benchmarks" / "README.md").read_text()


CLONE = {
    "grpo.py": """
        import data_types, tokenizer
        def rollout(model, batch, tokenizer, limit, group, reward_function, device, dtype):
            rewards = [reward_function(t, batch.numbers[0], 0, tokenizer.eos_token)["reward"] for t in model.texts]
            model.calls += [limit, group, rewards, batch.prefix_token_ids]
            model.calls += [tokenizer.pad_token_id, tokenizer.eos_token_id]
            return model.episodes
        def update_policy(model, optimizer, episodes, micro_batch_size, pad_token_id, max_grad_norm, device, dtype):
            model.calls += [episodes, optimizer.param_groups[0]["lr"], pad_token_id, max_grad_norm]""",
    "qwen2_model.py": """
        from dataclasses import dataclass
        import torch
        @dataclass
        class Qwen2Config:
            hidden_size: int
            attention_dropout: float = 0.0
        class Transformer(torch.nn.Linear):
            def __init__(self, config, device): super().__init__(config.hidden_size, 1); self.calls = []
            def load_state_dict(self, weights): self.weights = weights""",
    "data_types.py": "from types import SimpleNamespace as MiniBatch",
    "tokenizer.py": "",
}


def test_grpo_zero_gets_the_same_work_and_its_modules_do_not_replace_ours_of_the_same_names(tmp_path, monkeypatch):
    for name, text in CLONE.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(ROOT)
    work, ours = Workload(load_config("config_tiny.yml", SIZE), None), sys.modules["grpo"]
    work.problems[0] = Problem((1, 2, 3), 6)
    step = benchmark.grpo_zero_step(tmp_path, work)
    inside = inspect.getclosurevars(step).nonlocals
    assert sys.modules["grpo"] is ours is not inside["theirs"]
    model = inside["model"]
    model.texts = [f"</think><answer>1 + 2 + 3</answer>{end}" for end in ("<|im_end|>", "")]
    model.episodes = [Namespace(generated_token_ids=[1, 2, 3])]
    assert step() == [3]
    pad, end = work.tokenizer.end_ids
    assert work.tokenizer.decode([pad, end]) == "<|endoftext|><|im_end|>"
    assert model.calls == [64, 4, [1.1, 1.0], work.prompts, pad, end, model.episodes, 0.0, pad, 1.0]
    assert all(torch.equal(weight, model.weights[name]) for name, weight in work.policy.state_dict().items())


def test_a_benchmark_without_shape_takes_the_questions_of_the_runs_first_step(monkeypatch):
    """It took the first of the file, which are the easiest: 28 tokens per response instead of 35."""
    monkeypatch.chdir(ROOT)
    config = load_config("config_tiny.yml", SIZE)
    agent = Agent(config, Path("tiny"))
    run = Namespace(training=agent.training, config=config, progress=Progress())
    assert Workload(config, None).problems == next_problems(run, 0)
