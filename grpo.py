"""Group relative policy optimization: from rewards to one step of the policy's weights.

DeepSeekMath (arXiv 2402.03300, section 4.1) without the value model, and here without the reference model too: the
baseline of an answer is what the other answers to the same question earned.

    assign_advantages      reward -> how much better than its group, section 4.1.2
    assign_token_weights   what each token of an answer counts in the loss
    objective              what is ascended: the menu of surrogates
    accumulate_gradient    micro-batches, loss, backward
    apply_gradient         gradient norm, optimizer step

Two things keep the update cheap and its gradient exact. Rows of similar length share a micro-batch, so little of it is
padding, and rows that add nothing to the gradient (advantage zero, or masked) are not run at all. And a token's weight
is a matter of the whole batch, those rows included, so the gradient does not depend on how the batch was cut.

Where the papers differ there is a setting under `train`, and the default is what DeepSeekMath does with one update a
batch, unless the embedded demo measured another choice better (LOG.md has the table):

    objective          plain, clipped (PPO, arXiv 1707.06347, eq. 7; DAPO, arXiv 2503.14476, moves the upper bound),
                       weighted (truncated importance weights as in V-trace, arXiv 1802.01561)
    divide_by_std      false: Dr. GRPO, arXiv 2503.20783
    divide_loss_by     tokens (DAPO eq. 8), answers (DeepSeekMath eq. 3), limit (Dr. GRPO)
    truncated          keep, mask, penalize: answers that were cut off (DAPO section 3.4)
    updates_per_batch  DeepSeekMath's algorithm 1, line 10

Left out: the KL term and its reference model (no measurable use for a verifiable reward, and a second model to hold).
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
    advantage, flat = torch.zeros_like(rewards), 0
    for group in groups.unique():
        rows = groups == group
        peers = rewards[rows]
        if peers.min() == peers.max():  # compared as they are: a deviation would leave rounding errors to divide by
            flat += 1
            continue
        centred = peers - peers.mean()
        advantage[rows] = centred / centred.square().mean().sqrt() if divide_by_std else centred
    return advantage, flat


def assign_advantages(episodes: Sequence[Episode], settings: TrainSettings, length_limit: int) -> int:
    """Give each rewarded episode its advantage; returns how many groups had no spread."""
    totals = [e.reward.total + length_penalty(len(e.response_ids), settings, length_limit) for e in episodes]
    groups = torch.tensor([episode.group for episode in episodes])
    values, zero_spread = advantages(torch.tensor(totals, dtype=torch.float64), groups, settings.divide_by_std)
    for episode, value in zip(episodes, values.tolist(), strict=True):
        episode.advantage = value
    return zero_spread


def length_penalty(length: int, settings: TrainSettings, length_limit: int) -> float:
    """With train.truncated penalize, from 0 down to -1 over the last tokens before the limit (DAPO eq. 13)."""
    if settings.truncated != "penalize":
        return 0.0
    return -max(0.0, 1.0 - (length_limit - length) / settings.penalty_tokens)


def assign_token_weights(episodes: Sequence[Episode], settings: TrainSettings, length_limit: int) -> None:
    """Give each episode what one of its response tokens counts in the loss of this batch.

    tokens: all tokens count alike; answers: all answers do; limit: divided by what does not depend on the lengths,
    so that a long wrong answer is not let off lightly. A masked answer counts as if it were not there.
    """
    counted = [episode for episode in episodes if episode.ended or settings.truncated != "mask"]
    tokens = sum(len(episode.response_ids) for episode in counted)
    for episode in episodes:
        episode.token_weight = 0.0
    for episode in counted:
        divisors = {"tokens": tokens, "answers": len(counted) * len(episode.response_ids),
                    "limit": len(counted) * length_limit}
        episode.token_weight = 1.0 / divisors[settings.divide_loss_by]


def objective(logprobs: Tensor, sampled: Tensor, advantage: Tensor, settings: TrainSettings) -> Tensor:
    """What each response token adds to the objective; all are (tokens,), `sampled` are the sampler's logprobs.

    plain      advantage * logprob: the policy gradient of answers that this very policy sampled
    clipped    min(r A, clip(r) A), r = policy / sampler: no token is pushed further once it is far from its sampler
    weighted   the plain gradient times min(r, cap): corrects for an older or differently rounded sampler
    """
    if settings.objective == "plain":
        return advantage * logprobs
    ratio = (logprobs - sampled).exp()
    if settings.objective == "weighted":
        return ratio.detach().clamp(max=settings.weight_cap) * advantage * logprobs
    near = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return torch.minimum(ratio * advantage, near * advantage)


PADDING = 0.05  # the most of a micro-batch that may be padding


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers, cut into micro-batches of at most `budget` tokens, of which at most 5 % is padding.

    Longest first, so that running out of memory shows in the first micro-batch. A row longer than the budget
    stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    real = 0  # tokens of the last micro-batch that are no padding
    for row in order:
        area = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if batches and area <= budget and real + lengths[row] >= (1 - PADDING) * area:
            batches[-1].append(row)
            real += lengths[row]
        else:
            batches.append([row])
            real = lengths[row]
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


def accumulate_gradient(policy: Qwen2, episodes: Sequence[Episode], vocabulary: int, sampling: Sampling,
                        settings: TrainSettings, tokens_per_microbatch: int,
                        on_tokens: Callable[[int], object] = lambda count: None) -> dict[str, float | None]:
    """Leave in the parameters' .grad the gradient of -sum(token weight * objective) over the whole batch.

    Returns, over the rows that were run: loss, entropy, logprob_gap (mean |trainer - sampler|), and clip_fraction (of
    tokens whose ratio to the sampler is outside the clipping bounds); None where no row was run.
    """
    policy.zero_grad(set_to_none=True)
    telling = [episode for episode in episodes if episode.advantage * episode.token_weight != 0.0]
    lengths = [len(e.prompt_ids) + len(e.response_ids) for e in telling]
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in micro_batches(lengths, tokens_per_microbatch):
        batch = [telling[row] for row in rows]
        logprobs, entropy = response_logprobs(policy, batch, vocabulary, sampling)
        counts = torch.tensor([len(e.response_ids) for e in batch])
        per_answer = torch.tensor([(e.advantage, e.token_weight) for e in batch], dtype=torch.float32)
        advantage, weight = per_answer.repeat_interleave(counts, dim=0).to(logprobs.device).unbind(dim=1)
        sampled = torch.tensor([logprob for e in batch for logprob in e.logprobs], dtype=torch.float32)
        sampled = sampled.to(logprobs.device)
        loss = -(weight * objective(logprobs, sampled, advantage, settings)).sum()
        loss.backward()
        moved = logprobs.detach() - sampled
        outside = (moved.exp() > 1 + settings.clip_high) | (moved.exp() < 1 - settings.clip_low)
        sums += torch.stack([loss.detach(), entropy.sum(), moved.abs().sum(), outside.sum()]).cpu().double()
        on_tokens(sum(lengths[row] for row in rows))
    tokens = sum(len(e.response_ids) for e in telling)
    loss_sum, *others = sums.tolist()
    means = [value / tokens if telling else None for value in others]
    return {"loss": loss_sum, **dict(zip(("entropy", "logprob_gap", "clip_fraction"), means, strict=True))}


def apply_gradient(policy: Qwen2, optimizer: torch.optim.Optimizer, max_norm: float, healthy: bool = True) -> float:
    """One step along the gradient, scaled down to `max_norm`; returns its norm before.

    A gradient that is not finite or not `healthy` moves nothing, nor does a batch that taught nothing: momentum alone
    takes no step.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm).item()
    if healthy and norm > 0 and math.isfinite(norm):
        optimizer.step()
    policy.zero_grad(set_to_none=True)
    return norm
