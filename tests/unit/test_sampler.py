"""Laws of the sampler: it draws from the distribution it says, truncates exactly, and reports true probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.engine.logits import Edit, edited
from glmctl.engine.request import SamplingParams
from glmctl.engine.sampler import Rows, pick, stream_of, uniforms
from glmctl.errors import GlmctlError


def rows_of(*params: SamplingParams, drawn: int = 0) -> Rows:
    rows = Rows.empty(len(params))
    for index, each in enumerate(params):
        rows.put(index, each)
    rows.drawn[:] = drawn
    return rows


def draws(logits_V: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """`count` independent draws: one row each, at successive places of one stream."""
    rows = rows_of(*[params] * count)
    rows.drawn[:] = np.arange(count)
    return pick(logits_V.expand(count, -1), rows).tokens.numpy()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    keep = expected > 0
    assert counts[~keep].sum() == 0, "a token of probability zero was drawn"
    return float(((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum())


def expected_probabilities(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The truncated, renormalised distribution, written the slow way in float64."""
    p = (logits.double() / params.temperature).softmax(-1).numpy()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[: params.top_k] if params.top_k else order
    p = np.array([p[i] if i in set(kept) else 0.0 for i in range(len(p))])
    p /= p.sum()
    if params.top_p < 1:
        mass, nucleus = 0.0, []
        for i in kept:
            if mass >= params.top_p:
                break
            nucleus.append(i)
            mass += p[i]
        p = np.array([p[i] if i in set(nucleus) else 0.0 for i in range(len(p))])
    p[p < params.min_p * p.max()] = 0.0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.6, seed=2),
        SamplingParams(temperature=1.7, top_k=7, seed=3),
        SamplingParams(top_p=0.8, seed=4),
        SamplingParams(min_p=0.2, seed=5),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05, seed=6),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_draws_follow_the_truncated_softmax(params: SamplingParams) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 2
    count = 40_000
    p = expected_probabilities(logits, params)
    counts = np.bincount(draws(logits, params, count), minlength=24)
    freedom = int((p > 0).sum()) - 1
    # mean + 5 standard deviations of chi-square; the stream is fixed, so this cannot flicker
    assert chi_square(counts, p * count) < freedom + 5 * (2 * freedom) ** 0.5


def test_uniforms_are_uniform_and_uncorrelated_between_seeds() -> None:
    index = np.arange(20_000)
    streams = [uniforms(np.full(20_000, stream_of(seed), np.uint64), index) for seed in range(4)]
    for u in streams:
        assert u.min() >= 0.0
        assert u.max() < 1.0
        counts = np.bincount((u * 64).astype(int), minlength=64)
        assert chi_square(counts, np.full(64, 20_000 / 64)) < 63 + 5 * 126**0.5
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.04
    assert all(abs(np.corrcoef(streams[0], other)[0, 1]) < 0.04 for other in streams[1:])
    # neighbouring seeds at the same place: what the samples of one group use for their first token
    first = uniforms(np.array([stream_of(seed) for seed in range(20_000)], np.uint64), np.zeros(20_000, np.int64))
    assert chi_square(np.bincount((first * 64).astype(int), minlength=64), np.full(64, 20_000 / 64)) < 63 + 5 * 126**0.5


def test_greedy_takes_the_largest_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    greedy = SamplingParams(temperature=0.0)
    assert pick(logits, rows_of(greedy, greedy)).tokens.tolist() == [1, 0]


def test_exactly_top_k_survive_among_equals() -> None:
    assert set(draws(torch.zeros(10), SamplingParams(top_k=3), 2000).tolist()) == {0, 1, 2}


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(min_p=0.999999)):
        assert torch.equal(pick(logits, rows_of(*[params] * 50)).tokens, logits.argmax(-1))


def test_logprobs_are_of_the_scaled_softmax_before_truncation() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)) * 3
    params = [
        SamplingParams(temperature=0.7, top_k=5, logprobs=True),
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.5),
    ]
    picked = pick(logits, rows_of(*params))
    assert picked.logprobs is not None
    for row, temperature in enumerate((0.7, 1.0, 1.0)):
        wanted = (logits[row].double() / temperature).log_softmax(-1)[picked.tokens[row]]
        assert picked.logprobs[row].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_top_logprobs_are_the_likeliest_and_include_what_the_row_asked_for() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    picked = pick(logits, rows_of(SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3), SamplingParams()))
    assert picked.top is not None
    assert picked.logprobs is not None
    assert picked.top[0].shape == (2, 3)
    assert picked.top[0][0, 0] == picked.tokens[0]
    assert picked.top[1][0, 0].item() == pytest.approx(picked.logprobs[0].item(), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0, 4]), st.sampled_from([1.0, 0.7]), st.integers()
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 2**31),
)
def test_a_row_does_not_depend_on_its_neighbours(shapes: list[tuple[float, int, float, int]], seed: int) -> None:
    logits = torch.randn(len(shapes), 32, generator=torch.Generator().manual_seed(seed)) * 2
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, seed=s) for t, k, p, s in shapes]
    together = pick(logits, rows_of(*params, drawn=5)).tokens.tolist()
    alone = [pick(logits[i : i + 1], rows_of(each, drawn=5)).tokens.item() for i, each in enumerate(params)]
    assert together == alone


def edit(row: int = 0, *, output: list[int] | None = None, **kwargs: object) -> Edit:
    stop_ids = frozenset(kwargs.pop("stop_ids", ()))
    mask = kwargs.pop("mask", None)
    prompt = kwargs.pop("prompt", [])
    return Edit(row, SamplingParams(**kwargs), prompt, output or [], mask, stop_ids)


def test_presence_is_taken_off_once_and_frequency_as_often_as_generated() -> None:
    logits = torch.zeros(2, 6)
    made = edited(logits, [edit(1, prompt=[5, 5], output=[1, 1, 1, 2], presence_penalty=0.5, frequency_penalty=0.25)])
    assert made.tolist() == [[0.0] * 6, [0.0, -1.25, -0.75, 0.0, 0.0, 0.0]]
    assert not logits.any(), "the model's own logits are still needed"


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0]])
    made = edited(logits, [edit(prompt=[0, 0, 1], output=[3], repetition_penalty=2.0)])
    assert made.tolist() == [[1.0, -4.0, 2.0, -4.0, 2.0]]


def test_bias_is_added_and_a_hundred_decides() -> None:
    logits = torch.tensor([[0.0, 9.0, 3.0]])
    assert edited(logits, [edit(logit_bias={2: 1.5, 0: -2.0})]).tolist() == [[-2.0, 9.0, 4.5]]
    greedy = SamplingParams(temperature=0.0)
    for bias, wanted in (({1: -100}, 2), ({0: 100}, 0)):
        assert pick(logits, rows_of(greedy), [edit(logit_bias=bias)]).tokens.item() == wanted


def test_min_tokens_forbids_the_stop_ids_until_then_unless_nothing_else_is_allowed() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    greedy = rows_of(SamplingParams(temperature=0.0))

    def chosen(output: list[int], mask: list[bool] | None = None) -> int:
        allowed = None if mask is None else torch.tensor(mask)
        one = edit(output=output, mask=allowed, min_tokens=2, stop_ids=[0])
        return int(pick(logits, greedy, [one]).tokens)

    assert [chosen([]), chosen([1]), chosen([1, 1])] == [1, 1, 0]
    assert chosen([], [True, False, True]) == 2
    assert chosen([], [True, False, False]) == 0, "a grammar that is complete wins"


def test_a_mask_forbids_whatever_the_other_edits_do() -> None:
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([False, True] * 4)
    one = edit(mask=mask, logit_bias={0: 100.0}, repetition_penalty=0.01, prompt=[2])
    rows = rows_of(*[SamplingParams(temperature=5.0)] * 500)
    rows.drawn[:] = np.arange(500)
    edits = [Edit(row, one.params, one.prompt, [], mask, frozenset()) for row in range(500)]
    assert set(pick(logits.expand(500, -1), rows, edits).tokens.tolist()) <= {1, 3, 5, 7}


def test_logprobs_are_the_model_s_own_under_edits() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    picked = pick(logits, rows_of(SamplingParams(temperature=0.0, logprobs=True)), [edit(logit_bias={0: 50.0})])
    assert picked.tokens.item() == 0
    assert picked.logprobs is not None
    assert picked.logprobs.item() == pytest.approx(logits.log_softmax(-1)[0, 0].item())


def test_nobody_wants_logprobs_and_none_are_computed() -> None:
    assert pick(torch.zeros(2, 4), rows_of(SamplingParams(), SamplingParams())).logprobs is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("min_p", 1.0),
        ("min_p", float("nan")),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 1000),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: 101.0}),
        ("stop", ("a", "")),
        ("prompt_logprobs", 21),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(GlmctlError, match=field):
        SamplingParams(**{field: value})
