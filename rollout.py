"""Sampling groups of answers with a KV cache: most of a GRPO step's time, so four ideas keep it short.

1. A question is prefilled once and its keys and values are copied to the G rows of its group.
2. A row that has ended leaves the batch: a living row from the end of the batch moves into its place.
3. The query heads that share a kv head are folded into the query length, so K and V are never repeated.
4. On CUDA the decode steps are replayed from CUDA graphs, and the host looks at the result once every few tokens.

What a row samples never depends on its neighbours. Each row has its own uniform numbers, one a position, drawn before
sampling starts, and a token is the inverse CDF of its number: so compaction, waves and the order of rows change no
answer (but for the last bits of floating point, which a product may round differently in a batch of another size).

Left out: continuous batching across questions, paged caches and speculative decoding; a training step knows all its
rows up front, so there is no queue to serve.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2_model import Qwen2, causal_attention, head_logits

CHECK_EVERY = {"cuda": 16, "cpu": 2, "mps": 16}  # tokens between two looks at which rows have ended: a GPU waits for it


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Answer:
    """One sampled answer: its ids (the end token included), their logprobs, and whether it ended by itself."""

    question: int
    ids: list[int]
    logprobs: list[float]
    ended: bool


def warp(logits: Tensor, sampling: Sampling, keep: Tensor | None = None) -> Tensor:
    """Logits (rows, V) of the distribution that `sampling` draws from: tempered, what top-k and top-p cut at -inf.

    The trainer calls this too, so sampler and trainer speak of the same distribution. `keep` (rows,) are tokens
    that are never cut: those already drawn, which rounding could push over the edge of the top-p set.
    """
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    if not 0 < sampling.top_k < logits.shape[-1] and sampling.top_p == 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # (rows, V), likeliest first
    out = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k:
        out[:, sampling.top_k :] = True
    probability = ordered.masked_fill(out, -torch.inf).softmax(dim=-1)
    out |= probability.cumsum(dim=-1) - probability >= sampling.top_p  # what stands before it is enough already
    cut = torch.zeros_like(out).scatter(-1, order, out)
    if keep is not None:
        cut = cut.scatter(-1, keep[:, None], False)
    return logits.masked_fill(cut, -torch.inf)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens (rows,) and their logprobs (rows,) from fp32 logits (rows, V) and uniform numbers (rows,) in [0, 1).

    Inverse CDF: the token whose stretch of the cumulated probability holds the row's number.
    """
    probability = warp(logits, sampling).softmax(dim=-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = probability.cumsum(dim=-1)
        total = cdf[:, -1:]
        # below the total by at least one float, so that rounding never lands past the last possible token
        point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        # clamped for logits that are nan: the trainer finds them by their logprobs, an index outside would crash a GPU
        tokens = torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
        if sampling.top_k or sampling.top_p < 1.0:
            # a GPU sums in a tree, so a cdf may rise a little where the probability is zero: no token to take
            possible = probability.gather(-1, tokens[:, None])[:, 0] > 0
            tokens = torch.where(possible, tokens, probability.argmax(dim=-1))
    return tokens, probability.gather(-1, tokens[:, None])[:, 0].log()


class KVCache:
    """Keys and values of every row, aligned so that all rows write their next token to the same column.

    Prompts end at the same column and so start at different ones; `start` (rows,) is each row's first real column.
    """

    def __init__(self, model: Qwen2, rows: int, prompt_lengths: Tensor, columns: int) -> None:
        config, weight = model.config, model.embed.weight
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, columns, config.head_dim)
        # zeros: a graph reads columns before they are written, and a nan there spreads even with the weight 0
        self.data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.prompt_columns = int(prompt_lengths.max())
        self.prompt_lengths = prompt_lengths  # (questions,)
        self.group = rows // len(prompt_lengths)
        self.start = (self.prompt_columns - prompt_lengths).repeat_interleave(self.group)
        self.column = torch.tensor([self.prompt_columns], device=weight.device)  # where the next token goes
        self.columns = torch.arange(columns, device=weight.device)
        self.mask = torch.empty(0)

    def attend_prompt(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within the prompts (questions, H, P, D); their keys and values go to each group's rows."""
        shift = (self.prompt_columns - self.prompt_lengths)[:, None]  # right-padded in, aligned at the end out
        source = (self.columns[None, : self.prompt_columns] - shift).clamp(min=0)[:, None, :, None]
        for kind, tensor in enumerate((k, v)):
            aligned = tensor.take_along_dim(source, dim=2)
            self.data[layer, kind, :, :, : self.prompt_columns] = aligned.repeat_interleave(self.group, dim=0)
        return causal_attention(layer, q, k, v)

    def look_at(self, rows: int, columns: int) -> None:
        """Prepare one decode step of the first `rows` rows that reads the first `columns` columns."""
        seen = self.columns[:columns]
        hidden = (seen < self.start[:rows, None]) | (seen > self.column)
        # as numbers to add: attention would make them of booleans once a layer
        mask = torch.zeros(hidden.shape, dtype=self.data.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        self.mask = mask[:, None, None]  # (rows, 1, 1, columns)

    def attend_new(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token a row (rows, H, 1, D) over all that is cached, itself included."""
        rows, columns = self.mask.shape[0], self.mask.shape[-1]
        keys, values = self.data[layer, :, :rows]
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        # q heads of one group become query positions: K and V are read once for all of them
        folded = q.view(rows, keys.shape[1], -1, q.shape[-1])
        keys, values = keys[:, :, :columns], values[:, :, :columns]
        return F.scaled_dot_product_attention(folded, keys, values, attn_mask=self.mask).reshape(q.shape)

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy rows `source` over rows `target`, the first `columns` columns of each."""
        for layer in self.data:  # one after the other: the rows on their way are a copy
            layer[:, target, :, :columns] = layer[:, source, :, :columns]
        self.start[target] = self.start[source]


class Decoder:
    """The batch while it is being decoded: slot i works on answer `rows[i]`; the first `active` slots are in use."""

    def __init__(self, model: Qwen2, cache: KVCache, uniforms: Tensor, end_ids: Tensor, vocabulary: int,
                 sampling: Sampling) -> None:
        count, length = uniforms.shape
        device = uniforms.device
        self.model, self.cache, self.sampling, self.uniforms = model, cache, sampling, uniforms
        self.end_ids, self.head = end_ids, model.head[:vocabulary]  # ids past the tokenizer's are never computed
        self.rows = torch.arange(count, device=device)
        self.position = cache.prompt_lengths.repeat_interleave(cache.group)  # of the next token, (slots,)
        self.alive = torch.ones(count, dtype=torch.bool, device=device)
        self.last = torch.zeros(count, dtype=torch.long, device=device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(count, length, dtype=torch.long, device=device)  # by answer, not by slot
        self.logprobs = torch.zeros(count, length, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.active = count

    def record(self, logits: Tensor) -> None:
        """Draw each active slot's next token from logits (active, V) and write it down; no host synchronisation."""
        n, rows = len(logits), self.rows[: len(logits)]
        tokens, logprobs = draw(logits, self.uniforms[rows, self.step_index], self.sampling)
        self.tokens[rows, self.step_index] = tokens
        self.logprobs[rows, self.step_index] = logprobs
        self.lengths[rows] += self.alive[:n]
        self.alive[:n] &= ~(tokens[:, None] == self.end_ids).any(dim=-1)
        self.last[:n] = tokens
        self.step_index += 1

    def step(self, n: int, columns: int) -> None:
        """One token for the first n slots, attending to the first `columns` columns."""
        self.cache.look_at(n, columns)
        hidden = self.model(self.last[:n, None], self.position[:n, None], self.cache.attend_new)  # (n, 1, hidden)
        self.position[:n] += 1
        self.cache.column += 1
        self.record(head_logits(hidden[:, 0], self.head))

    def drop_finished(self) -> None:
        """Rows that ended leave: living rows from the end of the batch move into their slots.

        Only the moved rows are copied, each once, about the price of two decode steps of that row.
        """
        alive = self.alive[: self.active]
        count = int(alive.sum())
        holes = (~alive[:count]).nonzero()[:, 0]
        movers = count + alive[count:].nonzero()[:, 0]
        if len(holes):
            self.cache.move(movers, holes, int(self.cache.column))
            self.rows[holes], self.rows[movers] = self.rows[movers], self.rows[holes]  # each answer keeps one slot
            for per_slot in (self.position, self.last, self.alive):
                per_slot[holes] = per_slot[movers]
            self.alive[movers] = False
        self.active = count


class GraphedSteps:
    """Decode steps on CUDA, recorded once as a CUDA graph and replayed.

    A step of a 36-layer model is about a thousand kernels; launched one by one from Python they would take longer to
    launch than to run. A graph has fixed shapes, so rows and columns are rounded up to buckets: slots whose answer has
    ended and columns still empty ride along. The graphs of one rollout share a memory pool and go with it.
    """

    ROWS, COLUMNS = 32, 128

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def step(self, rows: int, columns: int) -> None:
        rows = min(math.ceil(rows / self.ROWS) * self.ROWS, len(self.decoder.rows))
        columns = min(math.ceil(columns / self.COLUMNS) * self.COLUMNS, len(self.decoder.cache.columns))
        bucket = (rows, columns)
        if bucket not in self.graphs:
            self.graphs[bucket] = None  # the first step of a bucket runs as usual: it warms the kernels up
            self.decoder.step(rows, columns)
            return
        graph = self.graphs[bucket]
        if graph is None:
            graph = self.graphs[bucket] = torch.cuda.CUDAGraph()
            # recording runs nothing; where it runs out of memory, the outer `with` puts the stream back
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                self.decoder.step(rows, columns)
        graph.replay()


@torch.inference_mode()
def generate(model: Qwen2, prompts: Sequence[Sequence[int]], uniforms: Tensor, end_ids: Sequence[int],
             vocabulary: int, sampling: Sampling, cache_bytes: float = math.inf, compact: bool = True,
             graphs: bool = True, on_tokens: Callable[[int], object] = lambda count: None) -> list[Answer]:
    """Sample answers to `prompts`, as many to each as there are rows of uniform numbers for it.

    uniforms: (questions * group, max_new_tokens) fp32 in [0, 1), the rows of one question together. vocabulary: how
    many ids the tokenizer knows. cache_bytes: the most that keys and values may take; the questions are split into
    waves that fit, and where not even one group does, the groups too. on_tokens is told how many tokens have been
    sampled since it was last called. Raises ValueError for prompts or numbers of a shape that makes no sense.
    """
    if not prompts or not all(prompts) or not uniforms.numel() or len(uniforms) % len(prompts):
        raise ValueError(f"{len(prompts)} prompts of lengths {sorted({*map(len, prompts)})} do not go with uniform "
                         f"numbers of shape {tuple(uniforms.shape)}")
    group = len(uniforms) // len(prompts)
    row_bytes = cache_bytes_per_row(model, max(map(len, prompts)) + uniforms.shape[1])
    rows = max(1.0, cache_bytes / row_bytes)  # at a time
    parts = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= rows)
    prompts = [prompt for prompt in prompts for _ in range(parts)]  # each part of a group prefills its prompt
    group //= parts
    wave = int(min(len(prompts), rows / group))  # prompts at a time
    answers = []
    for first in range(0, len(prompts), wave):
        numbers = uniforms[first * group : (first + wave) * group]
        # no name for the wave's decoder: it would keep this wave's cache alive while the next one gets its own
        answers += collect(decode(model, prompts[first : first + wave], numbers, end_ids, vocabulary, sampling, compact,
                                  graphs, on_tokens), first * group, group * parts, end_ids)
    return answers


def cache_bytes_per_row(model: Qwen2, columns: int) -> int:
    """Bytes of keys and values of one row of `columns` tokens."""
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * columns * model.embed.weight.element_size()


def decode(model: Qwen2, prompts: Sequence[Sequence[int]], uniforms: Tensor, end_ids: Sequence[int], vocabulary: int,
           sampling: Sampling, compact: bool, graphs: bool, on_tokens: Callable[[int], object]) -> Decoder:
    """One wave, from its prompts to the Decoder that holds its answers."""
    device = model.embed.weight.device
    uniforms = uniforms.to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)  # (questions, P)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    padded, lengths = padded.to(device), lengths.to(device)
    max_new = uniforms.shape[1]
    cache = KVCache(model, len(uniforms), lengths, padded.shape[1] + max_new)
    decoder = Decoder(model, cache, uniforms, torch.tensor(list(end_ids), device=device), vocabulary, sampling)

    hidden = model(padded, attend=cache.attend_prompt)  # (questions, P, hidden)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    decoder.record(head_logits(last, decoder.head).repeat_interleave(cache.group, dim=0))
    step = GraphedSteps(decoder).step if graphs and device.type == "cuda" else decoder.step
    on_tokens(len(uniforms))
    sampled, counted, check_every = 1, len(uniforms), CHECK_EVERY[device.type]
    while sampled < max_new and decoder.active:
        burst = min(check_every, max_new - sampled)
        for _ in range(burst):
            step(decoder.active, cache.prompt_columns + sampled)
            sampled += 1
        written = int(decoder.lengths.sum())  # not what rows computed after their end
        on_tokens(written - counted)
        counted = written
        if compact or not decoder.alive.any():
            decoder.drop_finished()
    return decoder


def collect(decoder: Decoder, first_row: int, group: int, end_ids: Sequence[int]) -> list[Answer]:
    """The answers on the host, cut at their lengths; `first_row` is the place of the first among all rows."""
    tokens, logprobs = decoder.tokens.tolist(), decoder.logprobs.tolist()
    answers = []
    for row, length in enumerate(decoder.lengths.tolist()):
        ids = tokens[row][:length]
        answers.append(Answer((first_row + row) // group, ids, logprobs[row][:length], ids[-1] in end_ids))
    return answers
