"""The benchmark of the update measures equal work, and counts what it says it counts.

A ratio between two ways to a gradient says something only if it is one gradient; a utilisation, only if its FLOPs
are those of the model. No test here looks at a time.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_policy import UNCUT, VOCABULARY, as_episodes, small_policy
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import (
    SizesSeen,
    Update,
    logprob_pass,
    logprob_work,
    measure_update,
    row_length,
    update_ablations,
    useful_flops,
)
from data_types import Episode, TrainSettings, load_config
from grpo import CHUNK_TOKENS, assign_token_weights
from rollout import Sampling, generate

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20  # tokens an answer
SETTINGS = TrainSettings(learning_rate=1e-3, steps=1, tokens_per_microbatch=128)


class WatchedUpdate(Update):
    """Keeps the gradient that each step is given, and the shapes (rows, T) that the model was run with before it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.gradient: dict[str, Tensor] = {}
        self.running: list[tuple[int, int]] = []
        self.shapes: list[tuple[int, int]] = []
        self.policy.register_forward_pre_hook(lambda _, inputs: self.running.append(tuple(inputs[0].shape)))

    def step(self) -> int:
        self.gradient = {name: weight.grad.clone() for name, weight in self.policy.named_parameters()}
        self.shapes, self.running = self.running, []
        return super().step()


def small_update(sampling: Sampling = UNCUT, **changes: object) -> WatchedUpdate:
    """24 answers of 1 to 20 tokens to 6 questions; the groups of two have no spread."""
    policy, settings = small_policy(4), replace(SETTINGS, **changes)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (4, 9, 2, 6, 11, 3)]
    uniforms = torch.rand(24, LIMIT, generator=generator)
    answers = generate(policy, prompts, uniforms, list(range(0, VOCABULARY, 8)), VOCABULARY, sampling)
    episodes = as_episodes(answers, prompts)
    for episode in episodes:
        episode.logprobs = [logprob - 0.3 for logprob in episode.logprobs]  # as if an older policy had sampled them
        episode.advantage = 0.0 if episode.group in (1, 4) else torch.randn((), generator=generator).item()
    assign_token_weights(episodes, settings, LIMIT)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    return WatchedUpdate(policy, optimizer, episodes, VOCABULARY, sampling, settings)


def assert_same_gradient(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    difference = sum((gradient[name] - tensor).square().sum() for name, tensor in expected.items()).sqrt()
    length = sum(tensor.square().sum() for tensor in expected.values()).sqrt()
    assert length > 0.01 and difference < 1e-5 * length


@pytest.mark.parametrize("sampling", [UNCUT, Sampling(temperature=0.7, top_k=5, top_p=0.9)], ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"objective": "clipped", "divide_loss_by": "answers"}, {"objective": "weighted", "truncated": "mask"},
], ids=str)
def test_the_naive_update_has_our_gradient_and_is_naive(sampling: Sampling, changes: dict[str, str]):
    update = small_update(sampling, **changes)
    longest = max(map(row_length, update.episodes))
    assert len(set(map(row_length, update.episodes))) > 6
    assert update.ours() == sum(map(row_length, update.episodes))
    ours, our_shapes = update.gradient, update.shapes
    assert update.naive() == update.tokens
    assert_same_gradient(ours, update.gradient)
    rows = 128 // longest
    assert update.shapes == [(rows, longest)] * (24 // rows) + [(24 % rows, longest)] * (24 % rows > 0)
    assert sum(rows for rows, _ in our_shapes) == len(update.telling) <= 16


def test_every_turn_of_the_update_finds_the_same_weights():
    """With a learning rate, the second turn of a benchmark would update another policy than the first."""
    update = small_update()
    before = {name: weight.clone() for name, weight in update.policy.state_dict().items()}
    update.ours()
    assert all(torch.equal(weight, before[name]) for name, weight in update.policy.state_dict().items())


def test_an_ablation_changes_the_work_and_not_the_gradient(monkeypatch: pytest.MonkeyPatch):
    """A stand-in under a name that grpo.py no longer uses would switch nothing off, and its ratio would be 1."""
    monkeypatch.setattr(benchmark.grpo, "CHUNK_TOKENS", 8)

    def watched(run: Callable[[], int]) -> tuple[list[tuple[int, int]], Counter[int]]:
        with SizesSeen() as seen:
            run()
        return update.shapes, seen.sizes

    update = small_update()
    shapes, sizes = watched(update.ours)
    gradient = update.gradient
    lengths = [row_length(episode) for episode in update.telling]
    work = {}
    for name, run in update_ablations(update).items():
        work[name] = watched(run)
        assert_same_gradient(update.gradient, gradient)
    assert sum(rows for rows, _ in work["rows without advantage run too"][0]) == 24
    in_order, unbounded = work["rows in the order sampled"][0], work["padding without bound"][0]
    assert in_order[0][1] == max(lengths[: in_order[0][0]]) < max(lengths)
    assert all(rows * longest <= 128 for rows, longest in in_order)
    assert sum(rows for rows, _ in in_order) == len(lengths)
    assert len(unbounded) < len(shapes)
    whole, kept = work["logits of a micro-batch at once"][1], work["logits kept, not recomputed"][1]
    assert max(whole) > max(sizes)
    assert 0 < kept[8 * VOCABULARY] < sizes[8 * VOCABULARY]  # the logits of a chunk are made once, not twice


def test_figures_count_what_they_say():
    update = small_update()
    arguments = argparse.Namespace(rounds=1, ablate=False)
    figures = measure_update(update, load_config(str(ROOT / "config_tiny.yml")), arguments)
    update.ours()
    padded = sum(rows * longest for rows, longest in update.shapes)
    run = [episode for episode in update.episodes if episode.advantage]
    tokens_run = sum(len(episode.prompt_ids + episode.response_ids) for episode in run)
    assert figures["rows"] == 24 and figures["rows_run"] == len(run) == 16
    assert figures["groups_without_spread"] == pytest.approx(2 / 6)
    assert figures["tokens"] == sum(len(e.prompt_ids + e.response_ids) for e in update.episodes) > tokens_run
    assert figures["tokens_run"] == tokens_run and figures["micro_batches"] == len(update.shapes)
    assert figures["padding_share"] == pytest.approx(1 - tokens_run / padded)
    assert figures["tokens_run_per_second"] / figures["tokens_per_second"] == pytest.approx(tokens_run / update.tokens)
    assert set(figures["variants"]) == {"ours", "naive"}
    assert 0 < figures["optimizer_step_share"] < 1


@pytest.mark.parametrize("tied", [True, False])
def test_useful_flops_are_those_of_the_products_and_of_causal_attention(tied: bool):
    """torch counts the products of a forward and backward of one row, unpadded, the head at response tokens only."""
    policy = small_policy(4, tied=tied)
    episodes = [Episode(None, 0, [1] * prompt, [2] * response, [], True, "") for prompt, response in ((5, 3), (1, 9))]
    counter = FlopCounterMode(display=False)
    with counter:
        for episode in episodes:
            hidden = policy(torch.tensor([episode.prompt_ids + episode.response_ids]))[0]
            (hidden[len(episode.prompt_ids) - 1 : -1] @ policy.head[:VOCABULARY].t()).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    config = policy.config
    pairs = sum(sum(range(1, 1 + row_length(episode))) for episode in episodes)  # of a token and one it attends to
    attention = 3 * 2 * 2 * config.head_dim * config.num_attention_heads * config.num_hidden_layers * pairs
    assert useful_flops(policy, episodes, VOCABULARY) == products + attention


class ShapesOnly(SizesSeen):
    """What is large is allocated but never worked out: at its real size the head would take half a minute.

    An operation that reads more than LARGE elements is run on meta tensors, which have a shape and no numbers, and its
    results are made empty. Views and everything small, such as the choice of response positions, are run as they are.
    """

    LARGE = 2**22

    def compute(self, function: Callable, arguments: tuple, keywords: dict) -> object:
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        if function.is_view or max((tensor.numel() for tensor in tensors), default=0) <= self.LARGE:
            return function(*arguments, **keywords)
        if function._schema.is_mutable:
            return arguments[0]
        shapes = function(*tree_map(on_meta, arguments), **tree_map(on_meta, keywords))
        return tree_map(lambda leaf: torch.empty_like(leaf, device="cpu") if isinstance(leaf, Tensor) else leaf, shapes)


def on_meta(leaf: object) -> object:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def test_no_tensor_outgrows_a_chunk_of_logits_or_the_head_at_real_size():
    """Qwen2.5's head, 151,936 x 896, and a micro-batch of 1,152 response tokens, whose logits would be 0.7 GB a copy.

    `python benchmark.py --config config_tiny.yml --update-memory` runs the same in full and weighs the process.
    """
    vocabulary, largest = 151_936, {}
    for chunked in (True, False):
        with ShapesOnly() as seen:
            policy, episodes = logprob_work(vocabulary, tokens=1536)
            logprob_pass(policy, episodes, chunked)
        assert policy.head.shape == (vocabulary, 896) and policy.head.grad.shape == policy.head.shape
        largest[chunked] = max(seen.sizes), seen.largest_beside(policy.head)
    assert sum(len(episode.response_ids) for episode in episodes) == 1152
    assert largest[True] == (vocabulary * 896, vocabulary * CHUNK_TOKENS)
    assert largest[False][0] == largest[False][1] == vocabulary * (1536 - 6)  # the counting counts


def test_the_command_writes_its_figures_and_says_when_there_is_nothing_to_measure(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    target = tmp_path / "deep" / "update.json"
    command = ["--config", "config_tiny.yml", "--update", "--rounds", "1", "--json", str(target), "train.threads=1",
               "rollout.questions_per_step=2", "rollout.group_size=8"]
    assert benchmark.main([*command, "rollout.max_new_tokens=64"]) == 0
    report = json.loads(target.read_text())
    figures = report["update"]
    assert report["rows"] == figures["rows"] == 16 and figures["padding_share"] <= 0.05
    assert "times_as_fast_as_naive" in figures and figures["utilisation_of_matmul"] > 0
    capsys.readouterr()
    assert benchmark.main([*command, "rollout.max_new_tokens=1"]) == 2  # no answer earns anything
    assert "raise rollout.questions_per_step" in capsys.readouterr().err
