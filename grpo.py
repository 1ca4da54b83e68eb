"""Group relative policy optimization: from the rewards of a batch to the gradient of the policy.

The paper is DeepSeekMath (arXiv 2402.03300), section 4.1. How this departs from it:

1. No reference model and no KL term: the reward is verifiable, so there is no reward model to be hacked, and a
   second copy of the weights would not fit on the GPU.
2. One optimizer step per batch by default. Then ratio = 1, the clip never acts, and the gradient of `reinforce`
   below is that of eq. 3. With several (train.updates_per_batch, algorithm 1 line 10) choose `clipped`.
3. The loss is divided by the length limit, not by each response's own length (train.divide_loss_by): Dr. GRPO
   (arXiv 2503.20783) shows that the latter penalizes long wrong responses too little.
4. Groups whose rewards are all equal have zero advantage. Their rows get no forward pass, but they count in the
   denominator of the loss (unless dynamic sampling replaces them: rollout.max_draws).

The other choices on which the papers differ are settings too, a line or two each:

    objective          reinforce; clipped: PPO (arXiv 1707.06347) eq. 7, clip-higher as in DAPO (arXiv 2503.14476);
                       truncated_is: truncated importance sampling, as in V-trace (arXiv 1802.01561)
    divide_by_std      false: Dr. GRPO
    divide_loss_by     tokens: DAPO eq. 8; responses: DeepSeekMath eq. 3; limit: Dr. GRPO
    truncated          mask: truncated responses leave the loss (DAPO section 3.4); keep: they stay, without the
                       format reward
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_types import CHUNK_TOKENS, Config, Episode, TrainSettings
from optimizer import AdamW
from plumbing.ranks import all_reduce_gradients, pad_with_empty_batches, rank, unsharded, world_size
from plumbing.terminal import progress_bar
from qwen2_model import Qwen2
from rollout import tempered

MAX_PADDING = 0.05  # share of a micro-batch that may be padding


def assign_advantages(episodes: list[Episode], config: Config) -> None:
    """Give each episode its advantage: section 4.1.2, outcome supervision, with the population's std, in float64.

    The episodes of a group are adjacent, `rollout.group_size` of them. Rewards [1.1, 0.1, 0.1, 0.0] give
    advantages [1.72, -0.50, -0.50, -0.72].
    """
    rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
    rewards = rewards.view(-1, config.rollout.group_size)  # (Q, G)
    mean = rewards.mean(dim=1, keepdim=True)  # (Q, 1)
    std = rewards.std(dim=1, keepdim=True, correction=0)  # (Q, 1)
    advantage = (rewards - mean) / std if config.train.divide_by_std else rewards - mean  # (Q, G)
    zero_variance = rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-9  # std is rounding
    advantage[zero_variance] = 0.0
    for episode, value in zip(episodes, advantage.flatten().tolist(), strict=True):
        episode.advantage = value


def assign_token_weights(episodes: list[Episode], config: Config) -> None:
    """Give each episode the weight of each of its response tokens in the loss of this batch.

    tokens: every token weighs the same; responses: every response does; limit: 1 / (responses * max_new_tokens),
    which does not depend on any length. A masked response has weight 0 and does not count.
    """
    masks = config.train.truncated == "mask"
    counted = [episode for episode in episodes if not (masks and episode.truncated)]
    tokens = sum(len(episode.response_ids) for episode in counted)
    for episode in episodes:
        episode.token_weight = 0.0
    for episode in counted:
        denominator = {
            "tokens": tokens,
            "responses": len(counted) * len(episode.response_ids),
            "limit": len(counted) * config.rollout.max_new_tokens,
        }
        episode.token_weight = 1.0 / denominator[config.train.divide_loss_by]


def objective(logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, settings: TrainSettings) -> Tensor:
    """The objective of each response token, which the update maximizes; all are (N,).

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
    policy: Qwen2, episodes: list[Episode], config: Config, budget: int
) -> dict[str, float]:
    """Leave the gradient of the batch's loss in the parameters' .grad: eq. 3, with the sign flipped.

    budget: tokens per micro-batch. Returns the loss and, as means over the tokens of the active rows (of the first
    row where none is active): entropy, approx_kl, logprob_gap (mean |log ratio|: sampler against trainer) and
    clip_fraction (ratios outside the clip).
    """
    policy.zero_grad(set_to_none=True)
    active = [episode for episode in episodes if episode.active] or episodes[:1]
    mine = sorted(active, key=lambda episode: -episode.length)[rank() :: world_size()]
    batches = micro_batches(mine, budget)
    sums = torch.zeros(5, dtype=torch.float64)
    with progress_bar("updating", " rows", len(mine)) as bar:
        for number, batch in enumerate(pad_with_empty_batches(policy, batches, active[-1])):
            rows = [(e.advantage, e.token_weight, old) for e in batch for old in e.old_logprobs]
            columns = torch.tensor(rows, dtype=torch.float32, device=policy.head.device)  # (N, 3)
            advantage, token_weight, old_logprobs = columns.unbind(dim=1)  # (N,) each
            logprobs, entropy = response_logprobs(policy, batch, config.rollout.temperature)  # (N,)
            loss = -(token_weight * objective(logprobs, old_logprobs, advantage, config.train)).sum()
            loss.backward()
            if number < len(batches):  # the others pad
                sums += statistics(loss, entropy, logprobs - old_logprobs, config.train)
                bar.update(len(batch))
    all_reduce_gradients(policy, sums)
    tokens = sum(len(episode.response_ids) for episode in active)
    names = ("entropy", "approx_kl", "logprob_gap", "clip_fraction")
    return {"loss": sums[0].item(), **dict(zip(names, (sums[1:] / tokens).tolist(), strict=True))}


@torch.no_grad()
def statistics(loss: Tensor, entropy: Tensor, log_ratio: Tensor, settings: TrainSettings) -> Tensor:
    """Sums over a micro-batch (5,), float64, on the CPU, which waits for the device here and not before."""
    ratio = log_ratio.exp()
    approx_kl = ratio - 1 - log_ratio  # http://joschu.net/blog/kl-approx.html, k3
    outside = (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)
    sums = (loss, entropy.sum(), approx_kl.sum(), log_ratio.abs().sum(), outside.sum())
    return torch.stack(sums).cpu().double()


def apply_gradient(policy: Qwen2, optimizer: AdamW, max_norm: float) -> float:
    """One optimizer step along the gradient, scaled down to `max_norm`; returns the gradient's norm before.

    A gradient that is zero or not finite skips the optimizer step, so momentum alone never moves the weights.
    """
    norm = unsharded(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)).item()
    if norm > 0 and math.isfinite(norm):
        optimizer.step()
    return norm


# ---- Micro-batches and logprobs ------------------------------------------------------------------------------


def micro_batches(episodes: list[Episode], budget: int) -> list[list[Episode]]:
    """Episodes, longest first, cut into micro-batches of at most `budget` tokens, of which at most 5 % is padding.

    Running out of memory shows in the first micro-batch, therefore. A row longer than the budget gets one of its
    own. A token's weight does not depend on how the batch is cut, so neither does the gradient.
    """
    batches: list[list[Episode]] = []
    tokens = 0  # of the last micro-batch, padding left out
    for episode in episodes:
        area = (len(batches[-1]) + 1) * batches[-1][0].length if batches else 0
        tokens += episode.length
        if batches and area <= budget and tokens >= (1 - MAX_PADDING) * area:
            batches[-1].append(episode)
        else:
            batches.append([episode])
            tokens = episode.length
    return batches


def response_logprobs(policy: Qwen2, episodes: list[Episode], temperature: float) -> tuple[Tensor, Tensor]:
    """Logprob and entropy (without gradient) of every response token, episode after episode: fp32, (N,) each.

    Only the positions that predict a response token reach the head, in chunks whose logits are computed again in
    backward, so (N, V) never exists at once.
    """
    device, tokens = policy.head.device, []
    predicting: list[int] = []  # positions in the flattened batch
    width = max(episode.length for episode in episodes)
    for row, episode in enumerate(episodes):
        tokens.append(episode.prompt_ids + episode.response_ids + [0] * (width - episode.length))
        # the token at t is predicted by the hidden state at t - 1
        predicting += range(row * width + len(episode.prompt_ids) - 1, row * width + episode.length - 1)
    hidden = policy(torch.tensor(tokens, device=device)).flatten(0, 1)  # (B * T, hidden)
    hidden = hidden.index_select(0, torch.tensor(predicting, device=device))  # (N, hidden)
    response_ids = [token for episode in episodes for token in episode.response_ids]
    targets = torch.tensor(response_ids, device=device)  # (N,)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        distribution = tempered(policy.logits(hidden), temperature).log_softmax(dim=-1)  # (C, V)
        logprobs = distribution.gather(-1, targets[:, None])[:, 0]  # (C,)
        with torch.no_grad():  # last, so that backward's second run of this function ends before it
            entropy = torch.special.entr(distribution.exp()).sum(dim=-1)  # (C,)
        return logprobs, entropy

    chunks = [
        checkpoint(chunk, *parts, use_reentrant=False, preserve_rng_state=False)
        for parts in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    logprobs, entropy = map(torch.cat, zip(*chunks, strict=True))
    return logprobs, entropy
