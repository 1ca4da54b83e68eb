"""Group relative policy optimization: from the rewards of a batch to the gradient of the policy.

The paper is DeepSeekMath (arXiv 2402.03300), section 4.1. How this departs from it:

1. No reference model and no KL term: the reward is verifiable, so there is no reward model to be hacked, and a second
   copy of the weights would fill the card.
2. One optimizer step per batch by default. Then ratio = 1, the clip never acts, and the gradient of `reinforce` below
   is that of eq. 3. With several (train.updates_per_batch, algorithm 1 line 10) choose `clipped`.
3. The loss is divided by the length limit, not by each response's own length (train.divide_loss_by): Dr. GRPO
   (arXiv 2503.20783) shows that the latter penalizes long wrong responses too little.
4. Groups whose rewards are all equal have zero advantage. Their rows get no forward pass, but they count in the
   denominator of the loss (unless dynamic sampling replaces them: rollout.max_draws).

The other choices on which the papers differ are settings too, a line or two each:

    objective          reinforce; clipped: PPO (arXiv 1707.06347) eq. 7, clip-higher as in DAPO (arXiv 2503.14476);
                       truncated_is: truncated importance sampling, as in V-trace (arXiv 1802.01561)
    divide_by_std      false: Dr. GRPO
    divide_loss_by     tokens: DAPO eq. 8; responses: DeepSeekMath eq. 3; limit: Dr. GRPO
    truncated          keep, mask or penalize truncated responses: DAPO section 3.4

A truncated response never earns the format reward, but a right answer in it counts (countdown_task.py). `keep` leaves
it at that, `mask` takes it out of the loss, `penalize` lowers the reward of every response that ends near the limit.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_types import Config, Episode, Sampling, TrainSettings
from optimizer import AdamW
from qwen2_model import Qwen2
from ranks import add_up, as_many_on_each, count, rank, whole_norm
from rollout import warp
from terminal import progress_bar

CHUNK_TOKENS = 512  # response tokens whose full-vocabulary logits exist at the same time
MAX_PADDING = 0.05  # share of a micro-batch that may be padding


def assign_advantages(episodes: list[Episode], config: Config) -> int:
    """Give each episode its advantage; returns the number of zero-variance groups. Section 4.1.2, outcome supervision.

    The episodes of a group are adjacent, `rollout.group_size` of them. In float64, with the population's standard
    deviation. Rewards [1.1, 0.1, 0.1, 0.0] give advantages [1.72, -0.50, -0.50, -0.72].
    """
    scores = [episode.reward + length_penalty(episode, config) for episode in episodes]
    rewards = torch.tensor(scores, dtype=torch.float64).view(-1, config.rollout.group_size)  # (Q, G)
    mean = rewards.mean(dim=1, keepdim=True)  # (Q, 1)
    std = rewards.std(dim=1, keepdim=True, correction=0)  # (Q, 1)
    advantage = (rewards - mean) / std if config.train.divide_by_std else rewards - mean  # (Q, G)
    zero_variance = rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-9  # std would be a rounding error
    advantage[zero_variance] = 0.0
    for episode, value in zip(episodes, advantage.flatten().tolist(), strict=True):
        episode.advantage = value
    return int(zero_variance.sum())


def length_penalty(episode: Episode, config: Config) -> float:
    """With train.truncated=penalize: from 0 to -1 over the last `penalty_tokens` before the limit (DAPO eq. 13)."""
    if config.train.truncated != "penalize":
        return 0.0
    tokens_left = config.rollout.max_new_tokens - len(episode.response_ids)
    return -max(0.0, 1.0 - tokens_left / config.train.penalty_tokens)


def assign_token_weights(episodes: list[Episode], config: Config) -> None:
    """Give each episode the weight of each of its response tokens in the loss of this batch.

    tokens: every token weighs the same; responses: every response does; limit: 1 / (responses * max_new_tokens),
    which does not depend on any length. A masked response counts as if it were not there.
    """
    counted = [episode for episode in episodes if not (episode.truncated and config.train.truncated == "mask")]
    tokens = sum(len(episode.response_ids) for episode in counted)
    for episode in episodes:
        episode.token_weight = 0.0
    divide_by = config.train.divide_loss_by
    for episode in counted:
        length = config.rollout.max_new_tokens if divide_by == "limit" else len(episode.response_ids)
        episode.token_weight = 1.0 / (tokens if divide_by == "tokens" else len(counted) * length)


def objective(logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, settings: TrainSettings) -> Tensor:
    """The objective of each response token, to be maximized; all are (N,).

    `old_logprobs` are the sampler's, so `ratio` is the policy's probability of a token over the sampler's.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    if settings.objective == "reinforce":
        return advantage * logprobs
    if settings.objective == "truncated_is":
        return ratio.detach().clamp(max=settings.ratio_cap) * advantage * logprobs
    clipped_ratio = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return torch.minimum(ratio * advantage, clipped_ratio * advantage)


def accumulate_gradient(
    policy: Qwen2, episodes: list[Episode], sampling: Sampling, settings: TrainSettings, tokens_per_microbatch: int
) -> dict[str, float]:
    """Leave the gradient of the batch's loss in the parameters' .grad: eq. 3, with the sign flipped.

    Returns the loss and, as means over the tokens of the active rows (of the first row where none is active): entropy,
    approx_kl, logprob_gap (mean |log ratio|: sampler against trainer) and clip_fraction (ratios outside the clip).
    """
    policy.zero_grad(set_to_none=True)
    active = [episode for episode in episodes if episode.active] or episodes[:1]
    mine = sorted(active, key=lambda episode: -episode.length)[rank() :: count()]  # long and short ones for each rank
    sums = torch.zeros(5, dtype=torch.float64)
    microbatches = micro_batches([episode.length for episode in mine], tokens_per_microbatch)
    batches = as_many_on_each(policy, [[mine[row] for row in rows] for rows in microbatches], active[-1])
    with progress_bar("updating", " rows", len(mine)) as bar:
        for number, batch in enumerate(batches):
            rows = [(e.advantage, e.token_weight, logprob) for e in batch for logprob in e.old_logprobs]
            columns = torch.tensor(rows, dtype=torch.float32, device=policy.head.device)  # (N, 3)
            advantage, token_weight, old_logprobs = columns.unbind(dim=1)  # (N,) each
            logprobs, entropy = response_logprobs(policy, batch, sampling)  # (N,) each
            loss = -(token_weight * objective(logprobs, old_logprobs, advantage, settings)).sum()
            loss.backward()
            if number >= len(microbatches):
                continue  # a filler
            with torch.no_grad():
                log_ratio = logprobs - old_logprobs
                ratio = log_ratio.exp()
                approx_kl = ratio - 1 - log_ratio  # http://joschu.net/blog/kl-approx.html, k3
                outside = (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)
                statistics = [loss.detach(), entropy.sum(), approx_kl.sum(), log_ratio.abs().sum(), outside.sum()]
            sums += torch.stack(statistics).cpu().double()  # the CPU waits here, not in between
            bar.update(len(batch))
    add_up(policy.parameters(), sums)
    tokens = sum(len(episode.response_ids) for episode in active)
    loss_sum, *others = sums.tolist()
    means = [value / tokens for value in others]
    return {"loss": loss_sum, **dict(zip(("entropy", "approx_kl", "logprob_gap", "clip_fraction"), means, strict=True))}


def apply_gradient(policy: Qwen2, optimizer: AdamW, max_norm: float) -> float:
    """One optimizer step along the gradient, scaled down to `max_norm`; returns the gradient's norm before.

    A gradient that is zero or not finite skips the optimizer step, so momentum alone never moves the weights.
    """
    norm = whole_norm(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm))
    if norm > 0 and math.isfinite(norm):
        optimizer.step()
    policy.zero_grad(set_to_none=True)
    return norm


# ---- Micro-batches and logprobs --------------------------------------------------------------------------------


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Row indices, split into micro-batches of at most `budget` tokens, of which at most 5 % is padding.

    Longest first, so that running out of memory shows in the first micro-batch. A row longer than the budget gets
    one of its own. A token's weight does not depend on how the batch is cut, so neither does the gradient.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    real = 0  # tokens of the last micro-batch that are not padding
    for row in order:
        area = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if batches and area <= budget and real + lengths[row] >= (1 - MAX_PADDING) * area:
            batches[-1].append(row)
            real += lengths[row]
        else:
            batches.append([row])
            real = lengths[row]
    return batches


def response_logprobs(policy: Qwen2, episodes: list[Episode], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logprob and entropy (without gradient) of every response token of these episodes, one after the other: (N,) each.

    Under the distribution that `sampling` draws from. Only the positions that predict a response token reach the head,
    in chunks whose logits backward computes again, so (N, V) never exists at once.
    """
    device = policy.head.device
    rows = [episode.prompt_ids + episode.response_ids for episode in episodes]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (B, T)
    # the token at t is predicted by the hidden state at t - 1; indices made on the CPU: a mask would synchronize
    places = [b * width + t - 1 for b, e in enumerate(episodes) for t in range(len(e.prompt_ids), len(rows[b]))]
    predicting = torch.tensor(places, device=device)  # (N,)
    targets = torch.tensor([token for episode in episodes for token in episode.response_ids], device=device)  # (N,)
    hidden = policy(tokens).flatten(0, 1).index_select(0, predicting)  # (N, hidden)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        distribution = warp(policy.logits(hidden), sampling, keep=targets).log_softmax(dim=-1)  # (C, V)
        logprobs = distribution.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():  # last, so that backward's second run of this function ends before it
            entropy = torch.special.entr(distribution.exp()).sum(dim=-1)
        return logprobs, entropy

    logprobs, entropies = [], []
    for some_hidden, some_targets in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        logprob, entropy = checkpoint(chunk, some_hidden, some_targets, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies)
