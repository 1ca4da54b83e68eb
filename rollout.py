"""Sampling groups of responses with a KV cache: most of a GRPO step's time, so four ideas keep it short.

1. A prompt is prefilled once, and its keys and values are copied to the G rows of its group.
2. A row that has ended leaves the batch: an active row from the end of the batch moves into its place.
3. The query heads that share a kv head are folded into the query length, so K and V are never repeated.
4. On CUDA the decode steps are replayed from CUDA graphs, and the CPU synchronizes only once every few tokens.

What a row samples never depends on its neighbours. Each row has its own uniform random numbers, one per position, drawn
before sampling starts, and a token is the inverse CDF of its number. So the order of rows, waves and rows that leave
change no response (except for the last bits of floating point, which a matmul may round differently in a batch of
another size).

    sampler = Sampler(policy, tokenizer.end_ids)
    responses = sampler.generate(prompts, uniforms, Sampling(temperature=1.0))  # len(uniforms) of them

Left out: continuous batching, paged caches and speculative decoding. A training step knows all its rows up front, so
there is no queue to serve.
"""

import math
import sys
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_types import Sampling
from qwen2_model import Qwen2, causal_attention
from terminal import progress_bar, warn

PREFILL_TOKENS = 4096  # prompt tokens in one forward pass: their activations would grow without bound
COLUMN_BLOCK = 128  # cache columns come in blocks, so that graphs are few and the mask is aligned as kernels want it
ROW_BLOCK = 32  # likewise the rows of a graph


class Response(NamedTuple):
    """One sampled response: its ids (the end token included), their logprobs, and whether the limit truncated it."""

    ids: list[int]
    logprobs: list[float]
    truncated: bool

    @property
    def text_ids(self) -> list[int]:
        """Without the end token."""
        return self.ids if self.truncated else self.ids[:-1]


# ---- From logits to a token ----------------------------------------------------------------------------------


def warp(logits: Tensor, sampling: Sampling, keep: Tensor | None = None) -> Tensor:
    """Logits (N, V) of the distribution that `sampling` draws from: tempered, -inf outside top-k and top-p.

    The trainer calls this too, so sampler and trainer mean the same distribution. `keep` (N,) are tokens that always
    stay: those already drawn, which rounding could push over the edge of the top-p set.
    """
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p == 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # (N, V), most likely first
    out = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        out[:, sampling.top_k :] = True
    probability = ordered.masked_fill(out, -torch.inf).softmax(dim=-1)
    out |= probability.cumsum(dim=-1) - probability >= sampling.top_p  # the tokens before it reach top_p already
    removed = torch.zeros_like(out).scatter(-1, order, out)
    if keep is not None:
        removed = removed.scatter(-1, keep[:, None], False)
    return logits.masked_fill(removed, -torch.inf)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens (N,) and their logprobs (N,) from fp32 logits (N, V) and uniform numbers (N,) in [0, 1): inverse CDF."""
    probability = warp(logits, sampling).softmax(dim=-1)  # (N, V)
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = probability.cumsum(dim=-1)
        total = cdf[:, -1:]
        # below the total by at least one float, so that rounding never lands past the last possible token
        point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        # clamped for nan logits: the trainer notices them by their logprobs, an index out of range would crash a GPU
        tokens = torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
        # a GPU sums in a tree, so a CDF may rise a little where the probability is zero: never take such a token
        possible = probability.gather(-1, tokens[:, None])[:, 0] > 0
        tokens = torch.where(possible, tokens, probability.argmax(dim=-1))
    return tokens, probability.gather(-1, tokens[:, None])[:, 0].log()


# ---- The KV cache ----------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every row, aligned so that all rows write their next token to the same column.

    Prompts end at the same column and so start at different ones: `start` (rows,) is each row's first real column.
    """

    def __init__(self, policy: Qwen2, prompt_lengths: list[int], group: int, max_new: int) -> None:
        config, weight = policy.config, policy.head
        self.group, self.prompt_columns = group, max(prompt_lengths)
        rows, columns = len(prompt_lengths) * group, round_up(self.prompt_columns + max_new, COLUMN_BLOCK)
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, columns, config.head_dim)
        # zeros: a graph reads columns before they are written, and a nan there would spread even with weight 0
        self.data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)  # (L, 2, rows, Hkv, columns, D)
        starts = [self.prompt_columns - length for length in prompt_lengths for _ in range(group)]
        self.start = torch.tensor(starts, device=weight.device)  # (rows,)
        self.column = torch.tensor([self.prompt_columns], device=weight.device)  # where the next token goes
        self.columns = torch.arange(columns, device=weight.device)
        self.mask = torch.empty(0)

    def select_prompts(self, first: int, lengths: list[int]) -> None:
        """Prepare the prefill of the prompts from index `first` on: where each token's keys and values go."""
        self.rows = slice(first * self.group, (first + len(lengths)) * self.group)
        shift = self.prompt_columns - torch.tensor(lengths, device=self.data.device)[:, None]
        # padded on the right where they are computed, on the left where they are stored: (prompts, 1, P, 1)
        self.source = (self.columns[None, : self.prompt_columns] - shift).clamp(min=0)[:, None, :, None]

    def attend_prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Prefill: causal attention within the prompts (prompts, H, P, D); K and V are written to each group's rows."""
        for kind, tensor in enumerate((k, v)):
            aligned = tensor.take_along_dim(self.source, dim=2)  # (prompts, Hkv, P, D)
            copies = aligned.repeat_interleave(self.group, dim=0)  # (rows, Hkv, P, D)
            self.data[layer, kind, self.rows, :, : self.prompt_columns] = copies
        return causal_attention(layer, q, k, v)

    def mask_columns(self, rows: int, columns: int) -> None:
        """Prepare one decode step of the first `rows` rows that reads the first `columns` columns."""
        seen = self.columns[:columns]
        hidden = (seen < self.start[:rows, None]) | (seen > self.column)  # (rows, columns)
        # as numbers to add: attention would convert booleans again in every layer
        mask = torch.zeros(hidden.shape, dtype=self.data.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        self.mask = mask[:, None, None]  # (rows, 1, 1, columns)

    def attend_new(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Decode: one new token per row (rows, H, 1, D) is written, then attends to all that is cached."""
        rows, columns = self.mask.shape[0], self.mask.shape[-1]
        keys, values = self.data[layer, :, :rows]
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        # the query heads of one kv head become query positions: K and V are read once for all of them
        folded = q.view(rows, keys.shape[1], -1, q.shape[-1])  # (rows, Hkv, Hq / Hkv, D)
        keys, values = keys[:, :, :columns], values[:, :, :columns]
        return F.scaled_dot_product_attention(folded, keys, values, attn_mask=self.mask).reshape(q.shape)

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy rows `source` over rows `target`, the first `columns` columns of each."""
        for layer in self.data:  # layer by layer: the rows in transit are a copy
            layer[:, target, :, :columns] = layer[:, source, :, :columns]
        self.start[target] = self.start[source]


def round_up(count: int, block: int) -> int:
    return math.ceil(count / block) * block


# ---- Prefill and decode ----------------------------------------------------------------------------------------


class Decoder:
    """The batch while it is decoded: slot i works on response `rows[i]`, and the first `active` slots are in use."""

    def __init__(self, policy: Qwen2, cache: KVCache, uniforms: Tensor, end_ids: list[int], sampling: Sampling) -> None:
        (count, length), device = uniforms.shape, uniforms.device
        self.policy, self.cache, self.uniforms, self.sampling = policy, cache, uniforms, sampling
        on_cpu = device.type == "cpu"
        self.head = policy.head.float() if on_cpu else policy.head  # once: at every step it would take half the time
        self.end_ids = torch.tensor(end_ids, device=device)
        self.rows = torch.arange(count, device=device)
        self.alive = torch.ones(count, dtype=torch.bool, device=device)  # (slots,) like the next one
        self.last = torch.zeros(count, dtype=torch.long, device=device)
        self.tokens = torch.zeros(count, length, dtype=torch.long, device=device)  # by response, not by slot
        self.logprobs = torch.zeros(count, length, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.active = count

    def prefill(self, prompts: list[list[int]]) -> None:
        """Fill the cache with the prompts, some at a time, and draw every row's first token."""
        at_once = max(1, PREFILL_TOKENS // self.cache.prompt_columns)
        last = []
        for first in range(0, len(prompts), at_once):
            part = prompts[first : first + at_once]
            lengths = [len(prompt) for prompt in part]
            padded = torch.tensor([[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in part])  # (prompts, P)
            self.cache.select_prompts(first, lengths)
            hidden = self.policy(padded.to(self.rows.device), attend=self.cache.attend_prompt)  # (prompts, P, hidden)
            ends = torch.tensor([len(hidden[0]) * row + length - 1 for row, length in enumerate(lengths)])
            last.append(hidden.flatten(0, 1)[ends.to(hidden.device)])
        self.record(self.policy.logits(torch.cat(last), self.head).repeat_interleave(self.cache.group, dim=0))

    def record(self, logits: Tensor) -> None:
        """Draw each active slot's next token from logits (active, V) and write it down, without synchronizing."""
        n, rows = len(logits), self.rows[: len(logits)]
        place = self.cache.column - self.cache.prompt_columns  # (1,), in the response
        tokens, logprobs = draw(logits, self.uniforms[rows, place], self.sampling)
        self.tokens[rows, place] = tokens
        self.logprobs[rows, place] = logprobs
        self.lengths[rows] += self.alive[:n]
        self.alive[:n] &= ~(tokens[:, None] == self.end_ids).any(dim=-1)
        self.last[:n] = tokens

    def step(self, n: int, columns: int) -> None:
        """One token for the first n slots, attending to the first `columns` columns."""
        self.cache.mask_columns(n, columns)
        positions = self.cache.column - self.cache.start[:n, None]  # (n, 1)
        hidden = self.policy(self.last[:n, None], positions, self.cache.attend_new)  # (n, 1, hidden)
        self.cache.column += 1
        self.record(self.policy.logits(hidden[:, 0], self.head))

    def drop_finished(self) -> None:
        """Rows that ended leave: active rows from the end of the batch move into their slots.

        Only the rows that move are copied, each once, at about the price of two decode steps of that row.
        """
        alive = self.alive[: self.active]
        count = int(alive.sum())
        holes = (~alive[:count]).nonzero()[:, 0]
        movers = count + alive[count:].nonzero()[:, 0]
        if len(holes):
            self.cache.move(movers, holes, int(self.cache.column))
            self.rows[holes], self.rows[movers] = self.rows[movers], self.rows[holes]  # each response keeps one slot
            self.last[holes] = self.last[movers]
            self.alive[holes], self.alive[movers] = True, False
        self.active = count

    def responses(self) -> list[Response]:
        """What has been sampled, on the CPU, up to each response's length."""
        ends, tokens, logprobs = self.end_ids.tolist(), self.tokens.tolist(), self.logprobs.tolist()
        responses = []
        for row, length in enumerate(self.lengths.tolist()):
            ids = tokens[row][:length]
            responses.append(Response(ids, logprobs[row][:length], truncated=ids[-1] not in ends))
        return responses


class GraphedSteps:
    """Decode steps on CUDA, captured once as a CUDA graph and replayed.

    A step of a 36-layer model is many hundred kernels; launched one by one from Python they would take longer to
    launch than to run. A graph has fixed shapes, so rows and columns are rounded up to blocks: finished rows and empty
    columns ride along. The graphs of one rollout share a memory pool and are freed with it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.refused = ""  # why CUDA could not capture a graph

    def step(self, rows: int, columns: int) -> None:
        rows = min(round_up(rows, ROW_BLOCK), len(self.decoder.rows))
        shape = (rows, round_up(columns, COLUMN_BLOCK))
        graph = self.graphs.get(shape)
        if graph is None and shape in self.graphs and not self.refused:
            graph = self.graphs[shape] = self.capture(shape)
        if graph is None:
            self.graphs[shape] = None  # the first step of a shape runs as usual: it warms the kernels up
            self.decoder.step(*shape)
        else:
            graph.replay()

    def capture(self, shape: tuple[int, int]) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, which is not run for it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # where capturing fails, the outer `with` puts the stream back
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                self.decoder.step(*shape)
        except RuntimeError as error:
            with suppress(RuntimeError):  # torch 2.11 forgets this when a capture fails (pytorch issue 180395)
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            if "captur" not in str(error):
                raise
            self.refused = str(error).partition("\n")[0]
            return None
        return graph


class Sampler:
    """Samples responses from a policy."""

    def __init__(self, policy: Qwen2, end_ids: list[int]) -> None:
        self.policy, self.end_ids = policy, end_ids
        self.graphs = policy.head.is_cuda
        # decode steps between checks for finished rows
        self.steps_per_check = 2 if policy.head.device.type == "cpu" else 16

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling, max_rows: int = sys.maxsize
    ) -> list[Response]:
        """One response per row of uniform numbers; the rows of a prompt's group are adjacent.

        uniforms: (prompts * group, max_new_tokens) fp32 in [0, 1). More than `max_rows` rows are sampled in waves of
        whole groups, a single group at least.
        """
        group, rest = divmod(len(uniforms), len(prompts))
        assert rest == 0, f"{len(uniforms)} rows of uniform numbers are not a multiple of {len(prompts)} prompts"
        assert all(prompts), "a prompt is empty"
        at_once = max(1, max_rows // group)  # prompts per wave
        responses: list[Response] = []
        for first in range(0, len(prompts), at_once):
            wave = uniforms[first * group : (first + at_once) * group]
            responses += self.decode(prompts[first : first + at_once], wave, sampling)
        return responses

    def decode(self, prompts: list[list[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        """One wave. Its cache is gone when this returns, before the next wave makes its own."""
        rows, max_new = uniforms.shape
        cache = KVCache(self.policy, [len(prompt) for prompt in prompts], rows // len(prompts), max_new)
        decoder = Decoder(self.policy, cache, uniforms.to(cache.start.device), self.end_ids, sampling)
        graphed = GraphedSteps(decoder) if self.graphs else None
        step = graphed.step if graphed else decoder.step
        decoder.prefill(prompts)
        sampled = 1
        with progress_bar("sampling", " tokens") as bar:
            while sampled < max_new and decoder.active:
                for _ in range(min(self.steps_per_check, max_new - sampled)):
                    step(decoder.active, cache.prompt_columns + sampled)
                    sampled += 1
                decoder.drop_finished()
                bar.update(int(decoder.lengths.sum()) - bar.n)
        if graphed and graphed.refused:
            self.graphs = False
            warn(f"decoding without CUDA graphs, more slowly: {graphed.refused}")
        return decoder.responses()
