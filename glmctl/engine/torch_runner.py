"""The reference runner: the model's own modules over the paged cache, on any device.

Everything but attention works on the flat rows of the step. Attention takes sequences in groups of similar shape,
padded to the group's longest: pieces that begin a sequence attend to themselves without touching the cache, others
to the gathered blocks of their sequence. On a GPU steps of one token a sequence are replayed as CUDA graphs
(`engine.decode_graphs`).

A GEMM's rounding may depend on how many rows it has, so here a request's logits agree between batches only up to
fp32 rounding (about 1e-6 relative); greedy tokens can differ where two logits lie that close.

S sequences of a group, T its longest piece, M its blocks, J = M * block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glmctl.engine.cache import PagedCache
from glmctl.engine.decode_graphs import DecodeGraphs
from glmctl.engine.runner import StepBatch, StepOutput
from glmctl.kernels.attention import additive_mask, cached_attention, causal_attention
from glmctl.model.network import GlmMoe

I64 = npt.NDArray[np.int64]

_SHORT = 4
"""pieces up to this length (a token and its drafts) count as equally long when groups are formed"""
_LENGTH_SHARE = 0.75
_CACHE_SHARE = 0.5
"""a group is padded to its longest piece and longest cache: one shorter than this share of them opens another"""


class TorchRunner:
    """`engine.runner.Runner` by torch. Calls are made under `torch.inference_mode`."""

    def __init__(self, model: GlmMoe, cache: PagedCache, *, graphs: bool = True) -> None:
        """graphs: record steps of one token a request as CUDA graphs, on a GPU and where the model allows it."""
        self.model, self.cache = model, cache
        self.graphs = DecodeGraphs(model, cache) if graphs and DecodeGraphs.possible(model) else None
        self._scratch = Scratch()
        self._drafted_S: Tensor | None = None
        self._draft_head_SD: Tensor | None = None

    def step(self, batch: StepBatch) -> StepOutput:
        """See `Runner.step`."""
        if self.graphs is not None and (replayed := self.graphs.step(batch)) is not None:
            return replayed
        sight = PagedSight(self.cache, batch, 0, self._scratch)
        device = self.model.device
        hidden_1ND = self.model(
            batch.token_N[None].to(device), positions_BT=batch.position_N[None].to(device), sight=sight
        )
        return self._output(hidden_1ND, batch, self.model.head_weight)

    def draft(self, batch: StepBatch) -> StepOutput:
        """See `Runner.draft`."""
        assert self.model.mtp is not None
        assert batch.hidden_ND is not None
        sight = PagedSight(self.cache, batch, 1, self._scratch)
        device = self.model.device
        hidden_1ND = self.model.mtp(
            batch.hidden_ND[None],
            batch.token_N[None].to(device),
            positions_BT=batch.position_N[None].to(device),
            sight=sight,
        )
        head = self.model.head_weight if self._draft_head_SD is None else self._draft_head_SD
        return self._output(hidden_1ND, batch, head)

    def limit_drafts(self, tokens_S: Tensor | None) -> None:
        """See `Runner.limit_drafts`."""
        self._drafted_S = None if tokens_S is None else tokens_S.to(self.model.device)
        self._copy_head()

    def refresh_weights(self) -> None:
        """Parameters are used where they are; only the rows of the head that few drafts read are a copy."""
        if self.graphs is not None:
            self.graphs.refresh()
        self._copy_head()

    def _copy_head(self) -> None:
        ids = self._drafted_S
        self._draft_head_SD = None if ids is None else self.model.head_weight.detach()[ids]

    def _output(self, hidden_1ND: Tensor, batch: StepBatch, head_VD: Tensor) -> StepOutput:
        hidden_ND = hidden_1ND[0]
        wanted = batch.logit_rows_R
        rows_RD = hidden_ND if len(wanted) == len(hidden_ND) else hidden_ND[wanted.to(hidden_ND.device)]
        return StepOutput(torch.nn.functional.linear(rows_RD, head_VD).float(), hidden_ND)


class Scratch:
    """Two buffers that grow as needed: fresh memory of this size at every layer would cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None, None]

    def take(self, which: int, like: Tensor, numel: int) -> Tensor:
        """A flat tensor of `numel` elements; overwritten by the next call with the same `which`."""
        buffer = self._buffers[which]
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[which] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return buffer[:numel]


@dataclass(frozen=True)
class _Group:
    """Sequences that attend together."""

    shape: tuple[int, int]
    """S, T"""
    rows: slice | Tensor
    """the flat row of each of the S x T places; a padded place repeats its sequence's last row"""
    real_P: Tensor | None
    """which of the S x T places are not padding; None = all"""
    real_rows: slice | Tensor
    """the flat rows of those"""
    head_block_SKM: Tensor | None
    """row of each (sequence, kv head, block) in the cache seen as [blocks x K, places x d]; None: nothing cached"""
    seen: slice
    """which of the J gathered places can be visible to anyone"""
    visible_STJ: Tensor | None
    """None: every place in `seen` is visible to every query"""


class PagedSight:
    """How the rows of one step see the cache (`model.attention.Sight`)."""

    continues = True

    def __init__(self, cache: PagedCache, batch: StepBatch, first_place: int, scratch: Scratch) -> None:
        self.cache, self.scratch = cache, scratch
        device = cache.keys[0].device
        size, heads = cache.block_size, cache.config.cache_spec.heads
        position, sequence = batch.position_N.numpy(), batch.sequence_N.numpy()
        table_SM = batch.block_table_SM.numpy()
        assert len(position) > 0
        assert int(position.min()) >= first_place
        block_N = table_SM[sequence, position // size].astype(np.int64)
        assert block_N.all(), "a row without a block"
        place_NK = (block_N[:, None] * heads + np.arange(heads)) * size + (position % size)[:, None]
        self.place_P = torch.from_numpy(place_NK.reshape(-1)).to(device)
        self.groups = list(_groups(position, sequence, table_SM, cache, first_place))
        self._masks: dict[int, Tensor] = {}

    def attend(
        self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> Tensor:
        """Store this layer's keys and values of every row, then attend. B is 1 and T the step's N."""
        self.cache.store(layer, self.place_P, k_BTKd, v_BTKd, stored_BT1k)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        shape = (*q_BTHd.shape[:-1], v_BTKd.shape[-1])
        if len(self.groups) == 1 and self.groups[0].real_P is None and isinstance(self.groups[0].rows, slice):
            return self._attend_group(self.groups[0], keys, values, q_BTHd, k_BTKd, v_BTKd).reshape(shape)
        out_BTHd = q_BTHd.new_empty(shape)
        for group in self.groups:
            out_PHd = self._attend_group(group, keys, values, q_BTHd, k_BTKd, v_BTKd).flatten(0, 1)
            if group.real_P is not None:
                out_PHd = out_PHd[group.real_P]
            out_BTHd[0, group.real_rows] = out_PHd
        return out_BTHd

    def _attend_group(
        self, group: _Group, keys: Tensor, values: Tensor, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
    ) -> Tensor:
        S, T = group.shape
        q_STHd = q_BTHd[0, group.rows].reshape(S, T, *q_BTHd.shape[2:])
        if group.head_block_SKM is None:
            k_STKd, v_STKd = (x[0, group.rows].reshape(S, T, *x.shape[2:]) for x in (k_BTKd, v_BTKd))
            return causal_attention(q_STHd, k_STKd, v_STKd)
        k_SKJd = self._gather(0, keys, group.head_block_SKM)[:, :, group.seen].to(q_STHd.dtype)
        mask_STJ = self._mask(group, q_STHd)
        if values.shape[-1] == 0:
            return cached_attention(q_STHd, k_SKJd, k_SKJd[..., : v_BTKd.shape[-1]], mask_STJ)
        v_SKJd = self._gather(1, values, group.head_block_SKM)[:, :, group.seen].to(q_STHd.dtype)
        return cached_attention(q_STHd, k_SKJd, v_SKJd, mask_STJ)

    def _mask(self, group: _Group, like: Tensor) -> Tensor | None:
        """`group.visible_STJ`; on a GPU as what is added to the scores, which torch would make of it in every layer."""
        visible_STJ = group.visible_STJ
        if visible_STJ is None or like.device.type == "cpu":
            return visible_STJ
        mask_STJ = self._masks.get(id(group))
        if mask_STJ is None or mask_STJ.dtype != like.dtype:
            mask_STJ = self._masks[id(group)] = additive_mask(visible_STJ, like.dtype)
        return mask_STJ

    def _gather(self, which: int, stored: Tensor, head_block_SKM: Tensor) -> Tensor:
        """[S, K, J, d]: the blocks of each sequence one behind the other."""
        S, K, M = head_block_SKM.shape
        size, d = stored.shape[2:]
        out = self.scratch.take(which, stored, S * K * M * size * d).view(S * K * M, size * d)
        torch.index_select(stored.view(-1, size * d), 0, head_block_SKM.view(-1), out=out)
        return out.view(S, K, M * size, d)


def _groups(
    position: I64, sequence: I64, table_SM: npt.NDArray[np.int32], cache: PagedCache, first_place: int
) -> Iterator[_Group]:
    """Split a step's sequences into groups of similar shape."""
    row_start = np.flatnonzero(np.diff(sequence, prepend=-1))
    length = np.diff(row_start, append=len(sequence))
    end = position[row_start] + length
    assert (position == np.arange(len(position)) + np.repeat(position[row_start] - row_start, length)).all()
    fresh = position[row_start] == first_place
    shape = np.maximum(length, _SHORT)
    order = np.lexsort((-end, -shape, fresh))
    kinds = zip(fresh[order].tolist(), shape[order].tolist(), end[order].tolist(), strict=True)
    begins, head, longest = list[int](), (False, 0), 0
    for index, (starts, pieces, ends) in enumerate(kinds):
        same = starts == head[0] and pieces >= _LENGTH_SHARE * head[1] and ends >= _CACHE_SHARE * longest
        if not begins or not same:
            begins.append(index)
            head, longest = (starts, pieces), 0
        longest = max(longest, ends)
    for members in np.split(order, begins[1:]):
        members.sort()
        table = None if fresh[members[0]] else table_SM[sequence[row_start[members]]]
        yield _group(row_start[members], length[members], end[members], table, cache, first_place)


def _group(
    row_start: I64,
    length: I64,
    end: I64,
    table_SM: npt.NDArray[np.int32] | None,
    cache: PagedCache,
    first_place: int,
) -> _Group:
    device = cache.keys[0].device
    S, T = len(length), int(length.max())
    within_ST = np.minimum(np.arange(T), length[:, None] - 1)
    rows_P = (row_start[:, None] + within_ST).reshape(-1)
    real_P = (np.arange(T) < length[:, None]).reshape(-1)
    whole = bool(real_P.all())
    rows = _as_slice(rows_P, device)
    head_block_SKM = visible_STJ = None
    seen = slice(first_place, int(end.max()))
    if table_SM is not None:
        heads = cache.config.cache_spec.heads
        blocks = -(-seen.stop // cache.block_size)
        head_block = table_SM[:, None, :blocks].astype(np.int64) * heads + np.arange(heads)[:, None]
        head_block_SKM = torch.from_numpy(head_block).to(device)
        if T > 1 or (end != end[0]).any():
            position_ST = (end - length)[:, None] + within_ST
            visible = np.arange(seen.start, seen.stop) <= position_ST[..., None]
            visible_STJ = torch.from_numpy(visible).to(device)
    return _Group(
        shape=(S, T),
        rows=rows,
        real_P=None if whole else torch.from_numpy(real_P).to(device),
        real_rows=rows if whole else _as_slice(rows_P[real_P], device),
        head_block_SKM=head_block_SKM,
        seen=seen,
        visible_STJ=visible_STJ,
    )


def _as_slice(rows: I64, device: torch.device) -> slice | Tensor:
    """A view where the rows are consecutive."""
    if rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
