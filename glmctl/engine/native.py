"""The runner for CPUs: a whole step in one call of compiled code (`glmctl.kernels.cpu`).

Its products keep one order of summation for every row, whatever else the batch holds and however many threads work on
it: a request's logits are the same bit by bit alone and in company, in pieces and at once.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from glmctl.engine.cache import PagedCache
from glmctl.engine.native_weights import NativeWeights, WeightFormat
from glmctl.engine.runner import StepBatch, StepOutput
from glmctl.kernels.cpu.library import library
from glmctl.model.network import GlmMoe

_SPAN = 256
"""of attention.h: a block lies inside one span"""


class NativeRunner:
    """`engine.runner.Runner` in C++ for a model on the CPU and an fp32 cache; activations are fp32.

    weights: the matrices as the model stores them, without a copy, or packed to bf16, int8 or FP8. Uses as many
    threads as torch does. Raises EnvironmentProblem where the code cannot be compiled.

    In the cache's `keys` a block lies as [K, d, places], with dimensions before places (`attention.h`).
    """

    def __init__(self, model: GlmMoe, cache: PagedCache, *, weights: WeightFormat = "stored") -> None:
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (*cache.keys, *cache.values))
        assert cache.block_size <= _SPAN
        self.model, self.cache = model, cache
        self._library = library()
        self._weights = NativeWeights(model, weights, torch.get_num_threads())
        self._keys, self._values = _pointers(cache.keys), _pointers(cache.values)

    def step(self, batch: StepBatch) -> StepOutput:
        """See `Runner.step`."""
        return self._step(batch, None, self.model.config.vocab_size)

    def draft(self, batch: StepBatch) -> StepOutput:
        """See `Runner.draft`."""
        assert self.model.mtp is not None
        assert batch.hidden_ND is not None
        return self._step(batch, batch.hidden_ND.to(torch.float32).contiguous(), self._weights.drafted)

    def limit_drafts(self, tokens_S: Tensor | None) -> None:
        """See `Runner.limit_drafts`."""
        self._weights.limit_drafts(tokens_S)

    def refresh_weights(self) -> None:
        """See `Runner.refresh_weights`. Weights in place cost nothing; packed ones are packed again."""
        self._weights.refresh()

    @property
    def weights_nbytes(self) -> int:
        """Memory that weights take beyond the model's own."""
        return self._weights.nbytes

    def _step(self, batch: StepBatch, hidden_ND: Tensor | None, vocabulary: int) -> StepOutput:
        c = self.model.config
        self._weights.follow_rope()
        N, R = len(batch.token_N), len(batch.logit_rows_R)
        S, M = batch.block_table_SM.shape
        assert len(batch.position_N) == len(batch.sequence_N) == N
        assert hidden_ND is None or hidden_ND.shape == (N, c.hidden_size)
        table_SM = batch.block_table_SM.contiguous()
        assert table_SM.dtype == torch.int32
        logits_RV = torch.empty(R, vocabulary, dtype=torch.float32)
        out_ND = torch.empty(N, c.hidden_size, dtype=torch.float32)
        outside = self._library.glm_step(
            self._weights.handle,
            N,
            *(_int64(t).data_ptr() for t in (batch.token_N, batch.position_N, batch.sequence_N)),
            table_SM.data_ptr(),
            S,
            M,
            self.cache.blocks,
            self.cache.block_size,
            self._keys,
            self._values,
            R,
            _int64(batch.logit_rows_R).data_ptr(),
            None if hidden_ND is None else hidden_ND.data_ptr(),
            logits_RV.data_ptr(),
            out_ND.data_ptr(),
        )
        assert outside == 0, f"row {outside - 1} of the step points outside the vocabulary or the cache"
        return StepOutput(logits_RV, out_ND)


def _int64(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.int64
    assert tensor.is_contiguous()
    return tensor


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
