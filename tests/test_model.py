"""The hand-written Qwen2 against transformers' Qwen2ForCausalLM: logits, gradients, cached decode and bf16.

A policy that is almost Qwen2.5 still trains, only worse: nobody notices a missing bias or a wrong epsilon by
looking at a reward curve. So each comparison here is with the reference implementation, on models that have
the head counts of a real size but are small elsewhere, and whose every parameter is random: at their first
values the biases are zero and the norm weights one, and leaving them out would change nothing. The last part
proves that the comparison notices: it breaks one part of the model after the other.

The reference runs in fp32 on the CPU with its plain attention ("eager").
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config as ReferenceConfig
from transformers import Qwen2ForCausalLM

import qwen2_model
from data_types import Episode, Problem
from grpo import response_logprobs
from qwen2_model import Qwen2, Qwen2Config, RMSNorm, WideProduct, causal_attention, head_logits
from rollout import Sampling, generate

TOLERANCE = 1e-4  # of a logit or a logprob in fp32
HEADS = {  # query heads, kv heads
    "0.5B": (14, 2), "1.5B": (12, 2), "3B": (16, 2), "7B": (28, 4), "14B and 32B": (40, 8), "72B": (64, 8),
}
VOCABULARY = 200  # ids of the tokenizer; the models' tables are larger, as the real ones are
END_IDS = range(0, VOCABULARY, 10)  # many, so that answers end at many lengths
SAMPLING = Sampling(temperature=1.0)
sizes = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def small_config(heads: tuple[int, int] = (14, 2), tied: bool = True, **changes: object) -> Qwen2Config:
    config = Qwen2Config(
        vocab_size=211, hidden_size=8 * heads[0], intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=tied, max_position_embeddings=32768,
    )
    return replace(config, **changes)


def reference_model(config: Qwen2Config, seed: int) -> Qwen2ForCausalLM:
    """transformers' model with every parameter random, at scales that real checkpoints have.

    Embeddings are small, so that the first norm's epsilon counts, and the last norm's weights are large.
    """
    model = Qwen2ForCausalLM(ReferenceConfig(**asdict(config), attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((8 if name == "model.norm.weight" else 1) * (1 + 0.3 * noise))
            elif name.endswith("bias"):
                parameter.copy_(noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(0.02 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model


def our_model(config: Qwen2Config, reference: Qwen2ForCausalLM, dtype: torch.dtype = torch.float32) -> Qwen2:
    """A Qwen2 with the reference's weights, copied in through the names and shapes of a checkpoint."""
    model = Qwen2(config).to(dtype)
    state = reference.state_dict()
    for name, view in model.hf_tensors().items():
        view.copy_(state[name])
    return model


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_logits(model: Qwen2, tokens: Tensor, **how: object) -> Tensor:
    hidden = model(tokens, **how)  # (B, T, hidden)
    return head_logits(hidden.flatten(0, 1), model.head).view(*tokens.shape, -1)  # (B, T, V)


@torch.no_grad()
def reference_logits(reference: Qwen2ForCausalLM, tokens: Tensor, **how: Tensor) -> Tensor:
    return reference(tokens, **how).logits  # (B, T, V)


# ---- The same logits ---------------------------------------------------------------------------------------


@sizes
@ties
def test_logits_and_choices_are_those_of_the_reference(heads, tied):
    config = small_config(heads, tied)
    for seed in range(3):
        reference = reference_model(config, seed)
        tokens = random_tokens(2, 24, seed=seed)
        theirs = reference_logits(reference, tokens)
        ours = our_logits(our_model(config, reference), tokens)
        assert theirs.std() > 1  # else agreement would be easy
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
        assert torch.equal(ours.argmax(dim=-1), theirs.argmax(dim=-1))


@ties
def test_the_checkpoint_has_the_references_names_and_shapes(tied):
    """The fused matrices must never show outside: a folder that we write is opened by other programs."""
    config = small_config(tied=tied)
    theirs = {name: tensor.shape for name, tensor in reference_model(config, 0).state_dict().items()}
    if tied:
        del theirs["lm_head.weight"]  # the embedding again; checkpoints leave it out
    assert {name: tensor.shape for name, tensor in Qwen2(config).hf_tensors().items()} == theirs


def test_heads_need_not_be_as_wide_as_the_model():
    """config.json may give a head_dim that is not hidden_size / heads."""
    config = small_config((6, 3), hidden_size=40, head_dim=16)
    reference = reference_model(config, 0)
    tokens = random_tokens(2, 24)
    ours, theirs = our_logits(our_model(config, reference), tokens), reference_logits(reference, tokens)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_far_positions_are_as_exact_as_near_ones():
    """Angles in bf16 or fp16 would be off by whole turns this far out; tables in fp32 are not."""
    config = small_config()
    reference = reference_model(config, 0)
    tokens = random_tokens(1, 24)
    positions = torch.cat((torch.arange(12), torch.arange(32768 - 12, 32768)))[None]
    ours = our_logits(our_model(config, reference), tokens, positions=positions)
    theirs = reference_logits(reference, tokens, position_ids=positions)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


# ---- Rows of different length ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    """Ours pads on the right with whatever ids; the reference masks its padding, on either side."""
    config = small_config()
    lengths = [5, 17, 24, 1]
    for seed in range(3):
        reference = reference_model(config, seed)
        rows = [random_tokens(length, seed=100 * seed + length) for length in lengths]
        ours = random_tokens(4, 24, seed=seed + 1)  # junk where nothing is written over it
        theirs, mask = random_tokens(4, 24, seed=seed + 2), torch.zeros(4, 24, dtype=torch.long)
        places = [slice(24 - n, 24) if side == "left" else slice(n) for n in lengths]
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            ours[i, : len(row)] = row
            theirs[i, place] = row
            mask[i, place] = 1
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        expected = reference_logits(reference, theirs, attention_mask=mask, position_ids=positions)
        found = our_logits(our_model(config, reference), ours)
        for i, (n, place) in enumerate(zip(lengths, places, strict=True)):
            torch.testing.assert_close(found[i, :n], expected[i, place], atol=TOLERANCE, rtol=0)


def reference_logprobs(reference: Qwen2ForCausalLM, episodes: list[Episode]) -> Tensor:
    """Logprob of every response token among the tokenizer's ids, (tokens,) fp32; each row is run alone."""
    logprobs = []
    for e in episodes:
        logits = reference(torch.tensor([e.prompt_ids + e.response_ids])).logits[0, :, :VOCABULARY]
        logits = logits[len(e.prompt_ids) - 1 : -1].float()  # (response tokens, V)
        logprobs.append(logits.log_softmax(dim=-1).gather(-1, torch.tensor(e.response_ids)[:, None])[:, 0])
    return torch.cat(logprobs)


def episode(prompt: list[int], response: list[int]) -> Episode:
    return Episode(Problem((1, 2, 3), 6), 0, prompt, response, [0.0] * len(response), True, "")


def random_episodes(seed: int) -> list[Episode]:
    """Prompts and responses of different lengths, of one token too."""
    lengths = [(3, 9), (12, 1), (7, 30), (1, 14)]
    rows = [random_tokens(sum(pair), seed=10 * seed + i).tolist() for i, pair in enumerate(lengths)]
    return [episode(row[:prompt], row[prompt:]) for row, (prompt, _) in zip(rows, lengths, strict=True)]


@sizes
@ties
def test_cached_decode_agrees_with_the_full_forward(heads, tied):
    """What the sampler wrote down, the trainer and the reference find again, whatever the other rows did.

    Prompts differ in length (the cache aligns them at their end) and answers end at different times.
    """
    config = small_config(heads, tied)
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 4, 9, 16)]
    for seed in range(2):
        reference = reference_model(config, seed)
        model = our_model(config, reference)
        uniforms = torch.rand(len(prompts) * 4, 20, generator=torch.Generator().manual_seed(seed))
        answers = generate(model, prompts, uniforms, END_IDS, VOCABULARY, SAMPLING)
        assert len({len(answer.ids) for answer in answers}) > 3
        episodes = [episode(prompts[answer.question], answer.ids) for answer in answers]
        sampled = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
        with torch.no_grad():
            trained, _ = response_logprobs(model, episodes, VOCABULARY, SAMPLING)
            expected = reference_logprobs(reference, episodes)
        torch.testing.assert_close(sampled, expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(trained, expected, atol=TOLERANCE, rtol=0)


def test_greedy_decoding_is_the_references_argmax():
    config = small_config()
    reference = reference_model(config, 0)
    prompts = [random_tokens(n, seed=n).tolist() for n in (2, 11)]
    model, sampling = our_model(config, reference), Sampling(temperature=0.0)
    answers = generate(model, prompts, torch.zeros(2, 16), [], VOCABULARY, sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        for i, token in enumerate(answer.ids):
            row = torch.tensor([prompt + answer.ids[:i]])
            assert token == reference_logits(reference, row)[0, -1, :VOCABULARY].argmax().item()


# ---- Gradients ---------------------------------------------------------------------------------------------


def weighted_loss(logprobs: Tensor) -> Tensor:
    """Any loss of the logprobs will do; this one weighs each token differently, as advantages do."""
    return -(logprobs * torch.linspace(-1, 2, len(logprobs))).sum() / len(logprobs)


def our_gradients(model: Qwen2, episodes: list[Episode]) -> dict[str, Tensor]:
    """The gradients of the loss under the names of a checkpoint."""
    logprobs, _ = response_logprobs(model, episodes, VOCABULARY, SAMPLING)
    weighted_loss(logprobs).backward()
    gradients = copy.deepcopy(model)
    for gradient, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        gradient.data = parameter.grad
    model.zero_grad()
    return gradients.hf_tensors()


@sizes
@ties
def test_gradients_are_those_of_the_reference(heads, tied):
    config = small_config(heads, tied)
    for seed in range(2):
        reference, episodes = reference_model(config, seed), random_episodes(seed)
        weighted_loss(reference_logprobs(reference, episodes)).backward()
        ours = our_gradients(our_model(config, reference), episodes)
        theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            difference = (ours[name] - gradient).norm() / gradient.norm()
            assert difference < 1e-3, f"{name}: {difference:.1e}"


def test_recomputing_activations_leaves_the_gradients_alone():
    config = small_config()
    model = our_model(config, reference_model(config, 0))
    kept = our_gradients(model, random_episodes(0))
    model.checkpoint_layers = True
    calls = []
    model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = our_gradients(model, random_episodes(0))
    assert len(calls) == 2  # once forward, once more in backward
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name


# ---- bf16 --------------------------------------------------------------------------------------------------


def test_bf16_is_no_worse_than_the_references_bf16():
    """Ratios of probabilities are what GRPO learns from; here rounding must cost no more than it has to.

    Both run in bf16 with the same weights; the truth is the reference in fp32 with those weights.
    """
    ours_off, theirs_off = [], []
    for seed in range(4):
        config = small_config((14, 2), tied=seed % 2 == 0)
        rough = reference_model(config, seed).bfloat16()
        model, exact = our_model(config, rough, torch.bfloat16), copy.deepcopy(rough).float()
        episodes = random_episodes(seed)
        with torch.no_grad():
            truth = reference_logprobs(exact, episodes)
            theirs = reference_logprobs(rough, episodes)
            ours, _ = response_logprobs(model, episodes, VOCABULARY, SAMPLING)
        ours_off.append((ours - truth).abs().mean())
        theirs_off.append((theirs - truth).abs().mean())
    assert sum(ours_off) <= sum(theirs_off)


def test_logits_are_not_rounded_to_bf16():
    """A bf16 logit near 16 is off by up to 1/32, and its probability by 3 percent."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 512, generator=generator).bfloat16() for n in (30, 90))
    exact = hidden.double() @ head.double().t()  # (30, 90)
    assert exact.abs().max() > 64
    torch.testing.assert_close(head_logits(hidden, head).double(), exact, atol=1e-3, rtol=0)


def test_the_gradient_of_the_wide_product(monkeypatch):
    """On CUDA the head's product keeps the fp32 sums of bf16 numbers; torch has no gradient for it.

    No CPU has that product: here it is worked out in another way, and our gradient compared with autograd's.
    """
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    check_wide_product("cpu", WideProduct.apply)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_head_on_cuda_is_exact_and_can_be_trained():
    check_wide_product("cuda", head_logits)


def check_wide_product(device: str, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, weights = (torch.randn(shape, generator=generator).bfloat16().to(device)
                             for shape in ((24, 64), (40, 64), (24, 40)))
    inputs = [hidden.requires_grad_(), head.requires_grad_()]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits, exact = product(*inputs), exact_inputs[0] @ exact_inputs[1].t()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=0)
    (logits * weights).sum().backward()
    (exact * weights).sum().backward()
    for found, expected in zip(inputs, exact_inputs, strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, atol=0.01, rtol=0.01)  # bf16


# ---- The comparison notices --------------------------------------------------------------------------------


def other_rope_base(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    model.config = replace(model.config, rope_theta=1e4)


def other_norm_epsilon(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-5


def tied_head(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    model.config = replace(model.config, tie_word_embeddings=True)


def without(name: str, value: float) -> Callable[[Qwen2, pytest.MonkeyPatch], None]:
    """Gives the last layer's parameter the value that makes it do nothing."""
    def spoil(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
        model.hf_tensors()[f"model.layers.1.{name}"].fill_(value)

    spoil.__name__ = f"without_{name}"
    return spoil


def heads_dealt_out_in_turns(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    """Query head i reads kv head i % kv heads; in Qwen2 neighbours share a kv head."""
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return causal_attention(layer, q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1))

    patch.setattr(model, "forward", partial(model.forward, attend=attend))


def seeing_ahead(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    patch.setattr(model, "forward", partial(model.forward, attend=attend))


def neighbours_rotate_together(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    """Dimension 2i turns with 2i + 1, as the paper draws it; in Qwen2 i turns with i + half a head."""
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        cos, sin = (table[..., half:].repeat_interleave(2, dim=-1) for table in (cos, sin))
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    patch.setattr(qwen2_model, "rotate", rotate)


def keys_not_rotated(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    rotate, kv_heads = qwen2_model.rotate, model.config.num_key_value_heads
    patch.setattr(qwen2_model, "rotate", lambda x, *turn: torch.cat(
        (rotate(x[:, :, :-kv_heads], *turn), x[:, :, -kv_heads:]), dim=2))


def gelu_for_silu(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "silu", F.gelu)


def gate_and_up_exchanged(model: Qwen2, patch: pytest.MonkeyPatch) -> None:
    gate, up = (model.hf_tensors()[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    gate[:], up[:] = up.clone(), gate.clone()


@pytest.mark.parametrize("spoil", [
    other_rope_base, neighbours_rotate_together, keys_not_rotated, other_norm_epsilon,
    heads_dealt_out_in_turns, seeing_ahead, tied_head, gelu_for_silu, gate_and_up_exchanged,
    *(without(f"self_attn.{name}_proj.bias", 0.0) for name in "qkv"),
    *(without(f"{name}_layernorm.weight", 1.0) for name in ("input", "post_attention")),
], ids=lambda spoil: spoil.__name__)
def test_the_comparison_notices(spoil, monkeypatch):
    """Each of these is a mistake that the tests above exist to find; here each is made, and must show."""
    config = small_config(tied=False)
    for seed in range(2):
        reference, tokens = reference_model(config, seed), random_tokens(2, 24, seed=seed)
        model, expected = our_model(config, reference), reference_logits(reference, tokens)
        assert (our_logits(model, tokens) - expected).abs().max() < TOLERANCE
        with monkeypatch.context() as patch:
            spoil(model, patch)
            assert (our_logits(model, tokens) - expected).abs().max() > 20 * TOLERANCE
