"""Steps of one token a request as CUDA graphs: one launch where the host would launch thousands of kernels.

A graph replays the kernels it recorded on the memory it recorded, so nothing in it may depend on where the requests
stand: requests and blocks are padded to powers of two, and what a request sees is computed from its position on the
device. A shape is recorded when it has been asked for a few times, and replayed from then on.

S sequences, M blocks, J = M * block size, both after padding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmctl.engine.cache import PagedCache
from glmctl.engine.runner import StepBatch, StepOutput
from glmctl.kernels.attention import additive_mask, cached_attention
from glmctl.kernels.experts import waits_for_device
from glmctl.model.block import MoE
from glmctl.model.network import GlmMoe

WORTH = 4
"""steps of a shape before it is recorded, which takes about as long as they did"""

MIN_BLOCKS = 16

GATHERED_BYTES = 256 << 20
"""Most that padded keys and values of one layer may take. Beyond it the device is busy anyway, and sequences of very
different lengths are better gathered in groups."""


class DecodeSight:
    """How one new place of each sequence sees the cache (`model.attention.Sight`), the same kernels at any position.

    position_S and table_SM, both int64, lie on the cache's device.
    """

    continues = True

    def __init__(self, cache: PagedCache, position_S: Tensor, table_SM: Tensor, dtype: torch.dtype) -> None:
        self.cache = cache
        size, heads = cache.block_size, cache.config.cache_spec.heads
        S, M = table_SM.shape
        device = table_SM.device
        head_K = torch.arange(heads, device=device)
        block_S1 = table_SM.gather(1, position_S.div(size, rounding_mode="floor")[:, None])
        self.place_P = ((block_S1 * heads + head_K) * size + (position_S % size)[:, None]).flatten()
        self.head_block_P = (table_SM[:, None] * heads + head_K[:, None]).flatten()
        visible_S1J = torch.arange(M * size, device=device) <= position_S[:, None, None]
        self.mask_S1J = additive_mask(visible_S1J, dtype)
        self.shape = (S, heads, M * size)

    def attend(
        self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> Tensor:
        """Store this layer's keys and values of every row, then attend. B is 1 and T is S."""
        self.cache.store(layer, self.place_P, k_BTKd, v_BTKd, stored_BT1k)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q_S1Hd = q_BTHd.transpose(0, 1)
        k_SKJd = self._gather(keys).to(q_S1Hd.dtype)
        if values.shape[-1] == 0:
            out_S1Hd = cached_attention(q_S1Hd, k_SKJd, k_SKJd[..., : v_BTKd.shape[-1]], self.mask_S1J)
        else:
            out_S1Hd = cached_attention(q_S1Hd, k_SKJd, self._gather(values).to(q_S1Hd.dtype), self.mask_S1J)
        return out_S1Hd.transpose(0, 1)

    def _gather(self, stored: Tensor) -> Tensor:
        """[S, K, J, d]: the blocks of each sequence one behind the other."""
        size, d = stored.shape[2:]
        return stored.view(-1, size * d).index_select(0, self.head_block_P).view(*self.shape, d)


@dataclass(frozen=True)
class _Recorded:
    """One shape's graph."""

    graph: torch.cuda.CUDAGraph
    feed: Tensor
    """what it reads: token, position and block ids of each sequence, int64 [S, 2 + M]"""
    out: StepOutput
    """what it writes, S rows"""


class DecodeGraphs:
    """The graphs of one model and cache; all share their memory, as no two run at once."""

    def __init__(self, model: GlmMoe, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.replayed = 0
        """steps that were replayed"""
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._asked: Counter[tuple[int, int]] = Counter()
        self._waiting: dict[int, bool] = {}
        self._weights = self._addresses()
        self._pool: Any = None

    @staticmethod
    def possible(model: GlmMoe) -> bool:
        """Whether steps of the model may be recorded at all."""
        # YaRN's frequencies are computed on the host
        return model.device.type == "cuda" and model.config.rope_scaling is None

    def refresh(self) -> None:
        """The weights were changed: where they are no longer where they were, the graphs are forgotten."""
        if (weights := self._addresses()) != self._weights:
            self._weights = weights
            self._recorded.clear()
            self._waiting.clear()
            self._pool = None

    def step(self, batch: StepBatch) -> StepOutput | None:
        """The step by a graph; None when it is not one token of each sequence, or has no graph (yet)."""
        S = len(batch.token_N)
        if len(batch.block_table_SM) != S or len(batch.logit_rows_R) != S:
            return None
        shape = self._shape(batch)
        if shape is None:
            return None
        self._asked[shape] += 1
        if self._asked[shape] < WORTH or self._waits(shape[0]):
            return None
        feed = feed_of(batch, *shape)
        recorded = self._recorded.get(shape)
        if recorded is None:
            recorded = self._recorded[shape] = self._record(feed)
        recorded.feed.copy_(feed)
        recorded.graph.replay()
        self.replayed += 1
        # of its own: the next replay writes here
        return StepOutput(recorded.out.logits_RV[:S].clone(), recorded.out.hidden_ND[:S].clone())

    def _shape(self, batch: StepBatch) -> tuple[int, int] | None:
        """S and M after padding; None where that is too much."""
        size = self.cache.block_size
        needed = int(batch.position_N.max()) // size + 1
        S = _power_of_two(len(batch.token_N))
        M = min(_power_of_two(max(needed, MIN_BLOCKS)), batch.block_table_SM.shape[1])
        spec = self.cache.config.cache_spec
        gathered = S * M * size * spec.numbers * self.cache.keys[0].element_size()
        return None if gathered > GATHERED_BYTES else (S, M)

    def _waits(self, S: int) -> bool:
        """Whether somewhere in such a step the host waits for the device."""
        known = self._waiting.get(S)
        if known is None:
            moes = [module for module in self.model.layers.modules() if isinstance(module, MoE)]
            weights = [(moe.experts.gate_up_proj, moe.experts.down_proj) for moe in moes]
            known = self._waiting[S] = any(waits_for_device(S, *each) for each in weights)
        return known

    def _record(self, feed: Tensor) -> _Recorded:
        fed = feed.to(self.model.device)
        graph = torch.cuda.CUDAGraph()
        # once outside: libraries make their workspaces, operations their tables. It stores what the replay will
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.forward(fed)
        torch.cuda.current_stream().wait_stream(aside)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # a checkpoint may be on its way to the disk in another thread
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self.forward(fed)
        return _Recorded(graph, fed, out)

    def forward(self, feed: Tensor) -> StepOutput:
        position_S = feed[:, 1]
        sight = DecodeSight(self.cache, position_S, feed[:, 2:], self.model.dtype)
        hidden_SD = self.model(feed[None, :, 0], positions_BT=position_S[None], sight=sight)[0]
        return StepOutput(self.model.logits(hidden_SD), hidden_SD)

    def _addresses(self) -> tuple[object, ...]:
        # the config holds numbers that a graph has in it, as RoPE's base
        tensors = (*self.model.parameters(), *self.model.buffers())
        return (self.model.config, *(tensor.data_ptr() for tensor in tensors))


def feed_of(batch: StepBatch, S: int, M: int) -> Tensor:
    """int64 [S, 2 + M]; padding repeats the last sequence, which stores the same in the same place."""
    table = batch.block_table_SM.numpy()
    feed = np.zeros((S, 2 + M), np.int64)
    count = len(table)
    feed[:count, 0], feed[:count, 1] = batch.token_N.numpy(), batch.position_N.numpy()
    feed[:count, 2:] = table[:, :M]
    feed[count:] = feed[count - 1]
    return torch.from_numpy(feed)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
