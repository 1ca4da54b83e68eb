"""Sampling: every answer is the plain sampler's, token for token, whatever shares the batch with it.

The uniform numbers decide an answer, so nearly all of it can be tested by equality with plain_policy.py,
which samples one row at a time with the whole model for every token. What is left is the drawing itself
(`warp` and `draw`), against distributions worked out by hand and the chi-square test.
"""

import copy
import math
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from plain_policy import (
    DEVICES,
    UNCUT,
    VOCABULARY,
    as_episodes,
    cut,
    plain_answer,
    plain_distribution,
    plain_logits,
    small_policy,
)
from torch import Tensor

import rollout
from grpo import response_logprobs
from qwen2_model import Qwen2
from rollout import Answer, Sampling, draw, generate, warp

END_IDS = frozenset({19, 48, 92, 96, 116, 152})  # likely ones in the_questions(), so that answers do end
JUST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@dataclass
class Questions:
    """Prompts, the numbers for their answers, and what the plain sampler makes of them, endlessly."""

    policy: Qwen2  # on the CPU
    prompts: list[list[int]]
    group: int
    uniforms: Tensor  # (questions * group, max_new_tokens)
    endless: list[Answer]

    def expected(self, end_ids: AbstractSet[int] = END_IDS) -> list[Answer]:
        return [cut(answer, row // self.group, end_ids) for row, answer in enumerate(self.endless)]

    def generate(self, device: str = "cpu", end_ids: AbstractSet[int] = END_IDS, sampling: Sampling = UNCUT,
                 **options: object) -> list[Answer]:
        policy = self.policy.to(device)
        answers = generate(policy, self.prompts, self.uniforms, sorted(end_ids), VOCABULARY, sampling,
                           **options)
        self.policy.to("cpu")
        return answers


def make_questions(policy: Qwen2, prompt_lengths: list[int], group: int, max_new: int, sampling: Sampling,
                   seed: int) -> Questions:
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCABULARY, length).tolist() for length in prompt_lengths]
    prompts[1][0] = prompts[1][-1] = 0  # id 0 is a token like any other, at both ends of a prompt too
    uniforms = torch.from_numpy(random.random((len(prompts) * group, max_new), dtype=np.float32))
    endless = [plain_answer(policy, prompts[row // group], uniforms[row], random, sampling)
               for row in range(len(uniforms))]
    return Questions(policy, prompts, group, uniforms, endless)


@cache
def the_questions() -> Questions:
    """Six questions, eight answers each of up to 20 tokens; prompts of very different lengths."""
    return make_questions(small_policy(seed=5), [5, 9, 2, 17, 5, 12], 8, 20, UNCUT, seed=2)


@dataclass
class Forwards:
    """How many rows each forward had: over whole prompts, and over one new token a row."""

    prefills: list[int]
    decodes: list[int]


@contextmanager
def watched(policy: Qwen2) -> Iterator[Forwards]:
    seen = Forwards([], [])

    def see(module: Qwen2, arguments: tuple[Tensor, ...]) -> None:
        rows, length = arguments[0].shape
        (seen.prefills if length > 1 else seen.decodes).append(rows)

    hook = policy.register_forward_pre_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def assert_same(answers: list[Answer], expected: list[Answer]) -> None:
    assert [(a.question, a.ids, a.ended) for a in answers] == [(e.question, e.ids, e.ended) for e in expected]
    assert all(len(a.logprobs) == len(a.ids) for a in answers)
    gaps = np.abs(np.subtract(*([x for a in some for x in a.logprobs] for some in (answers, expected))))
    assert gaps.mean() < 1e-5 and gaps.max() < 1e-4


def logprob_gap(policy: Qwen2, device: str, answers: list[Answer], sampling: Sampling) -> float:
    """Mean absolute difference between the logprobs in `answers` and those of the trainer."""
    episodes = as_episodes(answers, the_questions().prompts)
    with torch.no_grad():
        trained, _ = response_logprobs(policy.to(device), episodes, VOCABULARY, sampling)
    policy.to("cpu")
    recorded = torch.tensor([logprob for answer in answers for logprob in answer.logprobs])
    return (trained.cpu() - recorded).abs().mean().item()


# ---------------------------------------------------------------------------- the same as the plain sampler


def test_the_questions_are_worth_testing_with():
    """A fixed text or pure noise would hide bugs. Answers differ, and end early, late and not at all."""
    questions = the_questions()
    lengths = [len(answer.ids) for answer in questions.expected()]
    assert len(set(lengths)) > 10 and 0 < sum(not a.ended for a in questions.expected()) < 24
    assert len({tuple(a.ids) for a in questions.endless}) == 48
    logprobs = [logprob for answer in questions.endless for logprob in answer.logprobs]
    assert -4.5 < np.mean(logprobs) < -1.0  # log(211) is 5.4


@pytest.mark.parametrize("sampling", [
    UNCUT,
    Sampling(temperature=0.7, top_k=5, top_p=0.9),
    Sampling(temperature=1.6),
    Sampling(top_k=3),
    Sampling(temperature=0.8, top_p=0.6),
    Sampling(temperature=0.0),
], ids=str)
@pytest.mark.parametrize("shape", [
    {"tied": True},
    {"tied": False, "layers": 3, "heads": 6, "kv_heads": 1},
    {"tied": True, "heads": 3, "kv_heads": 3},
], ids=str)
def test_tokens_and_logprobs_are_those_of_a_plain_sampler(device: str, sampling: Sampling, shape: dict):
    """A cached key in the wrong place, a wrong position or head changes tokens soon. The logprob is that of
    the distribution drawn from, so temperature, top-k and top-p are in it (greedy draws from none: the
    policy's own).
    """
    questions = make_questions(small_policy(seed=3, **shape), [3, 8, 4], 3, 9, sampling, seed=4)
    assert_same(questions.generate(device, sampling=sampling), questions.expected())


def test_greedy_takes_the_argmax_whatever_the_numbers(device: str):
    questions = make_questions(small_policy(seed=5), [4, 7], 3, 12, Sampling(temperature=0.0), seed=6)
    for answer in questions.generate(device, sampling=Sampling(temperature=0.0)):
        prompt = questions.prompts[answer.question]
        logits = plain_logits(questions.policy, prompt + answer.ids)[len(prompt) - 1 : -1]
        assert answer.ids == logits.argmax(axis=-1).tolist()
    logits = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(7)).to(device)
    for number in (0.0, 0.5, JUST_BELOW_ONE):
        tokens, _ = draw(logits, torch.full((50,), number, device=device), Sampling(temperature=0.0))
        assert torch.equal(tokens, logits.argmax(dim=-1))


# ---------------------------------------------------------------------------- an answer is its row's alone


@pytest.mark.parametrize("compact", [True, False])
def test_rows_that_leave_change_no_answer(device: str, compact: bool):
    """A moved row that kept its old slot's position, number or keys would go on as another answer."""
    questions = the_questions()
    assert_same(questions.generate(device, compact=compact), questions.expected())


@pytest.mark.parametrize("questions_that_fit", [0.01, 0.25, 0.5, 0.9, 1, 2.5, 4, 5.99, 6])
def test_waves_change_no_answer(device: str, questions_that_fit: float):
    """Each wave must use its own rows of numbers and give its questions their own indices, and where not even the
    8 rows of one group fit, the group is split too.
    """
    questions = the_questions()
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head size, bytes of an fp32
    per_question = questions.group * (17 + 20) * per_token
    with watched(questions.policy) as forwards:
        answers = questions.generate(device, cache_bytes=questions_that_fit * per_question)
    assert_same(answers, questions.expected())
    parts = {0.01: 8, 0.25: 4, 0.5: 2, 0.9: 2}.get(questions_that_fit, 1)
    assert sum(forwards.prefills) == 6 * parts and max(forwards.prefills) <= max(1, questions_that_fit)
    assert max(forwards.decodes) <= max(1, 8 * questions_that_fit)


@pytest.mark.parametrize(("prompts", "rows"), [([], 4), ([[1], []], 4), ([[1], [2], [3]], 4), ([[1]], 0)])
def test_prompts_and_numbers_that_do_not_go_together_are_refused(prompts: list, rows: int):
    """An empty prompt has no last position to sample from; a row too many would be given to no question."""
    with pytest.raises(ValueError, match="prompts of lengths"):
        generate(small_policy(1), prompts, torch.rand(rows, 3), [0], VOCABULARY, UNCUT)


def test_logits_that_are_not_numbers_draw_some_token_and_show_in_its_logprob(device: str):
    """searchsorted answers V for a nan; as an index that is an error here and on CUDA the end of the process."""
    logits = torch.zeros(3, 5, device=device)
    logits[1, 2], logits[2] = math.nan, math.inf
    for sampling in (UNCUT, Sampling(0.0), Sampling(0.7, top_k=2), Sampling(1.0, top_p=0.5)):
        tokens, logprobs = draw(logits, torch.full((3,), 0.9, device=device), sampling)
        assert ((tokens >= 0) & (tokens < 5)).all()
        assert logprobs.isfinite().tolist() == [True, False, False]


def test_the_order_of_questions_changes_no_answer(device: str):
    questions = the_questions()
    order = [4, 0, 5, 2, 1, 3]
    rows = [question * questions.group + i for question in order for i in range(questions.group)]
    permuted = replace(questions, prompts=[questions.prompts[question] for question in order],
                       uniforms=questions.uniforms[rows], endless=[questions.endless[row] for row in rows])
    assert_same(permuted.generate(device), permuted.expected())


def test_an_answer_does_not_depend_on_the_others_in_the_batch(device: str):
    questions = the_questions()
    for row in (0, 13, 29, 47):
        alone = replace(questions, prompts=[questions.prompts[row // 8]], group=1,
                        uniforms=questions.uniforms[row : row + 1], endless=questions.endless[row : row + 1])
        assert_same(alone.generate(device), alone.expected())


def test_the_length_limit_only_cuts(device: str):
    """With fewer numbers a row an answer is the beginning of the longer one; one number gives one token."""
    questions = the_questions()
    for limit in (1, 2, 7):
        shorter = [replace(a, ids=a.ids[:limit], logprobs=a.logprobs[:limit]) for a in questions.endless]
        short = replace(questions, uniforms=questions.uniforms[:, :limit], endless=shorter)
        assert_same(short.generate(device), short.expected())


def test_memory_that_was_never_written_is_never_read(device: str, monkeypatch: pytest.MonkeyPatch):
    """torch.empty often hands out zeros, which hide a key that is read before it is written; nan does not."""
    questions, empty = the_questions(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poisoned(empty(*shape, **options)))
    assert_same(questions.generate(device), questions.expected())


def poisoned(tensor: Tensor) -> Tensor:
    return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rows, columns", [(8, 16), (48, 37), (1, 1)])
def test_slots_and_columns_that_ride_along_change_no_answer(rows: int, columns: int, compact: bool,
                                                            monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph has fixed shapes: ended answers and columns not yet written are computed too. Here the
    same shapes run on the CPU. An ended answer must not write over a living one, and what unwritten memory
    holds must not matter: masked it has the weight 0, but 0 * nan is nan.
    """
    questions, plain_step, empty = the_questions(), rollout.Decoder.step, torch.empty

    def bucketed(decoder: rollout.Decoder, n: int, seen: int) -> None:
        slots = min(math.ceil(n / rows) * rows, len(decoder.rows))
        width = min(math.ceil(seen / columns) * columns, len(decoder.cache.columns))
        plain_step(decoder, slots, width)

    monkeypatch.setattr(rollout.Decoder, "step", bucketed)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: poisoned(empty(*shape, **options)))
    assert_same(questions.generate(compact=compact), questions.expected())


# ---------------------------------------------------------------------------- when an answer ends


def test_every_end_id_ends_an_answer_and_is_kept(device: str):
    """Qwen has two end ids. Whatever they are, the answer is the endless one up to the first of them."""
    questions = the_questions()
    common = [token for token in range(VOCABULARY) if sum(token in a.ids for a in questions.endless) >= 6]
    assert len(common) > 10
    for end_ids in [{common[0]}, {common[1]}, set(common[2:4]), set(common[4:9])]:
        answers = questions.generate(device, end_ids)
        assert_same(answers, questions.expected(end_ids))
        assert {a.ids[-1] for a in answers if a.ended} == end_ids
        for answer in answers:
            assert answer.ended == (answer.ids[-1] in end_ids) and end_ids.isdisjoint(answer.ids[:-1])
            assert answer.ended or len(answer.ids) == 20  # not ended: cut at the limit, and only then
    row = next(row for row, answer in enumerate(questions.endless) if answer.ids.index(answer.ids[-1]) == 19)
    assert questions.generate(device, {questions.endless[row].ids[-1]})[row].ended  # in the very last place


def test_token_zero_is_a_token_like_any_other(device: str):
    """Masks made by comparing tokens with a padding id lose the real ones; 0 ends only as an end id."""
    questions = the_questions()
    assert_same(questions.generate(device, {96}), questions.expected({96}))
    assert any(0 in answer.ids[:-1] for answer in questions.expected({96}))
    assert_same(questions.generate(device, {0}), questions.expected({0}))
    assert sum(answer.ended for answer in questions.expected({0})) >= 5


def test_ids_past_the_vocabulary_are_never_sampled(device: str):
    """The model has rows for more ids than the tokenizer knows; they take no probability either."""
    policy = small_policy(seed=8, tied=False)
    with torch.no_grad():
        policy.untied_head[VOCABULARY:] *= 3  # nearly always one of them is the likeliest
    questions = make_questions(policy, [6, 3], 12, 6, UNCUT, seed=9)
    for sampling in (UNCUT, Sampling(top_k=VOCABULARY + 20)):
        assert_same(questions.generate(device, sampling=sampling), questions.expected())
    few = generate(policy.to(device), questions.prompts, questions.uniforms, [1], 10, UNCUT)
    assert len({token for answer in few for token in answer.ids}) > 5
    assert max(token for answer in few for token in answer.ids) < 10


# ---------------------------------------------------------------------------- sampler and trainer agree


@pytest.mark.parametrize("sampling", [UNCUT, Sampling(0.7, 5, 0.9), Sampling(1.5, 0, 0.8)], ids=str)
def test_recorded_logprobs_are_those_the_trainer_computes(device: str, sampling: Sampling):
    questions = the_questions()
    answers = questions.generate(device, sampling=sampling)
    assert logprob_gap(questions.policy, device, answers, sampling) < 1e-5
    other = replace(sampling, temperature=1.01 * sampling.temperature)
    assert logprob_gap(questions.policy, device, answers, other) > 1e-3  # so the bound means something


def test_recorded_logprobs_are_those_the_trainer_computes_in_bf16(device: str):
    """Decode and training add up in different orders, and bf16 rounds what comes out of each layer."""
    questions = the_questions()
    low = replace(questions, policy=copy.deepcopy(questions.policy).bfloat16())
    assert 1e-5 < logprob_gap(low.policy, device, low.generate(device), UNCUT) < 0.01


def test_logits_of_a_bf16_policy_are_not_rounded_to_bf16(device: str):
    """Rounded, a logit near 6 is off by up to 0.016, in sampler and trainer alike. Where the hidden state
    is the same to the last bit (a lone prompt's last token), the logprob must be that of the exact product.
    """
    questions = the_questions()
    policy = copy.deepcopy(questions.policy).bfloat16().to(device)
    for prompt, uniforms in zip(questions.prompts, questions.uniforms[::8], strict=True):
        answers = generate(policy, [prompt], uniforms[None, :1], [VOCABULARY], VOCABULARY, UNCUT)
        exact = np.log(plain_distribution(plain_logits(policy, prompt)[-1], UNCUT))
        assert answers[0].logprobs[0] == pytest.approx(exact[answers[0].ids[0]], abs=2e-5)
        trained, _ = response_logprobs(policy, as_episodes(answers, [prompt]), VOCABULARY, UNCUT)
        exact = np.log(plain_distribution(plain_logits(policy, prompt + answers[0].ids)[-2], UNCUT))
        assert trained.item() == pytest.approx(exact[answers[0].ids[0]], abs=2e-5)


# ---------------------------------------------------------------------------- the work that is saved


def test_a_question_is_prefilled_once_and_rows_that_ended_are_not_run():
    """Where the time goes, counted in rows: the batch shrinks to about the rows that are alive."""
    questions = the_questions()
    with watched(questions.policy) as forwards:
        questions.generate()
    assert forwards.prefills == [6]  # not one prefill for each of the 48 answers
    tokens_after_the_first = sum(len(answer.ids) - 1 for answer in questions.expected())
    assert tokens_after_the_first <= sum(forwards.decodes) <= 1.5 * tokens_after_the_first
    with watched(questions.policy) as forwards:
        questions.generate(compact=False)
    assert forwards.decodes == [48] * 19


@pytest.mark.parametrize("compact", [True, False])
def test_every_token_is_counted_once(device: str, compact: bool):
    """Tokens/s counts the tokens of answers, not what rows computed after their end."""
    counts = []
    answers = the_questions().generate(device, compact=compact, on_tokens=counts.append)
    assert sum(counts) == sum(len(answer.ids) for answer in answers) and len(counts) > 1


def test_sampling_leaves_the_global_generators_alone(device: str):
    """An evaluation in between must not change what training draws next."""
    before = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if device == "cuda" else torch.empty(0)
    the_questions().generate(device)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cuda.get_rng_state() if device == "cuda" else torch.empty(0), on_gpu)


# ---------------------------------------------------------------------------- drawing from a distribution

LIKELY = [0.1, 0.4, 0.0, 0.2, 0.3]  # out of order, so that a sorted position is not mistaken for a token
DISTRIBUTIONS = [  # what LIKELY becomes, by hand
    (UNCUT, [0.1, 0.4, 0, 0.2, 0.3]),
    (Sampling(temperature=0.5), [1 / 30, 16 / 30, 0, 4 / 30, 9 / 30]),  # squares of 1 : 4 : 2 : 3
    (Sampling(top_k=3), [0, 4 / 9, 0, 2 / 9, 3 / 9]),
    (Sampling(top_k=1), [0, 1, 0, 0, 0]),
    (Sampling(top_k=5), [0.1, 0.4, 0, 0.2, 0.3]),
    (Sampling(top_k=500), [0.1, 0.4, 0, 0.2, 0.3]),
    (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),  # the likeliest token stays, however much it holds
    (Sampling(top_p=0.6), [0, 4 / 7, 0, 0, 3 / 7]),  # 0.4 is not enough, 0.7 is
    (Sampling(top_p=0.75), [0, 4 / 9, 0, 2 / 9, 3 / 9]),
    (Sampling(top_p=0.95), [0.1, 0.4, 0, 0.2, 0.3]),
    (Sampling(temperature=0.5, top_p=0.8), [0, 16 / 25, 0, 0, 9 / 25]),  # 25/30, after the temperature
    (Sampling(top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),  # of what top-k left: 4/7 is enough
    (Sampling(temperature=0.5, top_k=3, top_p=0.9), [0, 16 / 29, 0, 4 / 29, 9 / 29]),  # 25/29 = 0.86 is not
]


@pytest.mark.parametrize("sampling, expected", DISTRIBUTIONS, ids=str)
def test_the_distribution_worked_out_by_hand(device: str, sampling: Sampling, expected: list[float]):
    logits = torch.tensor([LIKELY]).log() + 3.0
    assert warp(logits.to(device), sampling).softmax(dim=-1)[0].tolist() == pytest.approx(expected, abs=1e-6)
    oracle = plain_distribution(logits[0].double().numpy(), sampling)
    assert oracle.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_token_already_drawn_is_never_cut():
    """In the trainer rounding may put it just past the edge; its logprob must not become -inf."""
    logits = torch.tensor([LIKELY, LIKELY]).log()
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.6)):
        logprobs = warp(logits, sampling, keep=torch.tensor([3, 1])).log_softmax(dim=-1)
        assert logprobs.exp()[0].tolist() == pytest.approx([0, 4 / 9, 0, 2 / 9, 3 / 9], abs=1e-6)
        assert logprobs.exp()[1].tolist() == pytest.approx([0, 4 / 7, 0, 0, 3 / 7], abs=1e-6)


def chi_square_bound(cells: int) -> float:
    """What the chi-square statistic over so many cells exceeds once in 1,000 times (Wilson and Hilferty)."""
    freedom = cells - 1
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    if possible.sum() > 1:
        assert ((counts[possible] - expected) ** 2 / expected).sum() < chi_square_bound(possible.sum())


@pytest.mark.parametrize("sampling, expected", DISTRIBUTIONS, ids=str)
def test_20000_draws_follow_the_distribution(device: str, sampling: Sampling, expected: list[float]):
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(12)).to(device)
    logits = torch.tensor([LIKELY]).log().to(device).expand(20_000, -1)
    tokens, logprobs = draw(logits, uniforms, sampling)
    assert_frequencies(np.bincount(tokens.cpu(), minlength=5), np.array(expected))
    assert torch.allclose(logprobs.cpu().exp(), torch.tensor(expected).float()[tokens.cpu()], atol=1e-6)


@pytest.mark.parametrize("sampling", [UNCUT, Sampling(temperature=0.6), Sampling(1.5, 0, 0.8)], ids=str)
def test_20000_answers_follow_the_policy_and_are_independent(device: str, sampling: Sampling):
    """The first token follows softmax, the second its softmax after the first; neighbouring rows know
    nothing of each other. One number used for two rows or for two positions would break that.
    """
    rows, ids, prompt = 20_000, 6, [3, 5, 4]
    policy = small_policy(seed=13)
    uniforms = torch.rand(rows, 2, generator=torch.Generator().manual_seed(14))
    answers = generate(policy.to(device), [prompt], uniforms, [VOCABULARY], ids, sampling)
    tokens = np.array([answer.ids for answer in answers])  # (rows, 2)
    first = plain_distribution(plain_logits(policy, prompt, ids)[-1], sampling)
    second = np.stack([plain_distribution(plain_logits(policy, [*prompt, token], ids)[-1], sampling)
                       for token in range(ids)])  # (first token, second token)
    pairs = np.bincount(tokens[:, 0] * ids + tokens[:, 1], minlength=ids * ids)
    assert_frequencies(pairs, (first[:, None] * second).ravel())
    neighbours = np.bincount(tokens[::2, 0] * ids + tokens[1::2, 0], minlength=ids * ids)
    assert_frequencies(neighbours, np.outer(first, first).ravel())


def test_the_answers_of_a_group_begin_differently(device: str):
    answers = the_questions().generate(device)
    for question in range(6):
        assert len({answer.ids[0] for answer in answers if answer.question == question}) >= 3


@pytest.mark.parametrize("sampling", [UNCUT, Sampling(top_k=20), Sampling(0.5, 0, 0.7)], ids=str)
def test_an_impossible_token_is_never_drawn(device: str, sampling: Sampling):
    """Rounding in the cumulated sum may leave a gap at its end, or a step where the probability is zero.
    Whoever falls in there gets a token of logprob -inf, and one such token turns the update into nan.
    """
    generator = torch.Generator().manual_seed(15)
    logits = 3 * torch.randn(60, 20_000, generator=generator)
    logits[:, torch.rand(20_000, generator=generator) < 0.5] = -torch.inf
    logits[:20, :100] = -torch.inf
    logits[20:40, -100:] = -torch.inf
    logits[40:50] = -torch.inf
    logits[40:50, 777] = 5.0  # only one token is possible
    logits = logits.to(device)
    edges = [0.0, 1e-45, 1e-30, 2.0**-24, JUST_BELOW_ONE, JUST_BELOW_ONE - 2.0**-24]
    for uniform in [torch.full((60,), edge) for edge in edges] + list(torch.rand(6, 60, generator=generator)):
        tokens, logprobs = draw(logits, uniform.to(device), sampling)
        assert torch.isfinite(logprobs).all()
        assert torch.isfinite(logits.gather(1, tokens[:, None])).all()
        assert (tokens[40:50] == 777).all()


def summed_in_a_tree(tensor: Tensor, dim: int) -> Tensor:
    """cumsum as a GPU computes it: first neighbours, then sums of 2, of 4: equal sums in unequal orders."""
    width = 1
    while width < tensor.shape[dim]:
        tensor = torch.cat((tensor[:, :width], tensor[:, width:] + tensor[:, :-width]), dim=dim)
        width *= 2
    return tensor


@pytest.mark.parametrize("cumsum", [Tensor.cumsum, summed_in_a_tree])
def test_a_number_on_a_border_never_draws_an_impossible_token(device: str, cumsum: Callable,
                                                              monkeypatch: pytest.MonkeyPatch):
    """Summed in a tree, a CDF may rise a little where the probability is zero, and fall again after that. The
    numbers that can land on such a step are the values of the CDF itself; a long run meets one at last.
    """
    monkeypatch.setattr(Tensor, "cumsum", cumsum)
    generator, sampling = torch.Generator().manual_seed(16), Sampling(top_k=20)
    logits = (3 * torch.randn(3, 20_000, generator=generator)).to(device).repeat_interleave(50, dim=0)
    cdf = warp(logits, sampling).softmax(dim=-1).cumsum(dim=-1)
    places = torch.randint(20_000, (150, 1), generator=generator).to(device)
    uniforms = (cdf.gather(1, places) / cdf[:, -1:])[:, 0].clamp(max=JUST_BELOW_ONE)
    assert torch.isfinite(draw(logits, uniforms, sampling)[1]).all()


def test_the_smallest_and_largest_numbers_reach_both_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, 0.0, -torch.inf]])
    assert draw(logits, torch.tensor([0.0]), UNCUT)[0].item() == 1
    assert draw(logits, torch.tensor([JUST_BELOW_ONE]), UNCUT)[0].item() == 3
