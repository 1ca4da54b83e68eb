"""The hand-written Qwen2 against transformers' Qwen2ForCausalLM: logits, gradients, cached decode and bf16.

A policy that is almost Qwen2.5 still trains, only worse: no reward curve shows a missing bias or a wrong epsilon. So
the models here have the head counts of the real sizes, are small otherwise, and every parameter is random: biases of
zero and norm weights of one could be left out unnoticed.
"""

from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config as ReferenceConfig, Qwen2ForCausalLM

from data_types import Episode
from grpo import response_logprobs
from plain_policy import DEVICES, assert_same_gradient, sample
from qwen2_model import Qwen2, Qwen2Config, WideMatmul, rope_tables, wide_matmul

VOCABULARY, ROWS = 200, 211  # ids that the tokenizer knows; rows of the embedding
close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)  # for logits and logprobs in fp32


def small_config(heads: tuple[int, int] = (14, 2), tied: bool = True, **changes: float) -> Qwen2Config:
    return replace(Qwen2Config(ROWS, 8 * heads[0], 96, 2, *heads, 8, 1e-6, 1e6, tied, 32768), **changes)


CONFIGS = [  # 0.5B, 1.5B and 3B; 7B, 14B and 72B; heads wider than the model
    *(small_config(heads) for heads in ((14, 2), (12, 2), (16, 2))),
    *(small_config(heads, tied=False) for heads in ((28, 4), (40, 8), (64, 8))),
    small_config((6, 3), hidden_size=40, head_dim=16),
]
FAR = torch.cat((torch.arange(12), torch.arange(32768 - 12, 32768)))[None]  # angles in bf16 would be off by whole turns


def twins(config: Qwen2Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Qwen2, Qwen2ForCausalLM]:
    """Our model and transformers' with the same weights: all random, at scales that real checkpoints have."""
    reference = Qwen2ForCausalLM(ReferenceConfig(**asdict(config), attn_implementation="eager")).eval().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = (8 if name == "model.norm.weight" else 1) * (1 + 0.3 * noise)
        elif noise.dim() == 2:  # embeddings are small, so that the first norm's epsilon counts
            noise *= 0.02 if "embed" in name or "lm_head" in name else 1.5 / noise.shape[1] ** 0.5
        parameter.data.copy_(noise)
    model = Qwen2(config).to(dtype)
    model.vocabulary = VOCABULARY
    views, theirs = model.hf_tensors(), dict(reference.named_parameters())
    assert {n: v.shape for n, v in views.items()} == {n: p.shape for n, p in theirs.items()}
    for name, parameter in theirs.items():
        views[name].copy_(parameter.data)
    return model, reference


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """(B, T, V), of our model or the reference."""
    if not isinstance(model, Qwen2):
        return model(tokens, position_ids=positions).logits[..., :VOCABULARY]
    rope = None if positions is None else rope_tables(model.config, positions)
    return model.logits(model(tokens, rope).flatten(0, 1)).view(*tokens.shape, -1)[..., :VOCABULARY]


def sampled_episodes(model: Qwen2) -> list[Episode]:
    """Prompts of different lengths, which the cache aligns at their end, and responses of different lengths."""
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 4, 9, 16)]
    uniforms = torch.rand(8, 20, generator=torch.Generator().manual_seed(0))
    episodes = sample(model, prompts, uniforms, range(0, VOCABULARY, 10))
    assert len({len(e.response_ids) for e in episodes}) > 3
    return episodes


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs each token differently, as advantages do. They take the place of the model's weights."""
    (logprobs * torch.linspace(-1, 2, len(logprobs))).mean().backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    return model.hf_tensors() if isinstance(model, Qwen2) else {n: p.data for n, p in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.num_attention_heads}/{c.num_key_value_heads}")
def test_logits_logprobs_and_gradients_are_those_of_the_reference(config: Qwen2Config):
    """What the sampler recorded, the trainer and the reference find again, whatever the other rows did."""
    model, reference = twins(config)
    for seed, positions in enumerate((None, FAR)):
        ours, theirs = (logits_of(each, random_tokens(2, 24, seed=seed), positions) for each in (model, reference))
        assert theirs.std() > 1  # else agreement would be easy
        close(ours, theirs)
    episodes, expected = sampled_episodes(model), torch.empty(0)
    for e in episodes:  # each row is run alone
        logits = reference(torch.tensor([e.prompt_ids + e.response_ids])).logits[0, :, :VOCABULARY]
        logits = logits[len(e.prompt_ids) - 1 : -1]  # (response tokens, V)
        logprobs = logits.log_softmax(dim=-1)[range(len(logits)), e.response_ids]
        expected = torch.cat((expected, logprobs))
    trained, _ = response_logprobs(model, episodes, 1.0)
    close(torch.tensor([logprob for episode in episodes for logprob in episode.old_logprobs]), expected)
    close(trained, expected)
    assert_same_gradient(gradients(model, trained), gradients(reference, expected), tolerance=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_of_the_head_and_recomputed_activations_change_nothing(tied: bool):
    """The embedding has more rows than the tokenizer has ids; what they hold must not matter to the last bit.

    With a head sliced to the vocabulary, logprobs are the same bits too. Entropies and gradients are sums over the
    head's rows, which a kernel may add in another order when there are fewer of them.
    """
    results, calls = [], []
    for change in ("none", "padding", "recompute", "slice"):
        model, _ = twins(small_config(tied=tied))
        episodes, model.checkpoint_layers = sampled_episodes(model), change == "recompute"
        if change == "padding":
            model.head.data[VOCABULARY:] *= 100
        elif change == "slice":
            model.logits = lambda hidden, head=model.head[:VOCABULARY]: hidden @ head.t()
        model.layers[1].register_forward_pre_hook(lambda *_, change=change: calls.append(change))
        logprobs, entropy = response_logprobs(model, episodes, 0.7)
        results.append({"logprobs": logprobs.detach(), "entropy": entropy, **gradients(model, logprobs)})
    assert calls == ["none", "padding", "recompute", "recompute", "slice"]
    plain, *same, sliced = results
    assert all(torch.equal(other[name], tensor) for name, tensor in plain.items() for other in same)
    assert torch.equal(sliced["logprobs"], plain["logprobs"])
    assert_same_gradient(sliced, plain, tolerance=1e-5)
    assert not plain["model.embed_tokens.weight" if tied else "lm_head.weight"][VOCABULARY:].any()


def test_bf16_is_no_worse_than_the_references_bf16():
    """GRPO learns from ratios of probabilities, so rounding must cost no more than it has to. The reference rounds its
    logits too, ours are those of a head in fp32: rounded, one near 6 would be off by up to 0.016. Sampler and trainer
    round what comes out of each layer, and add up in different orders.
    """
    errors = []
    for seed in range(4):
        model, rough = twins(small_config(tied=seed % 2 == 0), seed, torch.bfloat16)
        tokens, head = random_tokens(4, 24, seed=seed), model.head[:VOCABULARY].float().t()
        found = [logits_of(m, tokens) for m in (model, rough)]
        found += [hidden.float() @ head for hidden in (model(tokens), rough.model(tokens).last_hidden_state)]
        truth = logits_of(rough.float(), tokens)  # the same weights
        torch.testing.assert_close(found[0], found[2], atol=1e-5, rtol=0)
        episodes = sampled_episodes(model)
        recorded = torch.tensor([logprob for e in episodes for logprob in e.old_logprobs])
        assert (response_logprobs(model, episodes, 1.0)[0] - recorded).abs().mean() < 0.01
        errors.append([(logits.float() - truth).abs().mean().item() for logits in found])
    ours, theirs = torch.tensor(errors).mean(dim=0).view(2, 2).t()  # of logits, of hidden states
    assert (ours <= 1.1 * theirs).all(), (ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_wide_matmul_keeps_its_fp32_sums_and_has_a_gradient(device: str, monkeypatch: pytest.MonkeyPatch):
    """A bf16 logit near 64 may be off by 1/8. CUDA can return the fp32 sums of a bf16 matmul, and torch has no gradient
    for that. No CPU has this matmul: another stands in for it.
    """
    if device == "cpu":
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    generator, shapes = torch.Generator().manual_seed(0), ((30, 512), (90, 512), (30, 90))
    hidden, head, weights = (torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    truth = exact[0] @ exact[1].t()
    (truth * weights).sum().backward()
    for matmul in (wide_matmul, WideMatmul.apply):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
        logits = matmul(*inputs)
        torch.testing.assert_close(logits, truth.float(), atol=1e-3, rtol=0)
        (logits * weights).sum().backward()
        for found, expected in zip(inputs, exact, strict=True):
            torch.testing.assert_close(found.grad.double(), expected.grad, atol=0.01, rtol=0.01)  # rounded to bf16
