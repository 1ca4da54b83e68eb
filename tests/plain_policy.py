"""A small random policy, and sampling from it the plain way: the oracle of test_rollout.py and test_grpo.py.

Here is nothing of what rollout.py and grpo.py do to be fast: one row at a time, no padding, no cache, the
whole model again for every token, and the distribution worked out in numpy's float64.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_types import Episode, Problem
from qwen2_model import Qwen2, Qwen2Config
from rollout import Answer, Sampling

VOCABULARY = 211  # ids the tokenizer knows; the model's own vocabulary is larger, as Qwen's is
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
UNCUT = Sampling()  # temperature 1, neither top-k nor top-p
TOO_CLOSE = 1e-5  # to a border between two tokens: not for fp32 to decide


def small_policy(seed: int, device: str = "cpu", tied: bool = True, layers: int = 2, heads: int = 4,
                 kv_heads: int = 2, hidden: int = 32, inner: int = 48, vocabulary: int = VOCABULARY) -> Qwen2:
    """A Qwen2 with random weights, biases and norms: its distributions are neither flat nor fixed."""
    config = Qwen2Config(vocab_size=vocabulary + 20, hidden_size=hidden, intermediate_size=inner,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         head_dim=8, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=tied,
                         max_position_embeddings=128)
    policy = Qwen2(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:  # keeps the size of what it multiplies; the head's logits get a standard deviation of 2
                wide = 2.0 if name in ("embed.weight", "untied_head") else 1.0
                parameter.copy_(wide * noise / parameter.shape[1] ** 0.5)
    return policy.to(device)


@torch.no_grad()
def plain_logits(policy: Qwen2, tokens: list[int], vocabulary: int = VOCABULARY) -> np.ndarray:
    """Logits (T, vocabulary) of one row, float64 from the last product on."""
    hidden = policy(torch.tensor([tokens], device=policy.embed.weight.device))[0]
    return (hidden.double() @ policy.head[:vocabulary].double().t()).cpu().numpy()


def plain_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities (V,) that `sampling` draws from: tempered, of the k likeliest, of those the first p."""
    scaled = logits / (sampling.temperature or 1.0)
    weights = np.exp(scaled - scaled.max())
    likeliest = np.argsort(-weights)
    if sampling.top_k:
        weights[likeliest[sampling.top_k :]] = 0.0
    mass, enough = 0.0, sampling.top_p * weights.sum()
    for token in likeliest:
        if sampling.top_p < 1.0 and mass >= enough:
            weights[token] = 0.0
        mass += weights[token]
    return weights / weights.sum()


def plain_answer(policy: Qwen2, prompt: list[int], uniforms: Tensor, redraw: np.random.Generator,
                 sampling: Sampling = UNCUT) -> Answer:
    """The answer that never ends: one token for each of `uniforms` (max_new_tokens,), by inverse CDF.

    A number too close to a border of its CDF is replaced, in `uniforms` itself, by one from `redraw`.
    """
    ids, logprobs = [], []
    for place in range(len(uniforms)):
        logits = plain_logits(policy, prompt + ids)[-1]
        probabilities = plain_distribution(logits, sampling)
        if sampling.top_p < 1.0:
            near = [plain_distribution(logits, replace(sampling, top_p=sampling.top_p + gap)) > 0
                    for gap in (-TOO_CLOSE, TOO_CLOSE)]
            assert np.array_equal(*near), "fp32 cannot tell what top-p cuts here: take another seed"
        borders = probabilities.cumsum()
        while np.abs(borders - uniforms[place].item()).min() < TOO_CLOSE:
            uniforms[place] = float(redraw.random(dtype=np.float32))
        drawn = (borders <= uniforms[place].item()).sum()
        token = int(logits.argmax() if sampling.temperature == 0 else drawn)
        ids.append(token)
        logprobs.append(float(np.log(probabilities[token])))
    return Answer(0, ids, logprobs, ended=False)


def cut(answer: Answer, question: int, end_ids: set[int]) -> Answer:
    """What is left of the answer that never ends: all up to the first end token, which is kept."""
    ends = [place for place, token in enumerate(answer.ids) if token in end_ids]
    length = ends[0] + 1 if ends else len(answer.ids)
    return Answer(question, answer.ids[:length], answer.logprobs[:length], bool(ends))


def as_episodes(answers: list[Answer], prompts: list[list[int]]) -> list[Episode]:
    """Answers as the trainer gets them, without text and reward."""
    problem = Problem((1, 2), 3)
    return [Episode(problem, a.question, prompts[a.question], a.ids, a.logprobs, a.ended, text="")
            for a in answers]
