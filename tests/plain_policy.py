"""A small random policy, and sampling from it in the plainest way: the oracle of test_rollout.py and test_grpo.py.

Nothing here does what rollout.py and grpo.py do to be fast. Rows run one at a time, without padding or a cache, the
whole model runs again for every token, and numpy computes the distribution in float64.
"""

from collections.abc import Collection
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from countdown_task import Problem
from data_types import Episode
from plumbing.memory import Limit
from qwen2_model import Qwen2, Qwen2Config
from rollout import Response, Sampler

VOCABULARY = 211  # ids that the tokenizer knows; the embedding has more rows, as Qwen's has
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOO_CLOSE = 1e-5  # to a border between two tokens: fp32 may land on either side


def small_policy(seed: int, device: str = "cpu", tied: bool = True, **shape: int) -> Qwen2:
    """A Qwen2 with random weights, biases and norms, whose distributions are neither flat nor peaked."""
    size = {"vocabulary": VOCABULARY, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 32, "inner": 48} | shape
    vocabulary, layers, heads, kv_heads, hidden, inner = size.values()
    policy = Qwen2(Qwen2Config(vocabulary + 20, hidden, inner, layers, heads, kv_heads, 8, 1e-6, 10000.0, tied, 128))
    policy.vocabulary = vocabulary
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
            else:  # keeps the size of what it multiplies; the logits get a standard deviation of 2
                scale = 2.0 if name in ("embed_tokens.weight", "lm_head.weight") else 1.0
                parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)
    return policy.to(device)


@torch.no_grad()
def plain_response(policy: Qwen2, prompt: list[int], uniforms: Tensor, temperature: float = 1.0) -> Response:
    """A response that never ends: by inverse CDF (or greedy, at temperature 0), one token for each of `uniforms`."""
    redraw, head = np.random.default_rng(prompt), policy.head[: policy.vocabulary].double()
    ids, logprobs = [], []
    for place in range(len(uniforms)):
        hidden = policy(torch.tensor([prompt + ids], device=head.device))[0, -1]
        logits = (head @ hidden.double()).cpu().numpy() / (temperature or 1.0)
        probabilities = np.exp(logits - np.log(np.exp(logits).sum()))
        borders = probabilities.cumsum()
        while np.abs(borders - uniforms[place].item()).min() < TOO_CLOSE:  # then replaced, in `uniforms` itself
            uniforms[place] = float(redraw.random(dtype=np.float32))
        drawn = (borders <= uniforms[place].item()).sum()
        ids.append(int(drawn if temperature else logits.argmax()))
        logprobs.append(float(np.log(probabilities[ids[-1]])))
    return Response(ids, logprobs, truncated=True)


def cut(response: Response, end_ids: Collection[int]) -> Response:
    """The response that never ends, up to its first end token, which is kept."""
    length = next((n for n, token in enumerate(response.ids, start=1) if token in end_ids), None)
    return Response(response.ids[:length], response.logprobs[:length], truncated=length is None)


def sample(
    policy: Qwen2, prompts: list, uniforms: Tensor, end_ids: Collection[int], temperature: float = 1.0, **own: object
) -> list[Episode]:
    """A Sampler's responses to these prompts, which are their own problems; the text of a response lists its ids."""
    tokenizer = SimpleNamespace(end_ids=sorted(end_ids), encode_prompt=lambda ids, prefix: ids, decode=str)
    task = SimpleNamespace(question_text=lambda ids: ids, ASSISTANT_PREFIX="")
    sampler = Sampler(policy, tokenizer, task, uniforms.shape[1], Limit("rows", 10**9))
    vars(sampler).update(own)
    with patch.object(torch, "rand", lambda *shape, generator: uniforms.view(shape)):
        return sampler.rollout(prompts, len(uniforms) // len(prompts), temperature, torch.Generator())


def assert_same_gradient(gradient: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 3e-5) -> None:
    for name, tensor in expected.items():  # one by one, so that no small tensor hides behind a large one
        assert (gradient[name] - tensor).norm() <= tolerance * tensor.norm(), name


def active_episodes(*lengths: tuple[int, int]) -> list[Episode]:
    """Episodes of groups of their own, with so many tokens of (prompt, response); what they say does not matter."""
    weights = {"advantage": 1.0, "token_weight": 1e-4}
    return [
        Episode(Problem((1, 2), 3), [i % 100] * p, [2] * n, [-1.0] * n, False, "", **weights)
        for i, (p, n) in enumerate(lengths)
    ]
