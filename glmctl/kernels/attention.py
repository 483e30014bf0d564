"""Grouped-query attention in its three situations: whole rows, packed documents, and a cache.

Scores are q k / sqrt(d), query head h reads key-value head h // (H / K) (Ainslie et al. 2023). All functions
take q [B, T, H, d] and k, v [B, T, K, d], so that the projections' outputs are used without a copy. Values, and with
them the result, may have another width than queries and keys (MLA).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.fused import attention as fused
from glmctl.kernels.registry import op, variant


def causal_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """Every position sees itself and all earlier ones of its row. Returns [B, T, H, d]."""
    if fused.usable(q_BTHd, k_BTKd, v_BTKd):
        B, T = q_BTHd.shape[:2]
        return fused.documents(q_BTHd, k_BTKd, v_BTKd, torch.arange(B) * T, torch.full((B,), T))
    group = q_BTHd.shape[2] // k_BTKd.shape[2]
    if group > 1 and q_BTHd.device.type == "cuda" and q_BTHd.dtype == torch.float32:
        # torch has no kernel for grouped heads of this width there, and would make the whole matrix of scores
        k_BTKd, v_BTKd = k_BTKd.repeat_interleave(group, 2), v_BTKd.repeat_interleave(group, 2)
    out_BHTd = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BTKd.transpose(1, 2),
        v_BTKd.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BTHd.shape[2] != k_BTKd.shape[2],
    )
    return out_BHTd.transpose(1, 2)


class Bucket(NamedTuple):
    """Documents of about one length, to be attended together as a padded batch."""

    documents: int
    length: int
    """every document's length after padding"""


class Segments(NamedTuple):
    """Where the documents of a packed batch lie; built once per forward, used by every layer.

    A document is a run of one id within a row. Padding (id -1) belongs to none: its output is zero.
    """

    buckets: list[Bucket]
    source_P: Tensor
    """flat token (b T + t) that fills each padded place; places beyond a document's end repeat its first token"""
    place_N: Tensor
    """padded place of each flat token; padding points at the extra zero row after the last place"""
    documents_BT: Tensor
    start_S: Tensor
    """flat first token of each document, the longest first; on the CPU"""
    length_S: Tensor


def find_segments(documents_BT: Tensor) -> Segments:
    """Group the documents of a batch (ids [B, T], -1 = padding) into buckets of similar length."""
    B, T = documents_BT.shape
    ids = documents_BT.cpu()
    starts_BT = torch.ones(B, T, dtype=torch.bool)
    starts_BT[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = starts_BT.flatten().nonzero().squeeze(1)
    length = torch.diff(start, append=torch.tensor([B * T]))
    real = ids.flatten()[start] >= 0
    start, length = start[real], length[real]
    padded = torch.tensor([_round_up(n) for n in length.tolist()], dtype=torch.int64).clamp(max=T)
    buckets: list[Bucket] = []
    sources, places = [], torch.full((B * T,), -1, dtype=torch.int64)
    offset = 0
    for size in sorted(set(padded.tolist())):
        mine = (padded == size).nonzero().squeeze(1)
        within = torch.arange(size).expand(len(mine), size)
        inside = within < length[mine, None]
        source = start[mine, None] + torch.where(inside, within, 0)
        places[source[inside]] = offset + torch.arange(source.numel()).view_as(source)[inside]
        sources.append(source.flatten())
        buckets.append(Bucket(len(mine), size))
        offset += source.numel()
    places[places < 0] = offset
    source_P = torch.cat(sources) if sources else torch.zeros(0, dtype=torch.int64)
    device = documents_BT.device
    by_length = torch.argsort(length, descending=True, stable=True)
    return Segments(buckets, source_P.to(device), places.to(device), documents_BT, start[by_length], length[by_length])


def _round_up(length: int) -> int:
    """To a multiple of an eighth of the next power of two, at least 8: a ninth of a bucket is padding on average."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def document_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, segments: Segments) -> Tensor:
    """Causal attention that never crosses a document. Returns [B, T, H, d]; zero at padding."""
    result: Tensor = op("attention", q_BTHd.device.type, q_BTHd.dtype)(q_BTHd, k_BTKd, v_BTKd, segments)
    return result


@variant("attention", "reference")
def masked(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, segments: Segments) -> Tensor:
    """The definition: softmax over the allowed scores of the whole row."""
    ids = segments.documents_BT
    T, H, d = q_BTHd.shape[1:]
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    run_BT = starts.cumsum(1)
    allowed_BTT = (run_BT[:, :, None] == run_BT[:, None, :]) & torch.ones(T, T, device=ids.device).tril().bool()
    group = H // k_BTKd.shape[2]
    k_BTHd, v_BTHd = k_BTKd.repeat_interleave(group, dim=2), v_BTKd.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q_BTHd, k_BTHd) * d**-0.5
    weights = scores.masked_fill(~allowed_BTT[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bhts,bshd->bthd", weights, v_BTHd)
    return out * (ids >= 0)[..., None, None]


@variant("attention", "documents", devices=("cpu", "cuda"))
def by_document(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, segments: Segments) -> Tensor:
    """Compiled where it can be; else documents gathered into padded batches of similar length, each plainly causal.

    Padding lies behind a document's end, where causality hides it. The work is proportional to the sum of
    squared document lengths instead of B T^2.
    """
    if fused.usable(q_BTHd, k_BTKd, v_BTKd):
        return fused.documents(q_BTHd, k_BTKd, v_BTKd, segments.start_S, segments.length_S)
    B, T, H, _ = q_BTHd.shape
    width = v_BTKd.shape[-1]
    padded = [_regroup(x.reshape(B * T, -1), segments) for x in (q_BTHd, k_BTKd, v_BTKd)]
    # split, not slices: the backward of n slices is n full-size zero tensors
    shapes = [x.shape[2:] for x in (q_BTHd, k_BTKd, v_BTKd)]
    sizes = [bucket.documents * bucket.length for bucket in segments.buckets]
    parts = [
        causal_attention(*(x.view(*bucket, *s) for x, s in zip(qkv, shapes, strict=True))).reshape(-1, H * width)
        for bucket, *qkv in zip(segments.buckets, *(torch.split(x, sizes) for x in padded), strict=True)
    ]
    out_PW = torch.cat(parts) if parts else padded[0][:, : H * width]
    out: Tensor = _Ungroup.apply(out_PW, segments.source_P, segments.place_N)  # type: ignore[no-untyped-call]
    return out.view(B, T, H, width)


def _regroup(x_NW: Tensor, segments: Segments) -> Tensor:
    result: Tensor = _Regroup.apply(x_NW, segments.source_P, segments.place_N)  # type: ignore[no-untyped-call]
    return result


def _gather_or_zero(x_PW: Tensor, place_N: Tensor) -> Tensor:
    """Rows of x by place; the place after the last is a row of zeros."""
    return torch.cat([x_PW, x_PW.new_zeros(1, x_PW.shape[1])]).index_select(0, place_N)


class _Regroup(torch.autograd.Function):
    """Flat tokens to padded places. Its backward is a gather too, so nothing is added up in a random order."""

    @staticmethod
    def forward(ctx: Any, x_NW: Tensor, source_P: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(place_N)
        return x_NW.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, grad_PW: Tensor) -> tuple[Tensor, None, None]:
        (place_N,) = ctx.saved_tensors
        return _gather_or_zero(grad_PW, place_N), None, None


class _Ungroup(torch.autograd.Function):
    """Padded places back to flat tokens; places beyond a document's end get no gradient."""

    @staticmethod
    def forward(ctx: Any, x_PW: Tensor, source_P: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(source_P, place_N)
        return _gather_or_zero(x_PW, place_N)

    @staticmethod
    def backward(ctx: Any, grad_NW: Tensor) -> tuple[Tensor, None, None]:
        source_P, place_N = ctx.saved_tensors
        real = torch.zeros(source_P.numel() + 1, dtype=torch.bool, device=source_P.device)
        real[place_N] = True
        return grad_NW.index_select(0, source_P).mul_(real[:-1, None]), None, None


def additive_mask(visible_BTJ: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a place is visible and -inf elsewhere, with rows whose addresses suit torch's attention kernels."""
    *rows, places = visible_BTJ.shape
    padded = -(-places // 16) * 16
    mask = torch.full((*rows, padded), float("-inf"), dtype=dtype, device=visible_BTJ.device)
    return mask[..., :places].masked_fill_(visible_BTJ, 0.0)


def cached_attention(q_BTHd: Tensor, k_BKJd: Tensor, v_BKJd: Tensor, visible_BTJ: Tensor | None) -> Tensor:
    """Queries over cached keys. Returns [B, T, H, d].

    k, v [B, K, J, d] are the first J places of the cache; visible_BTJ (bool, or its `additive_mask`) tells which of
    them a query sees, None = all. The query heads of one key-value head become part of the query length, so keys and
    values are read once and never repeated.
    """
    B, T, H, d = q_BTHd.shape
    K = k_BKJd.shape[1]
    group = H // K
    q_BKQd = q_BTHd.view(B, T, K, group, d).permute(0, 2, 3, 1, 4).reshape(B, K, group * T, d)
    mask = None
    if visible_BTJ is not None:
        # a group's queries stand one group after another: [group, T]
        mask = visible_BTJ[:, None] if T == 1 else visible_BTJ.repeat(1, group, 1)[:, None]
    out = F.scaled_dot_product_attention(q_BKQd, k_BKJd, v_BKJd, attn_mask=mask)
    return out.view(B, K, group, T, -1).permute(0, 3, 1, 2, 4).reshape(B, T, H, -1)
