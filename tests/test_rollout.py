"""Sampling: every response is the plain sampler's, token for token, whatever shares the batch with it.

The uniform numbers decide a response, so nearly all of it can be tested by equality with plain_policy.py, which samples
one row at a time with the whole model for every token. What is left is drawing where rounding and NaN may intrude.
"""

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

import rollout
from data_types import Episode
from plain_policy import DEVICES, cut, plain_response, sample, small_policy
from plumbing.memory import Limit
from qwen2_model import Qwen2
from rollout import Decoder, Response, Sampler, draw, tempered

END_IDS = frozenset({16, 44, 77, 89, 140, 196})  # likely ones in the_case(), so that responses do end
JUST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
Patch, every = pytest.MonkeyPatch, pytest.mark.parametrize


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Case:
    """Prompts, the numbers for their responses, and the endless responses of the plain sampler."""

    policy: Qwen2
    prompts: list[list[int]]
    uniforms: Tensor  # (prompts * group, max_new_tokens)
    endless: list[Response]

    def sample(self, device: str, temperature=1.0, end_ids=END_IDS, **how: object) -> list[Episode]:
        """Sample, and compare with the plain sampler."""
        policy = copy.deepcopy(self.policy).to(device)
        episodes = sample(policy, self.prompts, self.uniforms, end_ids, temperature, **how)
        expected = [cut(response, end_ids) for response in self.endless]
        assert [(e.response_ids, e.truncated) for e in episodes] == [(r.ids, r.truncated) for r in expected]
        gaps = [np.abs(np.subtract(e.old_logprobs, r.logprobs)) for e, r in zip(episodes, expected, strict=True)]
        assert np.concatenate(gaps).mean() < 1e-5
        assert np.concatenate(gaps).max() < 1e-4
        prompts = [prompt for prompt in self.prompts for _ in range(len(episodes) // len(self.prompts))]
        assert [(e.problem, e.prompt_ids) for e in episodes] == [(prompt, prompt) for prompt in prompts]
        assert all(e.text == str(e.response_ids[: None if e.truncated else -1]) for e in episodes)
        return episodes


def make_case(policy: Qwen2, lengths: list[int], group: int, max_new: int, temperature: float, seed: int) -> Case:
    policy.head.data[policy.vocabulary :] *= 3  # nearly always one of these is the most likely, and none may be drawn
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, policy.vocabulary, length).tolist() for length in lengths]
    prompts[1][0] = prompts[1][-1] = 0  # id 0 is a token like any other, at both ends of a prompt too
    uniforms = torch.from_numpy(random.random((len(prompts) * group, max_new), dtype=np.float32))
    endless = [plain_response(policy, prompts[row // group], each, temperature) for row, each in enumerate(uniforms)]
    return Case(policy, prompts, uniforms, endless)


@cache
def the_case() -> Case:
    """Six prompts, eight responses to each, which differ, and end early, late and not at all."""
    case = make_case(small_policy(seed=14), [5, 9, 2, 17, 5, 12], 8, 20, 1.0, seed=2)
    responses = [cut(response, END_IDS) for response in case.endless]
    assert len({len(r.ids) for r in responses}) > 10
    assert 0 < sum(r.truncated for r in responses) < 24
    assert all(len({r.ids[0] for r in case.endless[row : row + 8]}) >= 3 for row in range(0, 48, 8))
    return case


@every("temperature", [1.0, 0.7, 1.6, 0.0])
@every("shape", [{}, {"tied": False, "layers": 3, "heads": 6, "kv_heads": 1}, {"heads": 3, "kv_heads": 3}], ids=str)
def test_tokens_and_logprobs_are_those_of_a_plain_sampler(device: str, temperature: float, shape: dict[str, int]):
    """A wrong position or head, or a cached key in the wrong place, changes tokens soon; logprobs are tempered, too."""
    make_case(small_policy(seed=3, **shape), [3, 8, 4], 3, 9, temperature, seed=4).sample(device, temperature)


@every("max_rows", [1, 20, 47, 48])
@every("tokens", [1, 50, 4096])
def test_waves_and_chunked_prefill_change_no_response(device: str, max_rows: int, tokens: int, monkeypatch: Patch):
    """A wave is whole groups, and one at least, so that each prompt is prefilled once."""
    case, forwards, forward = the_case(), [], Qwen2.forward
    watched = lambda self, ids, *how, **attend: forwards.append(ids.shape) or forward(self, ids, *how, **attend)  # noqa: E731
    monkeypatch.setattr(Qwen2, "forward", watched)
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", tokens)
    episodes = case.sample(device, rows_at_a_time=Limit("rows", max_rows))
    wave, prefills = max(1, max_rows // 8) * 8, [shape for shape in forwards if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == 6
    assert all(rows == 1 or rows * length <= tokens for rows, length in prefills)
    assert tokens < 4096 or len(prefills) == math.ceil(48 / wave)
    if device == "cpu":  # on CUDA most decode steps are replayed
        decoded, useful = [n for n, length in forwards if length == 1], sum(len(e.response_ids) - 1 for e in episodes)
        assert max(decoded) <= wave
        assert useful <= sum(decoded) <= 1.5 * useful  # rows that ended are not run


def fake_cuda_graphs(patch: Patch) -> None:
    """Graphs on the CPU: capturing runs nothing, and a replay runs the captured step with the same shape."""
    step = Decoder.step

    @contextmanager
    def capture(graph: SimpleNamespace, pool: object) -> Iterator[None]:
        with Patch.context() as inner:
            inner.setattr(Decoder, "step", lambda *captured: setattr(graph, "replay", partial(step, *captured)))
            yield

    fakes = {"CUDAGraph": SimpleNamespace, "graph": capture, "graph_pool_handle": object, "current_stream": object}
    for name, fake in {**fakes, "stream": nullcontext}.items():
        patch.setattr(torch.cuda, name, fake)


@every(("graphs", "compact"), [(True, True), (True, False), (False, True)])
@every("sizes", [(32, 128, 16), (8, 16, 7), (48, 40, 2), (1, 8, 1)])
def test_graphs_change_no_response(device: str, sizes: tuple, graphs: bool, compact: bool, monkeypatch: Patch):
    """A moved row that kept its old slot's position, number or keys would continue another response. A graph has fixed
    shapes, so ended rows are computed too and must not write over active ones. Unwritten memory, here full of nan, must
    never be read: torch.empty often returns zeros, which hide that, and a nan spreads even with weight 0.
    """
    bars, empty, fill = [], torch.empty, {True: math.nan, False: 1}
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (t := empty(*a, **k)).fill_(fill[t.is_floating_point()]))
    monkeypatch.setattr(rollout, "ROW_BLOCK", sizes[0])
    monkeypatch.setattr(rollout, "COLUMN_BLOCK", sizes[1])
    monkeypatch.setattr(rollout, "progress_bar", lambda *_: bars.append(tqdm(file=io.StringIO())) or bars[-1])
    if not compact:
        monkeypatch.setattr(Decoder, "compact", lambda decoder: None)
    if device == "cpu":
        fake_cuda_graphs(monkeypatch)
    episodes = the_case().sample(device, graphs=graphs, steps_per_check=sizes[2], rows_at_a_time=Limit("rows", 20))
    assert sum(bar.n for bar in bars) == sum(len(e.response_ids) for e in episodes)  # none computed after their end


def test_a_response_depends_on_its_prompt_and_numbers_alone(device: str):
    case, order = the_case(), [4, 0, 5, 2, 1, 3]
    shuffled = [case.prompts[i] for i in order], [8 * i + row for i in order for row in range(8)]
    for prompts, rows in [shuffled, *(([case.prompts[row // 8]], [row]) for row in (0, 13, 29, 47))]:
        part = replace(case, prompts=prompts, uniforms=case.uniforms[rows], endless=[case.endless[r] for r in rows])
        part.sample(device)
    for limit in (1, 2, 7):  # the length limit only truncates
        shorter = [Response(r.ids[:limit], r.logprobs[:limit], truncated=True) for r in case.endless]
        replace(case, uniforms=case.uniforms[:, :limit], endless=shorter).sample(device)


def test_every_end_id_ends_a_response_and_is_kept(device: str):
    """Qwen has two end ids. A mask made by comparing tokens with a padding id of 0 would lose the real ones."""
    endless = the_case().endless
    common = [token for token in range(211) if sum(token in r.ids for r in endless) >= 6]
    last = next(r.ids[-1] for r in endless if r.ids.index(r.ids[-1]) == 19)  # ends a response in the very last place
    assert common[0] == 0
    for end_ids in ({96}, {0}, {last}, {common[1]}, set(common[2:4]), set(common[4:9])):
        episodes = the_case().sample(device, end_ids=end_ids)
        assert {e.response_ids[-1] for e in episodes if not e.truncated} == end_ids


@torch.inference_mode()
def test_on_a_cpu_a_bf16_head_is_widened_once_per_wave(monkeypatch: Patch):
    policy, heads, logits = small_policy(1).bfloat16(), [], Qwen2.logits
    monkeypatch.setattr(Qwen2, "logits", lambda self, x, head: heads.append(head) or logits(self, x, head))
    sampler = Sampler(policy, SimpleNamespace(end_ids=[211]), None, 9, None)
    sampler.generate(policy, [[1, 2, 3], [4, 5]], torch.full((4, 9), 0.5), 1.0, 4)
    assert ({head.dtype for head in heads}, len({*map(id, heads)}), len(heads)) == ({torch.float32}, 1, 9)


@every("temperature", [1.0, 0.7, 0.0])
def test_logits_that_are_not_numbers_draw_some_token_and_show_in_its_logprob(device: str, temperature: float):
    """searchsorted answers V for a nan; as an index that is an error here, and on CUDA the end of the process."""
    logits = torch.tensor([[0.0] * 5, [0.0, 0.0, math.nan, 0.0, 0.0], [math.inf] * 5], device=device)
    tokens, logprobs = draw(logits, torch.full((3,), 0.9, device=device), temperature)
    assert set(tokens.tolist()) <= set(range(5))
    assert logprobs.isfinite().tolist() == [True, False, False]


def summed_in_a_tree(tensor: Tensor, dim: int) -> Tensor:
    """cumsum as a GPU computes it: first neighbours, then sums of 2, of 4: equal sums in unequal orders."""
    width = 1
    while width < tensor.shape[dim]:
        tensor = torch.cat((tensor[:, :width], tensor[:, width:] + tensor[:, :-width]), dim=dim)
        width *= 2
    return tensor


@every("cumsum", [Tensor.cumsum, summed_in_a_tree])
@every("temperature", [1.0, 0.7])
def test_an_impossible_token_is_never_drawn(device: str, temperature: float, cumsum: Callable, monkeypatch: Patch):
    """Rounding may leave a gap at the end of a CDF. Summed in a tree, it may also rise where the probability is zero,
    as it is past the vocabulary, and fall again. The numbers that land on such a step are the CDF's own values; a long
    run meets one at last. Its token has the logprob -inf, which turns the update into nan.
    """
    monkeypatch.setattr(Tensor, "cumsum", cumsum)
    generator = torch.Generator().manual_seed(16)
    logits = 3 * torch.randn(6, 20_000, generator=generator)
    logits[:3, torch.rand(20_000, generator=generator) < 0.5] = -torch.inf
    logits[1, :100] = -torch.inf
    logits[2, torch.arange(20_000) != 777] = -torch.inf
    logits[3:, 19_000:] = -torch.inf  # as padding ids
    cdf = tempered(logits.to(device), temperature).softmax(dim=-1).cumsum(dim=-1).cpu()
    borders = cdf.gather(1, torch.randint(20_000, (6, 40), generator=generator)) / cdf[:, -1:]
    edges = torch.tensor([0.0, 1e-45, 1e-30, 2.0**-24, JUST_BELOW_ONE, JUST_BELOW_ONE - 2.0**-24]).expand(6, 6)
    uniforms = torch.cat((borders.clamp(max=JUST_BELOW_ONE), edges, torch.rand(6, 6, generator=generator)), dim=1)
    logits = logits.repeat_interleave(uniforms.shape[1], dim=0).to(device)
    _, logprobs = draw(logits, uniforms.flatten().to(device), temperature)
    assert logprobs.isfinite().all()
