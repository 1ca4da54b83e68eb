"""The update: advantages by hand, and one gradient whatever way the batch is cut.

The oracle is `naive_loss`: the formula as it stands in the paper, log_softmax over the whole vocabulary,
one row at a time, no padding, no chunks, no row left out. Saving time and memory must not change its
gradient.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_policy import (
    DEVICES,
    UNCUT,
    VOCABULARY,
    as_episodes,
    plain_distribution,
    small_policy,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from data_types import Episode, Problem, Reward, TrainSettings
from grpo import (
    accumulate_gradient,
    advantages,
    apply_gradient,
    assign_advantages,
    assign_token_weights,
    micro_batches,
    objective,
    response_logprobs,
)
from qwen2_model import Qwen2
from rollout import Answer, Sampling, generate

SETTINGS = TrainSettings(learning_rate=1e-3, steps=1, max_grad_norm=1e9, divide_loss_by="tokens")  # clips nothing
LIMIT = 12  # tokens an answer
SAMPLINGS = [UNCUT, Sampling(temperature=0.7, top_k=5, top_p=0.9), Sampling(temperature=1.4, top_p=0.8)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# ---------------------------------------------------------------------------- advantages


def naive_advantages(rewards: list[float], groups: list[int], divide_by_std: bool) -> tuple[list[float], int]:
    values, flat = [], set()
    for reward, group in zip(rewards, groups, strict=True):
        peers = [other for other, its_group in zip(rewards, groups, strict=True) if its_group == group]
        mean = math.fsum(peers) / len(peers)
        spread = math.sqrt(math.fsum((peer - mean) ** 2 for peer in peers) / len(peers))
        if max(peers) == min(peers):
            flat.add(group)
            values.append(0.0)
        else:
            values.append((reward - mean) / (spread if divide_by_std else 1.0))
    return values, len(flat)


def advantages_of(rewards: list[float], groups: list[int],
                  divide_by_std: bool = True) -> tuple[list[float], int]:
    values, flat = advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), divide_by_std)
    return values.tolist(), flat


def test_advantages_worked_out_by_hand():
    """0, 0, 0, 1: mean 1/4, variance 3/16; with the sample's n - 1 the 1 would get 1.5, not sqrt 3."""
    rewards, groups = [0, 0, 0, 1, 1.1, 0.1, 0.1, 1.1], [0, 0, 0, 0, 1, 1, 1, 1]
    values, flat = advantages_of(rewards, groups)
    root = math.sqrt(3)
    assert values == pytest.approx([-1 / root, -1 / root, -1 / root, root, 1, -1, -1, 1])
    assert flat == 0
    values, flat = advantages_of(rewards, groups, divide_by_std=False)
    assert values == pytest.approx([-0.25, -0.25, -0.25, 0.75, 0.5, -0.5, -0.5, 0.5])
    assert flat == 0


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_advantages_of_random_groups_in_any_order(divide_by_std: bool):
    """Rows of a group need not stand together, nor the ids be without gaps; an unused id is no flat group."""
    random = np.random.default_rng(1)
    for _ in range(50):
        groups = random.choice([0, 1, 4, 5, 9], 40).tolist()
        rewards = random.choice([0.0, 0.1, 1.0, 1.1], 40, p=[0.7, 0.1, 0.1, 0.1]).tolist()
        values, flat = advantages_of(rewards, groups, divide_by_std)
        expected, expected_flat = naive_advantages(rewards, groups, divide_by_std)
        assert values == pytest.approx(expected, abs=1e-12)
        assert flat == expected_flat
        backwards, flat_backwards = advantages_of(rewards[::-1], groups[::-1], divide_by_std)
        assert backwards == pytest.approx(values[::-1]) and flat_backwards == flat


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 0.1 + 1.0, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 6, 7, 10, 64])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_a_group_without_spread_is_exactly_zero(reward: float, size: int, divide_by_std: bool):
    """The mean of seven times 1.1 is not 1.1: dividing that error by a spread as small would teach noise."""
    values, flat = advantages_of([reward] * size + [0.0, 1.0], [1] * size + [0, 0], divide_by_std)
    assert values[:size] == [0.0] * size and flat == 1
    assert values[size:] == pytest.approx([-1, 1] if divide_by_std else [-0.5, 0.5])


def test_episodes_get_their_advantages():
    rewards = [(1, 0.1, 0), (0, 0.1, 1), (1, 0.1, 1), (0, 0.1, 1), (2, 0, 0), (2, 0.1, 0)]
    episodes = [Episode(Problem((1, 2), 3), group, [1], [2], [-1.0], True, "", Reward(form, correct))
                for group, form, correct in rewards]
    assert assign_advantages(episodes, SETTINGS, LIMIT) == 1
    assert [episode.advantage for episode in episodes] == pytest.approx([-1, 0, 1, 0, -1, 1])
    assert assign_advantages(episodes, replace(SETTINGS, divide_by_std=False), LIMIT) == 1
    assert [episode.advantage for episode in episodes] == pytest.approx([-0.5, 0, 0.5, 0, -0.05, 0.05])


# ---------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("budget", [1, 100, 1000, 8192, 10**9])
def test_micro_batches_hold_every_row_once_within_the_budget_longest_first(budget: int):
    """Longest first: what does not fit into memory fails in the first micro-batch, not hours later."""
    lengths = np.random.default_rng(2).integers(1, 400, 300).tolist()
    batches = micro_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(300))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    in_order = [lengths[row] for batch in batches for row in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert micro_batches([], budget) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [4096, 8192])
def test_micro_batches_pad_less_than_five_percent(seed: int, budget: int):
    """32 questions x 8 answers with the lengths of real runs: log-normal, mean 331, cut at 1,024."""
    random = np.random.default_rng(seed)
    answers = np.minimum(random.lognormal(math.log(331) - 0.5 * 0.6**2, 0.6, 256), 1024).astype(int)
    lengths = (answers + np.repeat(random.integers(130, 150, 32), 8)).tolist()
    batches = micro_batches(lengths, budget)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) <= padded < sum(lengths) / 0.95
    assert len(batches) < 1.5 * sum(lengths) / budget  # a row at a time would need no padding at all


def test_padding_stays_below_five_percent_whatever_the_lengths():
    """The tiny model's micro-batches once held 14 % padding: few rows, from 60 tokens to 310, share 2,048 tokens."""
    random = np.random.default_rng(0)
    for lengths in (random.integers(60, 310, 256), random.integers(1, 20, 200), np.array([1000, 1, 1, 1])):
        for batch in (batches := micro_batches(lengths.tolist(), 2048)):
            assert sum(lengths[batch]) >= 0.95 * len(batch) * max(lengths[batch])
        assert len(batches) < len(lengths)


# ---------------------------------------------------------------------------- the gradient


def sampled_episodes(policy: Qwen2, sampling: Sampling, seed: int = 3) -> list[Episode]:
    """18 answers to 6 questions, from 1 to 12 tokens, some cut off; a third of them taught nothing."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCABULARY, length).tolist() for length in (4, 9, 2, 6, 11, 3)]
    uniforms = torch.from_numpy(random.random((18, 12), dtype=np.float32))
    answers = generate(policy, prompts, uniforms, list(range(0, VOCABULARY, 8)), VOCABULARY, sampling)
    episodes = as_episodes(answers, prompts)
    for i, episode in enumerate(episodes):
        episode.advantage = 0.0 if i % 3 == 0 else float(random.normal())
    return episodes


def naive_logprobs(policy: Qwen2, episode: Episode, sampling: Sampling) -> Tensor:
    """log_softmax over the vocabulary for each response token: (tokens, V)."""
    tokens = episode.prompt_ids + episode.response_ids
    hidden = policy(torch.tensor([tokens], device=policy.embed.weight.device))[0]
    logits = (hidden @ policy.head.t())[len(episode.prompt_ids) - 1 : -1, :VOCABULARY]
    rows = logits.detach().double().cpu().numpy()
    possible = np.stack([plain_distribution(row, sampling) > 0 for row in rows])
    possible[range(len(possible)), episode.response_ids] = True  # rounding may move a drawn one past the edge
    cut = torch.from_numpy(~possible).to(logits.device)
    return (logits / sampling.temperature).masked_fill(cut, -torch.inf).log_softmax(dim=-1)


def naive_loss(policy: Qwen2, episodes: list[Episode], sampling: Sampling) -> Tensor:
    total = torch.zeros((), device=policy.embed.weight.device)
    for episode in episodes:
        logprobs = naive_logprobs(policy, episode, sampling)
        for place, token in enumerate(episode.response_ids):
            total = total + episode.advantage * logprobs[place, token]
    return -total / sum(len(episode.response_ids) for episode in episodes)


def naive_gradient(policy: Qwen2, episodes: list[Episode], sampling: Sampling) -> dict[str, Tensor]:
    naive_loss(policy, episodes, sampling).backward()
    gradient = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return gradient


def policy_gradient(policy: Qwen2, optimizer: torch.optim.Optimizer, episodes: list[Episode], vocabulary: int,
                    sampling: Sampling, settings: TrainSettings,
                    on_tokens: Callable[[int], object] = lambda count: None) -> dict[str, float | None]:
    """One update, put together as train.py does it."""
    assign_token_weights(episodes, settings, LIMIT)
    figures = accumulate_gradient(policy, episodes, vocabulary, sampling, settings, settings.tokens_per_microbatch,
                                  on_tokens)
    return {**figures, "grad_norm": apply_gradient(policy, optimizer, settings.max_grad_norm)}


def update(policy: Qwen2, episodes: list[Episode], sampling: Sampling = UNCUT, vocabulary: int = VOCABULARY,
           **changes: object) -> tuple[dict[str, Tensor], dict[str, float | None], list[tuple[int, int]]]:
    """The gradient that the optimizer is given, the metrics, and the shape (rows, T) of each forward.

    The learning rate is zero, so the policy stays as it was.
    """
    optimizer, gradients, shapes = torch.optim.SGD(policy.parameters(), lr=0.0), [], []

    def keep(*_: object) -> None:
        gradients.append({name: parameter.grad.clone() for name, parameter in policy.named_parameters()})

    optimizer.register_step_pre_hook(keep)
    hook = policy.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    metrics = policy_gradient(policy, optimizer, episodes, vocabulary, sampling, replace(SETTINGS, **changes))
    hook.remove()
    assert len(gradients) == 1
    return gradients[0], metrics, shapes


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def assert_same_gradient(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    difference = {name: gradient[name] - tensor for name, tensor in expected.items()}
    assert norm(list(difference.values())) < 1e-5 * norm(list(expected.values()))
    for name, tensor in expected.items():  # no small tensor hides behind a large one
        assert norm([difference[name]]) <= 1e-4 * norm([tensor]), name


def test_the_episodes_are_worth_testing_with():
    policy = small_policy(seed=4)
    for sampling in SAMPLINGS:
        episodes = sampled_episodes(policy, sampling)
        assert len({len(episode.response_ids) for episode in episodes}) > 5
        assert 2 <= sum(not episode.ended for episode in episodes) <= 16
        assert 0.01 < norm(list(naive_gradient(policy, episodes, sampling).values())) < 100


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_the_naive_formula(device: str, sampling: Sampling, tied: bool):
    """Temperature, top-k and top-p are part of the policy that sampled, so of what is differentiated."""
    policy = small_policy(4, device, tied)
    episodes = sampled_episodes(policy, sampling)
    gradient, metrics, _ = update(policy, episodes, sampling)
    expected = naive_gradient(policy, episodes, sampling)
    assert_same_gradient(gradient, expected)
    assert metrics["loss"] == pytest.approx(naive_loss(policy, episodes, sampling).item(), rel=1e-5, abs=1e-7)
    assert metrics["grad_norm"] == pytest.approx(norm(list(expected.values())), rel=1e-5)
    if not tied:  # ids that the tokenizer does not know get no logit, so no gradient either
        assert (gradient["untied_head"][VOCABULARY:] == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 7, 12])
def test_the_gradient_does_not_depend_on_the_micro_batches(device: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """A mean over a micro-batch's own tokens, or over micro-batches, would weigh short answers otherwise."""
    monkeypatch.setattr(grpo, "PADDING", 1.0)  # so that they are full
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in episodes if e.advantage)
    gradient, _, shapes = update(policy, episodes, tokens_per_microbatch=rows * longest)
    assert shapes[0] == (rows, longest) and sum(rows for rows, _ in shapes) == 12
    assert all(batch * length <= rows * longest for batch, length in shapes)
    assert_same_gradient(gradient, naive_gradient(policy, episodes, UNCUT))


def test_rows_without_advantage_are_not_run_and_still_count(device: str):
    """They add nothing to the gradient but their tokens are part of the mean; left out of that too, the
    step would grow with every group that is solved. An advantage too small to matter forces the model to
    run them.
    """
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    forced = [replace(e, advantage=e.advantage or 1e-30) for e in episodes]
    skipping, _, few = update(policy, episodes)
    running, _, all_rows = update(policy, forced)
    assert (sum(rows for rows, _ in few), sum(rows for rows, _ in all_rows)) == (12, 18)
    assert_same_gradient(skipping, running)
    alone, _, _ = update(policy, [episode for episode in episodes if episode.advantage])
    tokens = [len(e.response_ids) for e in episodes]
    share = sum(n for n, e in zip(tokens, episodes, strict=True) if e.advantage) / sum(tokens)
    assert_same_gradient({name: share * tensor for name, tensor in alone.items()}, skipping)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 10**9])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_what_is_recomputed_changes_nothing(device: str, checkpointing: bool, chunk: int, sampling: Sampling,
                                            monkeypatch: pytest.MonkeyPatch):
    """Activation checkpointing and the chunks of the head save memory; a lost or doubled chunk shows here."""
    monkeypatch.setattr(grpo, "CHUNK_TOKENS", chunk)
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, sampling)
    policy.checkpoint_layers = checkpointing
    gradient, _, _ = update(policy, episodes, sampling, tokens_per_microbatch=40,
                            activation_checkpointing=checkpointing)
    assert_same_gradient(gradient, naive_gradient(policy, episodes, sampling))


def test_the_gradient_of_a_bf16_policy_points_the_same_way(device: str):
    """On CUDA its logits have a backward of their own: torch has none for fp32 sums of a bf16 product."""
    policy = small_policy(4, device, tied=False)
    episodes = sampled_episodes(policy, UNCUT)
    expected, _, _ = update(policy, episodes)
    gradient, _, _ = update(policy.bfloat16(), episodes)
    for name, tensor in expected.items():
        cosine = torch.cosine_similarity(gradient[name].float().flatten(), tensor.flatten(), dim=0)
        assert cosine > 0.99, name
        assert norm([gradient[name]]) == pytest.approx(norm([tensor]), rel=0.05), name


class LogitsSeen(TorchDispatchMode):
    """Notes the most rows of any tensor that is as wide as the vocabulary, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: object, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_logits_of_all_tokens_never_exist_at_once(sampling: Sampling, monkeypatch: pytest.MonkeyPatch):
    """At 8,192 tokens and 151,936 ids they would be 5 GB, several times over."""
    monkeypatch.setattr(grpo, "PADDING", 1.0)  # one micro-batch
    policy = small_policy(4)  # its head, transposed, is 32 rows as wide as the vocabulary
    episodes = sampled_episodes(policy, sampling)
    assert sum(len(e.response_ids) for e in episodes if e.advantage) > 64
    seen = {}
    for chunk in (32, 10**9):
        monkeypatch.setattr(grpo, "CHUNK_TOKENS", chunk)
        with LogitsSeen() as mode:
            update(policy, episodes, sampling)
        seen[chunk] = mode.rows
    assert seen[32] == 32 and seen[10**9] > 64  # the second shows that the counting counts


def test_the_gradient_worked_out_by_hand(device: str):
    """A policy whose layers add nothing and whose head is zero: every token of four has probability 1/4.

    The hidden state after token t is its embedding e_t, already of root mean square 1. Answer A (advantage
    1) is 1, 2; answer B (advantage -1) is 3; both follow token 0. The loss is -(-ln 4 - ln 4 + ln 4) / 3.
    The gradient of row v of the head is the sum of -advantage / 3 * ([v is the target] - 1/4) * (hidden
    state before it):

        row 0: +e_1 / 12    row 1: -e_0 / 3 + e_1 / 12    row 2: -e_1 / 4    row 3: +e_0 / 3 + e_1 / 12

    and as e_0 and e_1 are orthogonal, each of squared length 4, its squared norm is 11/9.
    """
    policy = small_policy(4, device, tied=False, heads=1, kv_heads=1, hidden=4, inner=4, vocabulary=4)
    e_0, e_1 = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    with torch.no_grad():
        for layer in policy.layers:
            layer.out.weight.zero_()
            layer.down.weight.zero_()
        policy.norm.weight.fill_(1.0)
        policy.untied_head.zero_()
        policy.embed.weight[0], policy.embed.weight[1] = e_0, e_1
    ln_4 = math.log(4)
    answer_a = Episode(Problem((1, 2), 3), 0, [0], [1, 2], [-ln_4, -ln_4], True, "", advantage=1.0)
    answer_b = Episode(Problem((1, 2), 3), 0, [0], [3], [-ln_4 - 0.3], True, "", advantage=-1.0)
    gradient, metrics, _ = update(policy, [answer_a, answer_b], vocabulary=4)
    by_hand = torch.stack([e_1 / 12, -e_0 / 3 + e_1 / 12, -e_1 / 4, e_0 / 3 + e_1 / 12])
    assert torch.allclose(gradient["untied_head"][:4].cpu(), by_hand, atol=1e-6)
    assert all((tensor == 0).all() for name, tensor in gradient.items() if name != "untied_head")
    assert metrics["loss"] == pytest.approx(ln_4 / 3, rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(11 / 9), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(ln_4, rel=1e-6)
    assert metrics["logprob_gap"] == pytest.approx(0.1, rel=1e-5)  # |0.3| over three tokens


def test_a_step_makes_the_better_answers_likelier(device: str):
    """The sign of it all: descending the loss must ascend advantage x logprob."""
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    before = naive_loss(policy, episodes, UNCUT).item()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    policy_gradient(policy, optimizer, episodes, VOCABULARY, UNCUT, SETTINGS)
    assert naive_loss(policy, episodes, UNCUT).item() < before - 1e-5


def test_every_response_token_counts_once_ended_or_cut_off(device: str):
    """The end token is a choice like any other; an answer cut off has none. No token is lost or assumed."""
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    assert len({episode.ended for episode in episodes}) == 2
    logprobs, entropy = response_logprobs(policy, episodes, VOCABULARY, UNCUT)
    expected = [naive_logprobs(policy, e, UNCUT)[place, token] for e in episodes
                for place, token in enumerate(e.response_ids)]
    assert logprobs.shape == entropy.shape == (sum(len(e.response_ids) for e in episodes),)
    assert torch.allclose(logprobs, torch.stack(expected), atol=1e-5)
    longer = [replace(e, response_ids=[*e.response_ids, 0], logprobs=[*e.logprobs, -1.0]) for e in episodes]
    gradient, _, _ = update(policy, longer)  # a 0 at the end is a token too, not padding
    assert_same_gradient(gradient, naive_gradient(policy, longer, UNCUT))


# ---------------------------------------------------------------------------- the menu of losses


def pushes(settings: TrainSettings, ratio: float, advantage: float) -> float:
    """The derivative of one token's objective by its logprob, when the policy's probability is `ratio` x the sampler's."""
    logprob = torch.tensor([math.log(0.4 * ratio)], requires_grad=True)
    objective(logprob, torch.tensor([math.log(0.4)]), torch.tensor([advantage]), settings).sum().backward()
    return logprob.grad.item()


@pytest.mark.parametrize(("kind", "ratio", "advantage", "expected"), [
    ("plain", 1.0, 2.0, 2.0),
    ("plain", 5.0, 2.0, 2.0),  # does not look at the sampler
    ("clipped", 1.0, 2.0, 2.0),  # the first update of a batch is the plain one
    ("clipped", 1.25, 2.0, 2.5),  # d(ratio A) = ratio A
    ("clipped", 1.3, 2.0, 0.0),  # likelier by more than clip_high: pushed no further
    ("clipped", 1.3, -2.0, -2.6),  # but pushed back
    ("clipped", 0.7, -2.0, 0.0),  # unlikelier by more than clip_low: pushed no further
    ("clipped", 0.7, 2.0, 1.4),
    ("weighted", 1.0, 2.0, 2.0),
    ("weighted", 1.5, -2.0, -3.0),
    ("weighted", 0.25, 2.0, 0.5),
    ("weighted", 7.0, 2.0, 4.0),  # the weight stops at weight_cap
])
def test_objectives_worked_out_by_hand(kind: str, ratio: float, advantage: float, expected: float):
    """clip_low 0.2, clip_high 0.28 and weight_cap 2 are the defaults."""
    assert pushes(replace(SETTINGS, objective=kind), ratio, advantage) == pytest.approx(expected, rel=1e-5)


def test_clip_higher_leaves_room_above_only():
    """DAPO: a rare token of a good answer may grow further than the symmetric bound allows."""
    even = replace(SETTINGS, objective="clipped", clip_low=0.2, clip_high=0.2)
    higher = replace(even, clip_high=0.5)
    assert (pushes(even, 1.4, 1.0), pushes(higher, 1.4, 1.0)) == (0.0, pytest.approx(1.4))
    assert pushes(even, 0.7, -1.0) == pushes(higher, 0.7, -1.0) == 0.0


def answer_of(length: int, advantage: float = 1.0, ended: bool = True, total: float = 0.0, group: int = 0) -> Episode:
    return Episode(Problem((1, 2), 3), group, [0], [1] * length, [-1.0] * length, ended, "", Reward(0.0, total), advantage)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"divide_loss_by": "tokens"}, [1 / 18, 1 / 18, 1 / 18]),
    ({"divide_loss_by": "answers"}, [1 / 6, 1 / 12, 1 / 36]),
    ({"divide_loss_by": "limit"}, [1 / 36, 1 / 36, 1 / 36]),
    ({"divide_loss_by": "tokens", "truncated": "mask"}, [1 / 6, 1 / 6, 0]),
    ({"divide_loss_by": "answers", "truncated": "mask"}, [1 / 4, 1 / 8, 0]),
    ({"divide_loss_by": "limit", "truncated": "mask"}, [1 / 24, 1 / 24, 0]),
])
def test_token_weights_worked_out_by_hand(changes: dict, expected: list[float]):
    """Answers of 2, 4 and 12 tokens, the last one cut off at the limit of 12."""
    episodes = [answer_of(2), answer_of(4), answer_of(12, ended=False)]
    assign_token_weights(episodes, replace(SETTINGS, **changes), LIMIT)
    assert [episode.token_weight for episode in episodes] == pytest.approx(expected)


def test_a_batch_of_masked_answers_teaches_nothing_and_divides_by_nothing(device: str):
    """Where every answer is filtered, one of our peers divides by zero."""
    policy = small_policy(4, device)
    settings = replace(SETTINGS, truncated="mask")
    before = weights(policy)
    metrics = policy_gradient(policy, torch.optim.SGD(policy.parameters(), lr=1.0),
                              [answer_of(12, ended=False, advantage=a) for a in (1.0, -1.0)], VOCABULARY, UNCUT, settings)
    assert (metrics["loss"], metrics["grad_norm"], metrics["entropy"]) == (0.0, 0.0, None)
    assert torch.equal(weights(policy), before)


def test_long_answers_are_penalized_softly():
    """Limit 12, over the last 4 tokens: 8 tokens cost nothing, 9 a quarter, 12 all. Rewards of 1 each, one group."""
    episodes = [answer_of(length, total=1.0) for length in (8, 9, 10, 12)]
    settings = replace(SETTINGS, truncated="penalize", penalty_tokens=4, divide_by_std=False)
    assert assign_advantages(episodes, settings, LIMIT) == 0
    shaped = np.array([1.0, 0.75, 0.5, 0.0])
    assert [episode.advantage for episode in episodes] == pytest.approx((shaped - shaped.mean()).tolist())
    assert all(episode.reward.total == 1.0 for episode in episodes)  # what is reported stays the task's own reward
    assert assign_advantages(episodes, replace(settings, truncated="keep"), LIMIT) == 1


@pytest.mark.parametrize("changes", [
    {"objective": "clipped"}, {"objective": "weighted"}, {"divide_loss_by": "answers"}, {"divide_loss_by": "limit"},
    {"truncated": "mask"},
], ids=str)
def test_every_loss_gives_one_gradient_whatever_the_micro_batches(device: str, changes: dict):
    """Against each answer alone, added up: the sampler's logprobs are moved, so that ratios are far from 1."""
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    random = np.random.default_rng(0)
    episodes = [replace(e, logprobs=[x + random.normal(0, 0.4) for x in e.logprobs]) for e in episodes]
    settings = replace(SETTINGS, **changes)
    gradient, metrics, _ = update(policy, episodes, tokens_per_microbatch=40, **changes)
    total = torch.zeros((), device=device)
    for episode in episodes:  # token_weight was set by the update above
        chosen = naive_logprobs(policy, episode, UNCUT)[range(len(episode.response_ids)), episode.response_ids]
        sampled = torch.tensor(episode.logprobs, device=device)
        advantage = torch.full_like(sampled, episode.advantage)
        total = total - episode.token_weight * objective(chosen, sampled, advantage, settings).sum()
    total.backward()
    assert_same_gradient(gradient, {name: parameter.grad for name, parameter in policy.named_parameters()})
    assert 0.05 < metrics["clip_fraction"] < 0.95
    policy.zero_grad()


def test_several_updates_on_one_batch_stop_at_the_clipping_bound(device: str):
    """Plain, twenty steps on the same answers run away; clipped, they stop where the ratios leave the bounds."""
    moved = {}
    for kind in ("plain", "clipped"):
        policy = small_policy(4, device)
        episodes = sampled_episodes(policy, UNCUT)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
        settings = replace(SETTINGS, objective=kind)
        for _ in range(20):
            metrics = policy_gradient(policy, optimizer, episodes, VOCABULARY, UNCUT, settings)
        moved[kind] = metrics["logprob_gap"]
    assert moved["clipped"] < 0.5 * moved["plain"]


# ---------------------------------------------------------------------------- what is measured on the way


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampler_and_trainer_agree_right_after_sampling(device: str, sampling: Sampling):
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, sampling)
    _, metrics, _ = update(policy, episodes, sampling)
    assert metrics["logprob_gap"] < 1e-5
    shifted = [replace(e, logprobs=[logprob - 0.25 for logprob in e.logprobs]) for e in episodes]
    _, metrics, _ = update(policy, shifted, sampling)
    assert metrics["logprob_gap"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_entropy_is_that_of_the_distribution_sampled_from(device: str, sampling: Sampling):
    """Per token that is run, in nats; a token that is cut has probability 0 and adds 0, not nan."""
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, sampling)
    entropies = []
    for episode in [episode for episode in episodes if episode.advantage]:
        probabilities = naive_logprobs(policy, episode, sampling).detach().double().exp().cpu().numpy()
        entropies += [-sum(p * math.log(p) for p in row if p > 0) for row in probabilities]
    _, metrics, _ = update(policy, episodes, sampling, tokens_per_microbatch=50)
    assert metrics["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)


# ---------------------------------------------------------------------------- the step


def weights(policy: Qwen2) -> Tensor:
    """A copy of all of them, in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("bound", [0.01, 0.5])
def test_a_long_gradient_is_scaled_to_the_bound(device: str, bound: float):
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    whole, unclipped, _ = update(policy, episodes)
    length = norm(list(whole.values()))
    assert length > 0.5
    clipped, metrics, _ = update(policy, episodes, max_grad_norm=bound)
    assert norm(list(clipped.values())) == pytest.approx(bound, rel=1e-4)
    assert metrics["grad_norm"] == unclipped["grad_norm"] == pytest.approx(length, rel=1e-5)  # of the whole
    assert_same_gradient({name: tensor * length / bound for name, tensor in clipped.items()}, whole)
    untouched, _, _ = update(policy, episodes, max_grad_norm=2 * length)
    assert_same_gradient(untouched, whole)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(device: str, poison: float):
    """One nan in AdamW's moments would stay there for good. The step is counted, the next one is clean."""
    policy = small_policy(4, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    episodes = sampled_episodes(policy, UNCUT)
    poisoned = [*episodes[:-1], replace(episodes[-1], advantage=poison)]
    before = weights(policy)
    metrics = policy_gradient(policy, optimizer, poisoned, VOCABULARY, UNCUT, SETTINGS)
    assert not math.isfinite(metrics["grad_norm"])
    assert torch.equal(weights(policy), before)
    assert not optimizer.state and all(parameter.grad is None for parameter in policy.parameters())
    metrics = policy_gradient(policy, optimizer, episodes, VOCABULARY, UNCUT, SETTINGS)
    assert math.isfinite(metrics["grad_norm"])
    assert torch.isfinite(weights(policy)).all() and not torch.equal(weights(policy), before)


def test_a_batch_that_teaches_nothing_moves_nothing(device: str):
    """AdamW moves on its momentum even without a gradient; here there is no step at all."""
    policy = small_policy(4, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    episodes = sampled_episodes(policy, UNCUT)
    policy_gradient(policy, optimizer, episodes, VOCABULARY, UNCUT, SETTINGS)
    before = weights(policy)
    flat = [replace(episode, advantage=0.0) for episode in episodes]
    metrics = policy_gradient(policy, optimizer, flat, VOCABULARY, UNCUT, SETTINGS)
    assert torch.equal(weights(policy), before)
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    assert metrics["entropy"] is None and metrics["logprob_gap"] is None


def test_the_tokens_run_are_counted(device: str):
    counts = []
    policy = small_policy(4, device)
    episodes = sampled_episodes(policy, UNCUT)
    policy_gradient(policy, torch.optim.SGD(policy.parameters(), lr=0.0), episodes, VOCABULARY, UNCUT,
                    replace(SETTINGS, tokens_per_microbatch=50), counts.append)
    assert sum(counts) == sum(len(e.prompt_ids) + len(e.response_ids) for e in episodes if e.advantage)
    assert len(counts) > 2


# ---------------------------------------------------------------------------- float64


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_the_derivative_is_that_of_finite_differences(sampling: Sampling, monkeypatch: pytest.MonkeyPatch):
    """gradcheck of the chunked logprobs through the whole policy, in float64.

    The modules narrow to fp32 with `.float()`; here that keeps float64, and nothing else is replaced.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(grpo, "CHUNK_TOKENS", 2)
    policy = small_policy(5, tied=False, heads=1, kv_heads=1, hidden=4, inner=3, vocabulary=7, layers=1)
    policy.double()
    answers = [Answer(0, [5, 0, 3], [], True), Answer(1, [6, 6], [], False)]
    episodes = as_episodes(answers, [[1, 4], [2]])

    def logprobs(*parameters: Tensor) -> Tensor:  # gradcheck nudges them in place, so the policy sees it
        return response_logprobs(policy, episodes, 7, sampling)[0]

    assert logprobs().dtype == torch.float64
    assert torch.autograd.gradcheck(logprobs, tuple(policy.parameters()), eps=1e-6, atol=1e-6, rtol=1e-4)
