"""Attention over packed documents and over a cache against plain softmax in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmctl.kernels.attention import by_document, cached_attention, causal_attention, find_segments, masked
from glmctl.model.attention import PackedDocuments, WholeRows, choose_sight


def projections(B: int, T: int, heads: int, kv: int, d: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, n, d, generator=g, dtype=torch.float64).requires_grad_() for n in (heads, kv, kv)]


rows = st.lists(st.lists(st.integers(-1, 3), min_size=40, max_size=40), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(ids=rows)
def test_buckets_equal_the_mask_for_any_layout(ids: list[list[int]]) -> None:
    """Padding may lie anywhere; a document is a run of one id."""
    documents = torch.tensor(ids)
    segments = find_segments(documents)
    inputs = projections(len(ids), 40, 4, 2, 8)
    ours, expected = by_document(*inputs, segments), masked(*inputs, segments)
    torch.testing.assert_close(ours, expected)
    projection = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((ours * projection).sum(), inputs)
    right = torch.autograd.grad((expected * projection).sum(), inputs)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def test_documents_take_little_more_than_their_own_places() -> None:
    """The work saved is the point: little of a bucket is padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(17, 200, (40,), generator=generator).tolist()
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    segments = find_segments(documents)
    assert sum(b.documents for b in segments.buckets) == 40
    assert sum(b.documents * b.length for b in segments.buckets) <= 1.25 * sum(lengths)
    assert len(segments.buckets) <= 24


def test_causal_attention_equals_plain_softmax_with_repeated_heads() -> None:
    """Grouped heads are multi-head attention with keys and values repeated."""
    q, k, v = projections(2, 11, 6, 2, 8)
    out = causal_attention(q, k, v)
    k_all, v_all = k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k_all) / 8**0.5
    weights = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", weights, v_all))


@pytest.mark.parametrize("steps", [1, 3])
def test_cached_attention_equals_the_last_rows_of_causal(steps: int) -> None:
    q, k, v = projections(2, 9, 6, 2, 8)
    whole = causal_attention(q, k, v)
    positions = torch.arange(9 - steps, 9)
    visible = (torch.arange(9) <= positions[:, None]).expand(2, steps, 9)
    out = cached_attention(q[:, -steps:], k.transpose(1, 2), v.transpose(1, 2), visible if steps > 1 else None)
    torch.testing.assert_close(out, whole[:, -steps:])


def test_whole_rows_take_the_plain_path() -> None:
    positions = torch.arange(20).expand(2, 20)

    def chosen(documents: Tensor | None) -> type:
        return type(choose_sight(documents, None, None, positions))

    assert chosen(None) is WholeRows
    assert chosen(torch.tensor([[0] * 20, [1] * 20])) is WholeRows
    assert chosen(torch.tensor([[0] * 18 + [-1] * 2, [1] * 20])) is WholeRows
    assert chosen(torch.tensor([[0] * 10 + [2] * 10, [1] * 20])) is PackedDocuments
    assert chosen(torch.tensor([[-1] * 2 + [0] * 18, [1] * 20])) is PackedDocuments
    assert chosen(torch.full((2, 20), -1)) is PackedDocuments


def test_padding_only() -> None:
    q, k, v = projections(1, 5, 2, 1, 4)
    segments = find_segments(torch.full((1, 5), -1))
    out = by_document(q, k, v, segments)
    assert (out == 0).all()
    out.sum().backward()
    assert q.grad is not None
    assert (q.grad == 0).all()
