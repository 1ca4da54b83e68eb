"""Group relative policy optimization: from rewards to one step of the policy's weights.

DeepSeekMath (arXiv 2402.03300, section 4.1) without the value model, and here without the reference model too: the
baseline of an answer is what the other answers to the same question earned.

    advantages        reward -> how much better than its group, eq. in section 4.1.2
    policy_gradient   one update: micro-batches, loss, gradient norm, optimizer step

Two things keep the update cheap and its gradient exact. Rows of similar length share a micro-batch, so little of it is
padding, and rows whose advantage is zero are not run at all: they add nothing to the gradient. And the loss is
divided by the response tokens of the whole batch, those rows' included, so the gradient does not depend on how the
batch was cut.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_types import Episode, TrainSettings
from qwen2_model import Qwen2, head_logits
from rollout import Sampling, warp

CHUNK_TOKENS = 512  # tokens whose full-vocabulary logits exist at the same time


def advantages(rewards: Tensor, groups: Tensor, divide_by_std: bool = True) -> tuple[Tensor, int]:
    """Advantage (n,) of each answer from rewards (n,) and integer group ids (n,), and the number of flat groups.

    (reward - group mean) / group standard deviation (population), in float64. A group whose rewards are all equal
    teaches nothing: its advantages are exactly zero. divide_by_std=False is Dr. GRPO (arXiv 2503.20783).
    """
    rewards = rewards.double()
    count = int(groups.max()) + 1
    size = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, torch.ones_like(rewards))
    mean = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, rewards) / size
    centred = rewards - mean[groups]
    variance = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, centred**2) / size
    lowest = torch.full((count,), torch.inf, dtype=torch.float64).scatter_reduce_(0, groups, rewards, "amin")
    highest = torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, groups, rewards, "amax")
    flat = lowest == highest  # compared as they are: a variance would leave rounding errors to divide by
    scale = variance.sqrt() if divide_by_std else torch.ones_like(variance)
    advantage = torch.where(flat[groups], 0.0, centred / scale.masked_fill(flat, 1.0)[groups])
    return advantage, int((flat & (size > 0)).sum())


def assign_advantages(episodes: Sequence[Episode], divide_by_std: bool) -> int:
    """Give each rewarded episode its advantage; returns how many groups had no spread."""
    rewards = torch.tensor([episode.reward.total for episode in episodes], dtype=torch.float64)
    groups = torch.tensor([episode.group for episode in episodes])
    values, zero_spread = advantages(rewards, groups, divide_by_std)
    for episode, value in zip(episodes, values.tolist(), strict=True):
        episode.advantage = value
    return zero_spread


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers, cut into micro-batches of at most `budget` tokens, padding included.

    Longest first, so that running out of memory shows in the first micro-batch. A row longer than the budget
    stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def response_logprobs(model: Qwen2, episodes: Sequence[Episode], vocabulary: int,
                      sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logprob and entropy (no gradient) of every response token of `episodes`, one after the other: two (tokens,).

    Under the distribution that `sampling` draws from. Only response positions reach the head, and their logits are
    made in chunks that backward makes again, so (tokens x vocabulary) never exists at once.
    """
    device = model.embed.weight.device
    rows = [episode.prompt_ids + episode.response_ids for episode in episodes]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    starts = torch.tensor([len(e.prompt_ids) for e in episodes])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(1, tokens.shape[1])[None]
    response = (places >= starts) & (places < ends)  # (B, T-1): position t is predicted by the hidden state at t-1
    targets = tokens[:, 1:][response].to(device)
    hidden = model(tokens.to(device))[:, :-1][response.to(device)]  # (response tokens, hidden)
    head = model.head[:vocabulary]

    def chunk(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = warp(head_logits(hidden, head), sampling, keep=targets).log_softmax(dim=-1)
        with torch.no_grad():
            entropy = torch.special.entr(logprobs.exp()).sum(dim=-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    parts = [
        checkpoint(chunk, hidden[i : i + CHUNK_TOKENS], head, targets[i : i + CHUNK_TOKENS], use_reentrant=False,
                   preserve_rng_state=False)
        for i in range(0, len(targets), CHUNK_TOKENS)
    ]
    return torch.cat([logprob for logprob, _ in parts]), torch.cat([entropy for _, entropy in parts])


def policy_gradient(policy: Qwen2, optimizer: torch.optim.Optimizer, episodes: Sequence[Episode], vocabulary: int,
                    sampling: Sampling, settings: TrainSettings,
                    on_tokens: Callable[[int], object] = lambda count: None) -> dict[str, float | None]:
    """One policy-gradient step: ascend sum(advantage * logprob) / response tokens of the whole batch.

    Returns loss, grad_norm, entropy and logprob_gap (mean |trainer - sampler|) over the rows with an advantage, None
    where there was none, and skipped: 1 when the gradient was not finite and the weights were left alone.
    """
    total = sum(len(episode.response_ids) for episode in episodes)
    telling = [episode for episode in episodes if episode.advantage != 0.0]
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in telling]
    loss_sum, entropy_sum, gap_sum, seen = 0.0, 0.0, 0.0, 0
    for rows in micro_batches(lengths, settings.tokens_per_microbatch):
        batch = [telling[row] for row in rows]
        logprobs, entropy = response_logprobs(policy, batch, vocabulary, sampling)
        counts = torch.tensor([len(e.response_ids) for e in batch])
        advantage = torch.tensor([e.advantage for e in batch], dtype=torch.float32).repeat_interleave(counts)
        sampled = torch.tensor([logprob for e in batch for logprob in e.logprobs], dtype=torch.float32)
        loss = -(advantage.to(logprobs.device) * logprobs).sum() / total
        loss.backward()
        loss_sum += loss.item()
        entropy_sum += entropy.sum().item()
        gap_sum += (logprobs.detach().cpu() - sampled).abs().sum().item()
        seen += len(sampled)
        on_tokens(sum(lengths[row] for row in rows))
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm).item() if telling else 0.0
    finite = math.isfinite(grad_norm)
    if telling and finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "loss": loss_sum,
        "grad_norm": grad_norm,
        "entropy": entropy_sum / seen if seen else None,
        "logprob_gap": gap_sum / seen if seen else None,
        "skipped": int(not finite),
    }
