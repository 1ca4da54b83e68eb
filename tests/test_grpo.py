"""The update: advantages, token weights and objectives by hand, and one gradient however the batch is cut.

The oracle of the gradient is `plain_update`: in float64, one row at a time, log_softmax over the whole vocabulary; no
padding, no chunks, no row left out. Saving time and memory must not change its numbers.
"""

import copy
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import grpo
from countdown_task import Problem
from data_types import Config, Episode
from plain_policy import DEVICES, VOCABULARY, small_policy
from plumbing.config import load_config
from qwen2_model import Qwen2

TINY = load_config(Path(__file__).resolve().parent.parent / "config_tiny.yml")
every = pytest.mark.parametrize


def config_with(group_size: int = 3, temperature: float = 1.0, **settings: object) -> Config:
    """A config whose loss is a mean over tokens, unless the settings say otherwise."""
    rollout = replace(TINY.rollout, group_size=group_size, max_new_tokens=12, temperature=temperature)
    return replace(TINY, rollout=rollout, train=replace(TINY.train, **{"divide_loss_by": "tokens", **settings}))


def episode_of(length: int = 1, reward: float = 0.0, truncated: bool = False) -> Episode:
    return Episode(Problem((1, 2), 3), [0], [1] * length, [-1.0] * length, truncated, "", {"all": reward})


def advantages(rewards: list[float], group_size: int, divide_by_std: bool) -> list[float]:
    episodes = [episode_of(reward=reward) for reward in rewards]
    grpo.assign_advantages(episodes, config_with(group_size, divide_by_std=divide_by_std))
    return [episode.advantage for episode in episodes]


@every(
    ("rewards", "divided", "centred"),
    [  # mean 1/4, variance 3/16: with the sample's n - 1 the 1 would get 1.5, not sqrt 3
        ([0, 0, 0, 1], [-0.57735, -0.57735, -0.57735, 1.73205], [-0.25, -0.25, -0.25, 0.75]),
        ([1.1, 0.1, 0.1, 0.0], [1.72489, -0.50077, -0.50077, -0.72334], [0.775, -0.225, -0.225, -0.325]),
        ([5, 5, 6, 6, 1.1, 0.1, 0.1, 1.1], [-1, -1, 1, 1, 1, -1, -1, 1], [-0.5, -0.5, 0.5, 0.5, 0.5, -0.5, -0.5, 0.5]),
    ],
)
def test_advantages_by_hand(rewards: list[float], divided: list[float], centred: list[float]):
    assert advantages(rewards, 4, divide_by_std=True) == pytest.approx(divided, abs=1e-5)
    assert advantages(rewards, 4, divide_by_std=False) == pytest.approx(centred)


def test_a_zero_variance_group_gets_exactly_zero():
    """The mean of seven times 1.1 is not 1.1: dividing that error by a std as small would teach noise."""
    for size, reward, divide_by_std in product((2, 3, 6, 7, 10, 64), (0.0, 0.1, 1.0, 1.1, 1 / 3), (True, False)):
        values = advantages([reward] * size + [0.0] + [1.0] * (size - 1), size, divide_by_std)
        assert (values[:size], all(values[size:])) == ([0.0] * size, True)
        assert advantages([0.1 + 0.2, 0.3] * size, 2 * size, True) == [0.0] * 2 * size, "terms in another order"


def test_token_weights_by_hand():
    """Responses of 2, 4 and 12 tokens, the last one truncated at the limit of 12."""
    episodes = [episode_of(2), episode_of(4), episode_of(12, truncated=True)]
    keep = {"tokens": [1 / 18] * 3, "responses": [1 / 6, 1 / 12, 1 / 36], "limit": [1 / 36] * 3}
    mask = {"tokens": [1 / 6, 1 / 6, 0], "responses": [1 / 4, 1 / 8, 0], "limit": [1 / 24, 1 / 24, 0]}
    for truncated, divide_loss_by in product(("keep", "mask"), keep):
        grpo.assign_token_weights(episodes, config_with(divide_loss_by=divide_loss_by, truncated=truncated))
        expected = {"keep": keep, "mask": mask}[truncated][divide_loss_by]
        assert [episode.token_weight for episode in episodes] == pytest.approx(expected)


@every(
    ("objective", "bounds", "ratio", "advantage", "value", "slope"),
    [
        ("reinforce", {}, 5.0, -2.0, -2 * math.log(2), -2.0),  # does not look at the sampler
        ("clipped", {}, 1.25, 2.0, 2.5, 2.5),  # d(ratio A) / d logprob = ratio A
        ("clipped", {}, 1.3, 2.0, 2.56, 0.0),  # more likely by more than clip_high, 0.28: pushed no further
        ("clipped", {}, 1.3, -2.0, -2.6, -2.6),  # but pushed back
        ("clipped", {}, 0.7, -2.0, -1.6, 0.0),  # less likely by more than clip_low, 0.2: pushed no further
        ("clipped", {}, 0.7, 2.0, 1.4, 1.4),
        ("clipped", {"clip_high": 0.5}, 1.4, 1.0, 1.4, 1.4),  # DAPO: a rare token of a good response may grow further
        ("clipped", {"clip_low": 0.4}, 0.7, -1.0, -0.7, -0.7),
        ("gspo", {}, 1.25, 2.0, 2.5, 2.5),  # of a single token, as clipped
        ("gspo", {"clip_high": 0.1}, 1.25, 2.0, 2.2, 0.0),
        # one ratio per response: of the first 1.0903, the cube root of 1.296; each logprob has a third of three slopes
        ("gspo", {}, [1.2, 1.2, 0.9, 1.5], [2.0, 2.0, 2.0, 1.0], [2.18053] * 3 + [1.28], [2.18053] * 3 + [0.0]),
        ("cispo", {}, 0.25, 2.0, 0.5 * math.log(0.1), 0.5),
        ("cispo", {}, 7.0, 2.0, 2.56 * math.log(2.8), 2.56),  # the weight stops at 1.28, the slope does not vanish
        ("cispo", {"clip_high": 2.0}, 7.0, 2.0, 6 * math.log(2.8), 6.0),
    ],
)
def test_values_and_slopes_of_the_objectives_by_hand(objective, bounds, ratio, advantage, value, slope):
    """The objective of a token, or of a response of three and one of one; its derivative by the logprob of each.

    The sampler's probability was 0.4.
    """
    ratios, advantages, values, slopes = (torch.tensor([x]).flatten() for x in (ratio, advantage, value, slope))
    logprobs, old_logprobs = (0.4 * ratios).log().requires_grad_(), torch.full_like(ratios, 0.4).log()
    lengths, config = [3, 1] if len(ratios) == 4 else [1], config_with(objective=objective, **bounds)
    found = grpo.objective(logprobs, old_logprobs, advantages, lengths, config.train)
    found.sum().backward()
    torch.testing.assert_close((found.detach(), logprobs.grad), (values, slopes), rtol=1e-5, atol=1e-6)


@every("device", DEVICES)
@every(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_gradient_and_statistics_by_hand(device: str, dtype: torch.dtype, tolerance: float):
    """A policy of zeros but for its embedding and last norm: every token of four has probability 1/4.

    The hidden state after token t is its embedding e_t. Response A (advantage 1) is 1, 2 and response B (advantage -1)
    is 3; both follow token 0. The gradient of row v of the head is the sum over tokens of -advantage / 3 *
    ([v is the target] - 1/4) * (hidden state before it). e_0 and e_1 are orthogonal, each of squared length 4.
    """
    policy = small_policy(4, device, tied=False, heads=1, kv_heads=1, hidden=4, inner=4, vocabulary=4).to(dtype)
    e_0, e_1, ln_4 = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0]), math.log(4)
    for name, parameter in policy.named_parameters():
        parameter.data.fill_(name == "norm.weight")
    policy.embed_tokens.weight.data[:2] = torch.stack([e_0, e_1])
    a = replace(episode_of(reward=1.0), response_ids=[1, 2], old_logprobs=[-ln_4, -ln_4])
    b = replace(episode_of(reward=0.0), response_ids=[3], old_logprobs=[-ln_4 - 0.3])
    config = config_with(group_size=2)
    grpo.assign_advantages([a, b], config)
    grpo.assign_token_weights([a, b], config)
    stats = grpo.accumulate_gradient(policy, [a, b], config, 10**9)
    # of three tokens one has log_ratio 0.3, so ratio 1.35, outside the clip range; approx_kl: (ratio - 1) - log_ratio
    means = {"approx_kl": (math.exp(0.3) - 1 - 0.3) / 3, "logprob_gap": 0.3 / 3, "clip_fraction": 1 / 3}
    assert stats == pytest.approx({"loss": ln_4 / 3, "entropy": ln_4, **means}, rel=1e-5)
    by_hand = torch.stack([e_1 / 12, -e_0 / 3 + e_1 / 12, -e_1 / 4, e_0 / 3 + e_1 / 12, *torch.zeros(20, 4)])
    assert torch.allclose(policy.head.grad.float().cpu(), by_hand, atol=tolerance)
    assert not any(tensor.any() for name, tensor in gradient_of(policy).items() if name != "lm_head.weight")
    length, optimizer = math.sqrt(11 / 9), SimpleNamespace(step=lambda: None)
    for bound, scale in ((1e9, 1.0), (0.01, 0.01 / length)):  # a long gradient is scaled down, a short one not up
        assert grpo.apply_gradient(policy, optimizer, bound) == pytest.approx(length, rel=tolerance)
        assert torch.allclose(policy.head.grad.float().cpu(), by_hand * scale, atol=tolerance * scale)


def gradient_of(policy: Qwen2) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def plain_update(policy: Qwen2, episodes: list[Episode], config: Config) -> tuple[dict, dict]:
    """The gradient and the statistics."""
    policy, terms = copy.deepcopy(policy).double(), []
    for e in episodes:
        tokens = torch.tensor([e.prompt_ids + e.response_ids], device=policy.head.device)
        logits = (policy(tokens)[0] @ policy.head.t())[len(e.prompt_ids) - 1 : -1, :VOCABULARY]
        distribution = (logits / config.rollout.temperature).log_softmax(dim=-1)  # (tokens, V)
        logprobs, old = distribution[range(len(logits)), e.response_ids], torch.tensor(e.old_logprobs).to(logits)
        losses = -e.token_weight * grpo.objective(logprobs, old, torch.tensor(e.advantage), [len(old)], config.train)
        log_ratio, entropy = logprobs - old, -(distribution.exp() * distribution).sum(dim=-1)
        outside = (log_ratio.exp() < 1 - config.train.clip_low) | (log_ratio.exp() > 1 + config.train.clip_high)
        terms.append(torch.stack([losses, entropy, log_ratio.exp() - 1 - log_ratio, log_ratio.abs(), outside]))
    loss = sum(term[0].sum() for term in terms)
    loss.backward()
    means = torch.cat([term for term, e in zip(terms, episodes, strict=True) if e.active], dim=1).mean(dim=1)[1:]
    names = ("entropy", "approx_kl", "logprob_gap", "clip_fraction")
    return gradient_of(policy), {"loss": loss.item(), **dict(zip(names, means.tolist(), strict=True))}


def random_groups(sizes: list[tuple[int, list[int]]], seed: int = 0) -> list[list[Episode]]:
    """Of each group its prompt's tokens and those of its responses; every third episode or so is inactive."""
    random, groups = np.random.default_rng(seed), []
    for prompt, responses in sizes:
        prompt_ids = random.integers(0, VOCABULARY, prompt).tolist()
        groups.append([])
        for length in responses:
            ids, advantage = random.integers(0, VOCABULARY, length).tolist(), random.normal() * (random.random() < 0.7)
            old, weight = random.normal(-6.0, 1.0, length).tolist(), random.random() / 100  # ratios on all sides of 1
            groups[-1].append(Episode(None, prompt_ids, ids, old, False, "", {}, advantage, weight))
    return groups


GROUPS = st.lists(
    st.tuples(st.integers(1, 90), st.lists(st.integers(1, 30), min_size=1, max_size=5)), min_size=1, max_size=5
)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 600))
def test_micro_batches_hold_every_row_once_within_the_budget(sizes: list, budget: int):
    """A group that is split repeats its prompt, so only one that does not fit the budget may be."""
    groups = random_groups(sizes)
    batches = grpo.micro_batches(groups, budget)
    assert sorted(id(e) for batch in batches for e in batch) == sorted(id(e) for group in groups for e in group)
    for batch in batches:
        rows = sum(e.length for e in batch)
        assert len(batch) == 1 or (grpo.packed_tokens(batch) <= budget and rows <= 2 * budget)
    for group in groups:
        parts = sum(any(e in batch for e in group) for batch in batches)
        assert parts == 1 or grpo.packed_tokens(group) > budget or sum(e.length for e in group) > 2 * budget


@every("device", DEVICES)
@every(
    ("objective", "temperature", "tied"),
    [("reinforce", 1.0, True), ("clipped", 0.7, False), ("cispo", 1.4, True), ("gspo", 0.7, True)],
)
@settings(deadline=None, derandomize=True, max_examples=30)  # a ratio may fall on either side of a bound
@given(GROUPS, st.integers(1, 400) | st.just(10**9), st.sampled_from([1, 3, 512]), st.booleans(), st.integers(0, 999))
def test_the_update_is_the_plain_formula_however_the_batch_is_cut(
    device, objective, temperature, tied, sizes, budget, chunk, checkpointing, seed
):
    """A token put back to another row's place, a position counted from the line's start, a row that sees its neighbour,
    a chunk that is lost or doubled, a mean over a micro-batch's own tokens: each changes the gradient.
    """
    policy, config = small_policy(seed % 7, device, tied), config_with(temperature=temperature, objective=objective)
    episodes = [e for group in random_groups(sizes, seed) for e in group]
    episodes[0].advantage, lines = 1.0, []
    policy.checkpoint_layers = checkpointing
    policy.register_forward_pre_hook(lambda _, arguments: lines.append(arguments[0].numel()))
    with patch.object(grpo, "CHUNK_TOKENS", chunk):
        stats = grpo.accumulate_gradient(policy, episodes, config, budget)
    if budget == 10**9:  # each prompt once, and nothing of an inactive row
        active = [e for e in episodes if e.active]
        prompts = {id(e.prompt_ids): len(e.prompt_ids) for e in active}
        assert lines == [sum(prompts.values()) + sum(len(e.response_ids) for e in active)]
    gradient, expected = plain_update(policy, episodes, config)
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-6)
    total = torch.cat([tensor.flatten() for tensor in gradient.values()]).norm()
    for name, tensor in gradient_of(policy).items():
        assert (tensor - gradient[name]).norm() <= 3e-5 * gradient[name].norm() + 1e-6 * total, name
