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
                       gspo (arXiv 2507.18071) eq. 5: clipped, with the ratio of whole responses; cispo
                       (arXiv 2506.13585) eq. 4: the capped ratio as a weight, truncated importance sampling
    divide_by_std      false: Dr. GRPO
    divide_loss_by     tokens: DAPO eq. 8; responses: DeepSeekMath eq. 3; limit: Dr. GRPO
    truncated          mask: truncated responses leave the loss (DAPO section 3.4); keep: they stay, without the
                       format reward
"""

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_types import CHUNK_TOKENS, Config, Episode, TrainSettings
from optimizer import AdamW
from plumbing.ranks import all_reduce_gradients, pad_with_empty_batches, shard_of, unsharded
from plumbing.terminal import progress_bar
from qwen2_model import Qwen2, causal_attention, rope_tables
from rollout import tempered

MAX_PADDING = 0.2  # share of a table of rows that may be padding


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
    zero_variance = rewards.amax(dim=1) - rewards.amin(dim=1) < 1e-9  # std is rounding error
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


def objective(
    logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, lengths: list[int], settings: TrainSettings
) -> Tensor:
    """The objective of each response token, which the update maximizes; all tensors are (N,).

    `old_logprobs` are the sampler's, so `ratio` is the policy's probability of a token over the sampler's. lengths:
    of the responses, which stand one after the other.
    """
    log_ratio = logprobs - old_logprobs
    if settings.objective == "gspo":  # one ratio per response: the geometric mean of those of its tokens
        log_ratio = torch.cat([part.mean().expand(len(part)) for part in log_ratio.split(lengths)])
    ratio = log_ratio.exp()
    if settings.objective == "reinforce":
        return advantage * logprobs
    if settings.objective == "cispo":
        return ratio.detach().clamp(max=1 + settings.clip_high) * advantage * logprobs
    clipped_ratio = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return torch.minimum(ratio * advantage, clipped_ratio * advantage)


def accumulate_gradient(policy: Qwen2, batch: list[Episode], config: Config, budget: int) -> dict[str, float]:
    """Leave the gradient of the batch's loss in the parameters' .grad: eq. 3, with the sign flipped.

    budget: tokens per micro-batch. Returns the loss and, as means over the tokens of the active rows (of the first
    row where none is active): entropy, approx_kl, logprob_gap (mean |log ratio|: sampler against trainer) and
    clip_fraction (ratios outside the clip).
    """
    policy.zero_grad(set_to_none=True)
    active = [episode for episode in batch if episode.active] or batch[:1]
    groups = [list(group) for _, group in groupby(active, key=lambda episode: episode.prompt_ids)]
    batches = micro_batches(groups[shard_of(len(groups))], budget)
    sums = torch.zeros(5, dtype=torch.float64)
    padded = pad_with_empty_batches(policy, batches, active[-1])
    for number, episodes in enumerate(progress_bar("updating", " micro-batches", padded)):
        rows = [(e.advantage, e.token_weight, old) for e in episodes for old in e.old_logprobs]
        columns = torch.tensor(rows, dtype=torch.float32, device=policy.head.device)  # (N, 3)
        advantage, token_weight, old_logprobs = columns.unbind(dim=1)  # (N,) each
        logprobs, entropy = response_logprobs(policy, episodes, config.rollout.temperature)  # (N,) each
        lengths = [len(episode.response_ids) for episode in episodes]
        loss = -(token_weight * objective(logprobs, old_logprobs, advantage, lengths, config.train)).sum()
        loss.backward()
        if number < len(batches):  # the rest are padding, for FSDP2
            sums += statistics(loss, entropy, logprobs - old_logprobs, config.train)
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


# ---- Micro-batches: every prompt once --------------------------------------------------------------------------


def micro_batches(groups: list[list[Episode]], budget: int) -> list[list[Episode]]:
    """Episodes in micro-batches that fit the budget, those of a group together, the largest groups first.

    So running out of memory shows in the first micro-batch. A group is split only where it does not fit on its own; a
    single episode may have more tokens than the budget. A token's weight does not depend on how the batch is cut, so
    neither does the gradient.
    """
    batches: list[list[Episode]] = [[]]
    for group in sorted(groups, key=packed_tokens, reverse=True):
        if not fits(batches[-1] + group, budget):
            batches.append([])
        for episode in group:
            if not fits([*batches[-1], episode], budget):
                batches.append([])
            batches[-1].append(episode)
    return [batch for batch in batches if batch]


def fits(episodes: list[Episode], budget: int) -> bool:
    """Attention sees whole rows: long prompts with short responses would gather many times the budget."""
    return packed_tokens(episodes) <= budget and sum(episode.length for episode in episodes) <= 2 * budget


def packed_tokens(episodes: list[Episode]) -> int:
    """Tokens of responses and prompts, a group's prompt counted once."""
    prompts = [prompt for prompt, _ in groupby(episode.prompt_ids for episode in episodes)]
    return sum(map(len, prompts)) + sum(len(episode.response_ids) for episode in episodes)


class PackedBatch:
    """The tokens of a micro-batch in one line: each group's prompt once, then its responses.

    A prompt's hidden states do not depend on what follows it, so the rows of a group share them: embedding, linear
    layers, norms and head run on the line and see no padding. Attention alone runs on rows: `attend` gathers each
    row's q, k and v from the line and puts each token's output back. Rows of about equal length stand in one table,
    padded on the right.
    """

    def __init__(self, policy: Qwen2, episodes: list[Episode]) -> None:
        line: list[tuple[int, int]] = []  # each token and its position in its row
        rows: list[list[int]] = []  # each episode's places in the line
        predicting: list[int] = []
        for prompt, group in groupby(episodes, key=lambda episode: episode.prompt_ids):
            shared = range(len(line), len(line) + len(prompt))
            line += zip(prompt, range(len(prompt)), strict=True)
            for episode in group:
                rows.append([*shared, *range(len(line), len(line) + len(episode.response_ids))])
                line += zip(episode.response_ids, range(len(prompt), episode.length), strict=True)
                predicting += rows[-1][len(prompt) - 1 : -1]  # a token is predicted by the one before it
        tokens, positions = torch.tensor(line, device=policy.head.device).unbind(dim=1)  # (L,) each
        self.tokens, self.rope = tokens[None], rope_tables(policy.config, positions[None])  # (1, L)
        self.predicting = torch.tensor(predicting, device=tokens.device)  # (N,)
        self.tables, back, begin = [], torch.empty(len(line), dtype=torch.long), 0
        rows.sort(key=len, reverse=True)
        while rows:
            width = len(rows[0])
            similar = [row for row in rows if len(row) >= (1 - MAX_PADDING) * width]
            table = torch.tensor([row + row[:1] * (width - len(row)) for row in similar])  # (B, T)
            for number, row in enumerate(similar):
                back[row] = torch.arange(begin + number * width, begin + number * width + len(row))
            begin += table.numel()
            self.tables.append(table.to(tokens.device))
            rows = rows[len(similar) :]
        # where the tables have a token, for a token of a shared prompt in the group's last row
        self.back = back.to(tokens.device)  # (L,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within the rows: q (1, Hq, L, D), k and v (1, Hkv, L, D), output (1, Hq, L, D)."""
        heads = [x.shape[1] for x in (q, k, v)]
        line = torch.cat((q, k, v), dim=1)[0].transpose(0, 1).flatten(1)  # (L, H * D)
        mixed = []
        for table in self.tables:
            # as an embedding, whose backward adds up what the rows send to a shared token in order, not by atomics
            rows = F.embedding(table, line).unflatten(2, (-1, q.shape[-1])).transpose(1, 2)  # (B, H, T, D)
            output = causal_attention(layer, *rows.split(heads, dim=1))  # (B, Hq, T, D)
            mixed.append(output.transpose(1, 2).flatten(0, 1))  # (B * T, Hq, D)
        return torch.cat(mixed).index_select(0, self.back).transpose(0, 1)[None]


def response_logprobs(policy: Qwen2, episodes: list[Episode], temperature: float) -> tuple[Tensor, Tensor]:
    """Logprob and entropy (without gradient) of every response token, episode after episode: fp32, (N,) each.

    Only the positions that predict a response token reach the head, in chunks whose logits are computed again in
    backward, so (N, V) never exists at once.
    """
    batch = PackedBatch(policy, episodes)
    hidden = policy(batch.tokens, batch.rope, batch.attend)[0]  # (L, hidden)
    hidden = F.embedding(batch.predicting, hidden)  # (N, hidden), gathered as in `attend`
    response_ids = [token for episode in episodes for token in episode.response_ids]
    targets = torch.tensor(response_ids, device=hidden.device)  # (N,)

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        distribution = tempered(policy.logits(hidden), temperature).log_softmax(dim=-1)  # (C, V)
        logprobs = distribution.gather(-1, targets[:, None])[:, 0]  # (C,)
        with torch.no_grad():  # last: checkpoint's recomputation stops before it
            entropy = -(distribution.exp() * distribution)[:, : policy.vocabulary].sum(-1)  # (C,)
        return logprobs, entropy

    chunks = [
        checkpoint(chunk, *parts, use_reentrant=False, preserve_rng_state=False)
        for parts in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    ]
    logprobs, entropy = map(torch.cat, zip(*chunks, strict=True))
    return logprobs, entropy
