"""Sampling groups of responses with a KV cache: most of a GRPO step's time, so four ideas keep it short.

1. A prompt is prefilled once, and its keys and values are copied to the G rows of its group.
2. Rows that have ended leave the batch: it is compacted, active rows from its end move into their places.
3. The query heads that share a kv head are folded into the query length, so K and V are never repeated.
4. On CUDA the decode steps are replayed from CUDA graphs, and the CPU synchronizes only once every few tokens.

What a row samples never depends on its neighbours. Each row has its own uniform random numbers, one per position,
drawn before sampling starts, and a token is the inverse CDF of its number. So the order of rows, waves and compaction
change no response (except for the last bits of floating point, which a matmul may round differently in a batch of
another size).

    sampler = Sampler(policy, tokenizer, task, max_new_tokens=256, rows_at_a_time=Limit("rows", 512))
    episodes = sampler.rollout(problems, group_size=16, temperature=1.0, generator=generator)

Left out: continuous batching, paged caches and speculative decoding (a training step knows all its rows up front, so
there is no queue to serve), top-k and top-p (the ratio would compare two different distributions).
"""

import math
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_types import COLUMN_BLOCK, PREFILL_TOKENS, Episode
from plumbing.memory import Limit
from plumbing.ranks import all_gather, shard_of, unsharded_copy
from plumbing.tasks import Task
from plumbing.terminal import one_line, progress_bar, warn_once
from qwen2_model import Qwen2, causal_attention, rope_tables
from tokenizer import Tokenizer

ROW_BLOCK = 32  # rows of a CUDA graph come in blocks, as cache columns do


# ---- From problems to episodes -------------------------------------------------------------------------------


class Response(NamedTuple):
    """One sampled response: its ids (the end token included), their logprobs, and whether the limit truncated it."""

    ids: list[int]
    logprobs: list[float]
    truncated: bool


class Sampler:
    """Samples the policy's responses to problems of a task."""

    def __init__(
        self, policy: Qwen2, tokenizer: Tokenizer, task: Task, max_new_tokens: int, rows_at_a_time: Limit
    ) -> None:
        self.policy, self.tokenizer, self.task = policy, tokenizer, task
        self.max_new_tokens, self.rows_at_a_time = max_new_tokens, rows_at_a_time
        self.graphs = policy.head.is_cuda
        if self.graphs:  # holds what the first capture needs: with no byte free for it, torch aborts
            self.generator_state = torch.cuda.CUDAGraph()
            generator = torch.cuda.default_generators[policy.head.get_device()]
            self.generator_state.register_generator_state(generator)
        # decode steps between checks for rows that have ended
        self.steps_per_check = 2 if policy.head.device.type == "cpu" else 16

    def rollout(
        self, problems: list[Any], group_size: int, temperature: float, generator: torch.Generator
    ) -> list[Episode]:
        """`group_size` responses to each problem, not yet rewarded; those of a group are adjacent.

        Each rank samples its shard of the problems, in waves of whole groups that fit in memory.
        """
        prompts = [self.encode_prompt(problem) for problem in problems]
        uniforms = torch.rand(len(problems) * group_size, self.max_new_tokens, generator=generator)
        mine = shard_of(len(problems))
        rows = uniforms[mine.start * group_size : mine.stop * group_size]
        policy = unsharded_copy(self.policy)
        responses: list[Response] = []
        while len(responses) < len(rows):
            done = len(responses)
            left = prompts[mine][done // group_size :]
            # `attempt` adds the last argument, max_rows
            wave = partial(self.generate, policy, left, rows[done:], temperature)
            responses += self.rows_at_a_time.attempt(wave, least=group_size, size=len(rows) - done)
        episodes = []
        for row, (ids, logprobs, truncated) in enumerate(all_gather(responses)):
            question = row // group_size
            text = self.tokenizer.decode(ids if truncated else ids[:-1])
            episodes.append(Episode(problems[question], prompts[question], ids, logprobs, truncated, text))
        return episodes

    def encode_prompt(self, problem: Any) -> list[int]:
        return self.tokenizer.encode_prompt(self.task.question_text(problem), self.task.ASSISTANT_PREFIX)

    @torch.inference_mode()
    def generate(
        self, policy: Qwen2, prompts: list[list[int]], uniforms: Tensor, temperature: float, max_rows: int
    ) -> list[Response]:
        """One wave: the responses of the first prompts' groups, as many groups as fit in `max_rows` rows.

        uniforms: (prompts * group, longest response) fp32 in [0, 1); the rows of a prompt's group are adjacent.
        """
        group, limit = len(uniforms) // len(prompts), uniforms.shape[1]
        prompts = prompts[: max(1, max_rows // group)]
        uniforms = uniforms[: len(prompts) * group].to(policy.head.device)
        cache = KVCache(policy, [len(prompt) for prompt in prompts], group, limit, self.graphs)
        decoder = Decoder(policy, cache, uniforms, self.tokenizer.end_ids, temperature)
        steps = GraphedSteps(decoder) if self.graphs else decoder
        decoder.prefill(prompts)
        sampled = 1  # tokens per row, ended ones included
        with progress_bar("sampling", " tokens") as bar:
            while sampled < limit and decoder.active:
                for _ in range(min(self.steps_per_check, limit - sampled)):
                    steps.step(decoder.active, cache.prompt_columns + sampled)
                    sampled += 1
                decoder.compact()
                bar.update(int(decoder.lengths.sum()) - bar.n)
        return decoder.responses()


# ---- From logits to a token ----------------------------------------------------------------------------------


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits (N, V) of the distribution that is sampled from; the trainer's logprobs are those of the same one."""
    return logits / temperature if temperature not in (0.0, 1.0) else logits


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (N,) and their logprobs (N,) from fp32 logits (N, V) and uniform numbers (N,) in [0, 1): inverse CDF.

    Temperature 0 takes the most likely token.
    """
    probability = tempered(logits, temperature).softmax(dim=-1)  # (N, V)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        cdf = probability.cumsum(dim=-1)
        total = cdf[:, -1:]
        # below the total by at least one float, so that rounding never lands past the last possible token
        point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        # clamped for nan logits: the trainer sees them in the logprobs; an index out of range would crash a GPU
        tokens = torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
        # a GPU sums in a tree, so a CDF may rise a little where the probability is zero: never take such a token
        possible = probability.gather(-1, tokens[:, None])[:, 0] > 0
        tokens = torch.where(possible, tokens, probability.argmax(dim=-1))
    return tokens, probability.gather(-1, tokens[:, None])[:, 0].log()


# ---- The KV cache --------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every row, aligned so that all rows write their next token to the same column.

    Prompts end at the same column and so start at different ones: `start` (rows,) is each row's first real column.
    """

    def __init__(
        self, policy: Qwen2, prompt_lengths: list[int], group: int, max_new: int, graphs: bool = False
    ) -> None:
        config, weight = policy.config, policy.head
        self.group, self.prompt_columns = group, max(prompt_lengths)
        rows, columns = len(prompt_lengths) * group, round_up(self.prompt_columns + max_new, COLUMN_BLOCK)
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, columns, config.head_dim)
        # zeros: a graph reads columns before they are written, and a nan there would spread even with weight 0
        empty = torch.zeros if graphs else torch.empty
        self.data = empty(shape, dtype=weight.dtype, device=weight.device)
        starts = [self.prompt_columns - length for length in prompt_lengths for _ in range(group)]
        self.start = torch.tensor(starts, device=weight.device)  # (rows,)
        self.column = torch.tensor([self.prompt_columns], device=weight.device)  # of the next token
        self.columns = torch.arange(columns, device=weight.device)
        self.rope = rope_tables(config, self.columns)  # once: of every position that a row may reach

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
        mask = torch.zeros_like(hidden, dtype=self.data.dtype).masked_fill_(hidden, -torch.inf)
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
        return F.scaled_dot_product_attention(folded, keys, values, self.mask).reshape(q.shape)

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy rows `source` over rows `target`, the first `columns` columns of each."""
        for layer in self.data:  # indexing copies the rows: one layer's at a time
            layer[:, target, :, :columns] = layer[:, source, :, :columns]
        self.start[target] = self.start[source]


def round_up(count: int, block: int) -> int:
    return math.ceil(count / block) * block


# ---- Prefill and decode --------------------------------------------------------------------------------------


class Decoder:
    """The batch while it is decoded: slot i works on response `rows[i]`, and the first `active` slots are in use."""

    def __init__(
        self, policy: Qwen2, cache: KVCache, uniforms: Tensor, end_ids: list[int], temperature: float
    ) -> None:
        count, length = uniforms.shape
        self.policy, self.cache, self.uniforms, self.temperature = policy, cache, uniforms, temperature
        # on a CPU in fp32, once: converting it in every step would cost half of the step
        self.head = policy.head if uniforms.is_cuda else policy.head.float()
        with uniforms.device:
            self.end_ids = torch.tensor(end_ids)
            self.rows = torch.arange(count)
            self.alive = torch.ones(count, dtype=torch.bool)  # (slots,) like the next one
            self.last = torch.zeros(count, dtype=torch.long)
            self.tokens = torch.zeros(count, length, dtype=torch.long)  # by response, not by slot
            self.logprobs = torch.zeros(count, length, dtype=torch.float32)
            self.lengths = torch.zeros(count, dtype=torch.long)
        self.active = count

    def prefill(self, prompts: list[list[int]]) -> None:
        """Fill the cache with the prompts, some at a time, and draw every row's first token."""
        at_once, last = max(1, PREFILL_TOKENS // self.cache.prompt_columns), []
        for first in range(0, len(prompts), at_once):
            part = prompts[first : first + at_once]
            lengths = [len(prompt) for prompt in part]
            width = max(lengths)
            padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in part])
            ends = torch.tensor([width * row + length - 1 for row, length in enumerate(lengths)])
            self.cache.select_prompts(first, lengths)
            hidden = self.policy(padded.to(self.rows.device), attend=self.cache.attend_prompt)
            last.append(hidden.flatten(0, 1)[ends.to(hidden.device)])  # (prompts, hidden)
        logits = self.policy.logits(torch.cat(last), self.head)  # (all prompts, V)
        self.record(logits.repeat_interleave(self.cache.group, dim=0))

    def record(self, logits: Tensor) -> None:
        """Draw each active slot's next token from logits (active, V) and write it down, without synchronizing."""
        n, rows = len(logits), self.rows[: len(logits)]
        place = self.cache.column - self.cache.prompt_columns  # (1,), in the response
        tokens, logprobs = draw(logits, self.uniforms[rows, place], self.temperature)
        self.tokens[rows, place] = tokens
        self.logprobs[rows, place] = logprobs
        self.lengths[rows] += self.alive[:n]
        self.alive[:n] &= ~(tokens[:, None] == self.end_ids).any(dim=-1)
        self.last[:n] = tokens

    def step(self, n: int, columns: int) -> None:
        """One token for the first n slots, attending to the first `columns` columns."""
        self.cache.mask_columns(n, columns)
        positions = self.cache.column - self.cache.start[:n, None]  # (n, 1)
        cos, sin = (table[positions] for table in self.cache.rope)  # (n, 1, 1, D)
        hidden = self.policy(self.last[:n, None], (cos, sin), self.cache.attend_new)  # (n, 1, hidden)
        self.cache.column += 1
        self.record(self.policy.logits(hidden[:, 0], self.head))

    def compact(self) -> None:
        """Drop the rows that have ended: active rows from the end of the batch move into their slots.

        Only the rows that move are copied, each once, at about the price of two decode steps of that row.
        """
        alive = self.alive[: self.active]
        count = int(alive.sum())
        holes = (~alive[:count]).nonzero()[:, 0]
        movers = count + alive[count:].nonzero()[:, 0]
        if len(holes):
            self.cache.move(movers, holes, int(self.cache.column))
            # swapped, so that each response keeps one slot
            self.rows[holes], self.rows[movers] = self.rows[movers], self.rows[holes]
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
        self.refused = False  # whether CUDA could not capture a graph

    def step(self, rows: int, columns: int) -> None:
        rows = min(round_up(rows, ROW_BLOCK), len(self.decoder.rows))
        shape = (rows, round_up(columns, COLUMN_BLOCK))
        graph = self.graphs.get(shape)
        if graph is None and shape in self.graphs and not self.refused:
            graph = self.graphs[shape] = self.capture(shape)
        if graph is None:
            self.graphs[shape] = None  # the first step of a shape warms the kernels up
            self.decoder.step(*shape)
        else:
            graph.replay()

    def capture(self, shape: tuple[int, int]) -> torch.cuda.CUDAGraph | None:
        """The graph of a step: capturing records the step without running it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # where capturing fails, the outer `with` puts the stream back
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                self.decoder.step(*shape)
        except RuntimeError as error:
            with suppress(RuntimeError):  # torch 2.11 forgets it (pytorch issue 180395)
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            if "captur" not in str(error):
                raise
            self.refused = True
            warn_once(f"decoding without CUDA graphs, more slowly: {one_line(error)}")
            return None
        return graph
