"""Qwen2.5, written by hand: the whole policy in one file.

A decoder-only transformer: token embedding, then per layer RMSNorm -> grouped-query attention with rotary
positions and q/k/v biases -> RMSNorm -> SwiGLU, each added to the residual stream; a last RMSNorm and a head that
may share the embedding's weights. It follows "Qwen2.5 Technical Report" (arXiv 2412.15115, section 2) and gives the
logits of transformers' Qwen2ForCausalLM (tests/test_model.py).

One module serves training, prefill and decoding. What differs between them is only where attention gets its keys and
values, so `forward` takes that as an argument: `attend(layer, q, k, v)` is `causal_attention` in training and a method
of a KV cache in rollout.py while sampling.

Left out: dropout and sliding windows (no dense Qwen2.5 uses them), long-context rope scaling, and everything for
other architectures. Loading and saving Hugging Face folders is model_folder.py's work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# attend(layer index, q, k, v) -> attention output; q and the output are (B, query heads, T, D), k and v
# (B, kv heads, T, D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]  # cos and signed sin of the rotary angles, fp32, each (B, T, 1, D)


@dataclass(frozen=True)
class Qwen2Config:
    """The shape of a model: what decides its logits, under the names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


def rope_tables(config: Qwen2Config, positions: Tensor) -> Rope:
    """The rotary angles of positions (B, T): each token's place in its row."""
    dimension = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / config.rope_theta ** (dimension / config.head_dim)  # (D/2,)
    angle = positions[..., None, None].float() * frequency  # (B, T, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) of x (B, T, H, D).

    Dimension i is rotated together with dimension i + D/2, the pairing that Qwen's weights were trained with: rolling
    by half a head brings each dimension's partner to its place, and the sign of the rotation sits in `sin`.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position attends to itself and the positions before it: for training and prefill. Output (B, Hq, T, D).

    Rows are padded on the right, so no mask is needed: padding comes after every real token.
    """
    # in fp32 only the quadratic kernel shares K and V among query heads
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; its parameters have the names of a Hugging Face checkpoint."""

    def __init__(self, config: Qwen2Config, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, inner, bias=True)
        self.k_proj = nn.Linear(hidden, shared, bias=True)
        self.v_proj = nn.Linear(hidden, shared, bias=True)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        split = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(split), cos, sin).transpose(1, 2)  # (B, Hq, T, D)
        k = rotate(self.k_proj(x).view(split), cos, sin).transpose(1, 2)  # (B, Hkv, T, D)
        v = self.v_proj(x).view(split).transpose(1, 2)  # (B, Hkv, T, D)
        mixed = attend(self.index, q, k, v)  # (B, Hq, T, D)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer block."""

    def __init__(self, config: Qwen2Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The policy: token ids in, hidden states out; `logits` applies the head to the positions asked for.

    `vocabulary` is the number of ids that the tokenizer knows. Qwen pads its embedding to more rows than that.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vocabulary = config.vocab_size
        self.dtype = torch.float32  # to compute in; weights sharded by FSDP2 are stored in fp32
        self.checkpoint_layers = False  # in training: backward computes each layer again

    @property
    def head(self) -> Tensor:
        """The output matrix, (V, hidden): the embedding's own weights where the model ties them."""
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(self, tokens: Tensor, rope: Rope | None = None, attend: Attend = causal_attention) -> Tensor:
        """Hidden states (B, T, hidden) after the last norm, for token ids (B, T).

        rope: of each token's position, from `rope_tables`; None counts the positions from zero.
        """
        if rope is None:
            rope = rope_tables(self.config, torch.arange(tokens.shape[1], device=tokens.device)[None])
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, *rope, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, *rope, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits (N, V) in fp32 of hidden states (N, hidden); -inf for the padding ids past `vocabulary`.

        head: `self.head`, which a caller may have widened to fp32 already.

        The padding rows are computed all the same: without them the matmul's width would be odd (151,665), and
        no fast bf16 kernel takes that.
        """
        logits = wide_matmul(hidden, self.head if head is None else head)  # (N, V)
        with torch.no_grad():  # their probability is 0, and so is their gradient
            logits[:, self.vocabulary :].fill_(-torch.inf)
        return logits

    def hf_tensors(self) -> dict[str, Tensor]:
        """The weights under the names that they have in a Hugging Face checkpoint; to copy into one is to load it."""
        named = self.state_dict().items()
        return {n if n.startswith("lm_head") else f"model.{n}": weight for n, weight in named}


def wide_matmul(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (N, hidden) @ head (V, hidden).T with fp32 sums and an fp32 result.

    Logits rounded to bf16 would move each logprob by up to 0.06, more than a policy update does. CUDA can return the
    fp32 sums of a bf16 matmul; elsewhere both sides are widened first.
    """
    if head.dtype == torch.float32 or hidden.device.type == "cpu":
        return hidden.float() @ head.float().t()
    return WideMatmul.apply(hidden, head)


class WideMatmul(torch.autograd.Function):
    """A bf16 matmul whose fp32 sums are kept. torch has this matmul but not its gradient."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Tensor) -> Tensor:
        context.save_for_backward(hidden, head)
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, head = context.saved_tensors
        gradient = gradient.to(hidden.dtype)  # (N, V)
        return gradient @ head, gradient.t() @ hidden
