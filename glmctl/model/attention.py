"""How the positions of one forward pass see each other: decided once, used by every layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from glmctl.kernels.attention import (
    Segments,
    cached_attention,
    causal_attention,
    document_attention,
    find_segments,
)
from glmctl.model.cache import KVCache


class Sight(Protocol):
    """What a query may see.

    `attend` gets q [B, T, H, d], k, v [B, T, K, d] of one layer and returns [B, T, H, d] (values may be of another
    width). stored [B, T, 1, k]: what a compressed cache (`CacheSpec.value_dim` 0) keeps in place of k and v; k and v
    themselves must then be `stored` and its leading part wherever earlier passes are seen.
    """

    @property
    def continues(self) -> bool:
        """Whether positions of earlier passes are seen, through what the cache kept of them."""
        ...

    def attend(
        self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> Tensor: ...


class WholeRows:
    """Each row is one document."""

    continues = False

    def attend(
        self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> Tensor:
        """Plainly causal."""
        return causal_attention(q_BTHd, k_BTKd, v_BTKd)


class PackedDocuments:
    """Rows hold several documents and padding."""

    continues = False

    def __init__(self, documents_BT: Tensor) -> None:
        self.segments: Segments = find_segments(documents_BT)

    def attend(
        self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> Tensor:
        """Causal within a document."""
        return document_attention(q_BTHd, k_BTKd, v_BTKd, self.segments)


class Cached:
    """The pass continues rows of a cache: its keys and values are stored, then all up to each position are seen."""

    def __init__(self, cache: KVCache, rows: slice, positions_BT: Tensor) -> None:
        B, T = positions_BT.shape
        assert len(range(*rows.indices(cache.rows))) == B, "cache rows and batch differ"
        lowest, highest = (int(x) for x in positions_BT.aminmax())
        assert 0 <= lowest <= highest < cache.max_length, "position outside the cache"
        self.cache, self.rows, self.positions_BT = cache, rows, positions_BT
        self.seen = highest + 1
        expected = torch.arange(T, device=positions_BT.device)
        # rows that all begin an empty cache need no look at it: causality hides the right padding
        self.fresh = lowest == 0 and highest == T - 1 and bool((positions_BT == expected).all())
        aligned = lowest == highest
        self.visible_BTJ: Tensor | None = None
        if not self.fresh and not aligned:
            places = torch.arange(self.seen, device=positions_BT.device)
            self.visible_BTJ = places <= positions_BT[..., None]
        self.start = lowest if aligned or self.fresh else None
        self.row_B1 = torch.arange(*rows.indices(cache.rows), device=positions_BT.device)[:, None]

    @property
    def continues(self) -> bool:
        """Not when all rows begin with this pass."""
        return not self.fresh

    def attend(
        self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> Tensor:
        """Store k and v of `layer`, then attend to every stored place up to each query's position."""
        keys_SKJd, values_SKJd = self.cache.keys[layer], self.cache.values[layer]
        compressed = values_SKJd.shape[-1] == 0
        assert compressed == (stored_BT1k is not None)
        kept = ((keys_SKJd, k_BTKd), (values_SKJd, v_BTKd)) if stored_BT1k is None else ((keys_SKJd, stored_BT1k),)
        for stored, new in kept:
            if self.start is not None:
                stored[self.rows, :, self.start : self.start + new.shape[1]] = new.detach().transpose(1, 2)
            else:
                # two advanced indices around a slice: the indexed shape is [B, T, K, d]
                stored[self.row_B1, :, self.positions_BT] = new.detach().to(stored.dtype)
        if self.fresh:
            return causal_attention(q_BTHd, k_BTKd, v_BTKd)
        k_BKJd = keys_SKJd[self.rows, :, : self.seen].to(q_BTHd.dtype)
        if compressed:
            return cached_attention(q_BTHd, k_BKJd, k_BKJd[..., : v_BTKd.shape[-1]], self.visible_BTJ)
        v_BKJd = values_SKJd[self.rows, :, : self.seen].to(q_BTHd.dtype)
        return cached_attention(q_BTHd, k_BKJd, v_BKJd, self.visible_BTJ)


def choose_sight(documents_BT: Tensor | None, cache: KVCache | None, rows: slice | None, positions_BT: Tensor) -> Sight:
    """The sight of one forward pass; a cache excludes packed documents."""
    if cache is not None:
        assert documents_BT is None, "packed documents cannot be cached"
        return Cached(cache, rows or slice(0, positions_BT.shape[0]), positions_BT)
    if documents_BT is None:
        return WholeRows()
    packed = PackedDocuments(documents_BT)
    B, T = documents_BT.shape
    one_each = packed.segments.buckets == [(B, T)] and bool((documents_BT[:, 0] >= 0).all())
    # then every row is one document from its first column on, and what follows it is padding
    if one_each:
        return WholeRows()
    return packed
