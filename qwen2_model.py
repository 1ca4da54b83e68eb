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


def rope_tables(config: Qwen2Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin of the rotary angles, fp32, each (B, T, 1, D), for positions (B, T)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (D/2,)
    angle = positions[:, :, None, None].float() * frequency
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
    if q.is_cuda and q.dtype == torch.float32:  # only the quadratic fp32 kernel shares K and V among query heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Layer(nn.Module):
    """One transformer block. q, k and v (and gate and up) share one matrix: one large matmul instead of three."""

    def __init__(self, config: Qwen2Config, index: int) -> None:
        super().__init__()
        self.index, self.heads, self.kv_heads = index, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        self.input_norm = nn.RMSNorm(hidden, config.rms_norm_eps)  # x / rms(x) * weight, in fp32 inside
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=True)
        self.out = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.input_norm(x)).view(batch, length, -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)  # (B, T, H, D)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        mixed = attend(self.index, q, k, v)  # (B, Hq, T, D)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Qwen2(nn.Module):
    """The policy: token ids in, hidden states out; `logits` applies the head to the positions asked for.

    `vocabulary` is the number of ids that the tokenizer knows. Qwen pads its embedding to more rows than that.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.untied_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.vocabulary = config.vocab_size
        self.checkpoint_layers = False  # recompute each layer in backward instead of keeping its activations

    @property
    def head(self) -> Tensor:
        """The output matrix, (V, hidden): the embedding's own weights where the model ties them."""
        return self.embed.weight if self.config.tie_word_embeddings else self.untied_head

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        """Hidden states (B, T, hidden) after the last norm, for token ids (B, T).

        positions (B, T) are each token's place in its row; None counts from zero.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = rope_tables(self.config, positions)
        x = self.embed(tokens)
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) in fp32 of hidden states (N, hidden); -inf for the padding ids past `vocabulary`.

        The padding rows are computed all the same: without them the matmul's width would be odd (151,665), and
        no fast bf16 kernel takes that.
        """
        logits = wide_matmul(hidden, self.head)  # (N, V)
        with torch.no_grad():  # their probability is 0, and so is their gradient
            logits[:, self.vocabulary :].fill_(-torch.inf)
        return logits

    def hf_tensors(self) -> dict[str, Tensor]:
        """Views of this module's parameters under the names and shapes of a Hugging Face checkpoint.

        Copying into a view loads, reading from it saves: the fused matrices never show outside.
        """
        tensors = {"model.embed_tokens.weight": self.embed.weight, "model.norm.weight": self.norm.weight}
        if not self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = self.untied_head
        for layer in self.layers:
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{layer.index}"
            sizes = [heads * layer.head_dim for heads in (layer.heads, layer.kv_heads, layer.kv_heads)]
            weights, biases = layer.qkv.weight.split(sizes), layer.qkv.bias.split(sizes)
            for name, weight, bias in zip("qkv", weights, biases, strict=True):
                tensors[f"{prefix}.self_attn.{name}_proj.weight"] = weight
                tensors[f"{prefix}.self_attn.{name}_proj.bias"] = bias
            gate, up = layer.gate_up.weight.chunk(2)
            tensors[f"{prefix}.self_attn.o_proj.weight"] = layer.out.weight
            tensors[f"{prefix}.mlp.gate_proj.weight"] = gate
            tensors[f"{prefix}.mlp.up_proj.weight"] = up
            tensors[f"{prefix}.mlp.down_proj.weight"] = layer.down.weight
            tensors[f"{prefix}.input_layernorm.weight"] = layer.input_norm.weight
            tensors[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm.weight
        return {name: tensor.detach() for name, tensor in tensors.items()}


def wide_matmul(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (N, hidden) @ head (V, hidden).T with fp32 sums and an fp32 result.

    Logits rounded to bf16 would move each logprob by up to 0.06, more than a policy update does. CUDA can return the
    fp32 sums of a bf16 matmul; elsewhere both sides are widened first.
    """
    if hidden.dtype == torch.float32 or hidden.device.type in ("cpu", "mps"):
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
