"""One token of each row of logits: temperature, top-k, top-p, min-p, then inverse CDF with a given uniform number.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glmctl.kernels.cpu.library import compiled
from glmctl.kernels.registry import op, variant

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


class Drawing(NamedTuple):
    """How each of N rows is drawn; contiguous arrays, so that a step needs no Python loop."""

    temperature: F32
    """0: the largest logit, of equal ones the first; all else is then without effect"""
    top_k: I64
    """0: all"""
    top_p: F32
    """1: all"""
    min_p: F32
    """0: all"""
    uniform: F64
    """in [0, 1)"""

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """Which rows do not draw from the whole vocabulary."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)

    def select(self, rows: I64) -> Self:
        """Some rows, in this order."""
        return type(self)(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows]
        )


def draw(logits_NV: Tensor, how: Drawing, *, logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens [N] (int64), and when asked for their log-probabilities [N] (fp32) in the softmax at the row's temperature
    (1 for temperature 0) over the whole vocabulary, before truncation. logits_NV fp32; -inf forbids a token.

    A row's token does not depend on the other rows. Top-k keeps exactly k, of equal logits those of lower id; top-p
    keeps the likeliest of these up to the one that reaches its mass; min-p drops what is less likely than that share of
    the likeliest. The first of these, by descending logit where anything is truncated and else by id, whose cumulative
    probability exceeds `uniform` times the whole is drawn; one of probability 0 never is.
    """
    implementation = op("draw", logits_NV.device.type, logits_NV.dtype)
    result: tuple[Tensor, Tensor | None] = implementation(logits_NV, how, logprobs)
    return result


def scaled(logits_NV: Tensor, temperature: F32) -> Tensor:
    """Divided by the temperature; rows of temperature 0 as they are."""
    if ((temperature == 0) | (temperature == 1)).all():
        return logits_NV
    divisor = np.where(temperature > 0, temperature, np.float32(1))
    return logits_NV / torch.from_numpy(divisor).to(logits_NV.device)[:, None]


@variant("draw", "reference")
def reference(logits_NV: Tensor, how: Drawing, logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """The definition."""
    scaled_NV = scaled(logits_NV, how.temperature)
    sampled = np.flatnonzero(how.temperature > 0)
    if sampled.size == len(how.temperature):
        tokens_N = _sample(scaled_NV, how)
    else:
        tokens_N = scaled_NV.argmax(-1)
        if sampled.size:
            chosen = torch.from_numpy(sampled).to(scaled_NV.device)
            tokens_N[chosen] = _sample(scaled_NV[chosen], how.select(sampled))
    if not logprobs:
        return tokens_N, None
    return tokens_N, scaled_NV.gather(-1, tokens_N[:, None])[:, 0] - scaled_NV.logsumexp(-1)


@variant("draw", "native", devices=("cpu",), dtypes=(torch.float32,))
def native(logits_NV: Tensor, how: Drawing, logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """Two passes over the logits, without torch's threads: those would go on spinning beside the step's own."""
    library = compiled()
    if library is None:
        return reference(logits_NV, how, logprobs)
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    N, V = logits_NV.shape
    assert all(len(array) == N and array.flags.c_contiguous for array in how)
    tokens_N = np.empty(N, np.int64)
    logprobs_N = np.empty(N, np.float32) if logprobs else None
    library.glm_draw(
        N,
        V,
        logits_NV.data_ptr(),
        logits_NV.stride(0),
        *(array.ctypes.data for array in how),
        tokens_N.ctypes.data,
        None if logprobs_N is None else logprobs_N.ctypes.data,
        torch.get_num_threads(),
    )
    return torch.from_numpy(tokens_N), None if logprobs_N is None else torch.from_numpy(logprobs_N)


def _sample(scaled_NV: Tensor, how: Drawing) -> Tensor:
    """Every row has a positive temperature, which is already divided out."""
    truncated = how.truncated
    u_N = torch.from_numpy(how.uniform).to(scaled_NV.device)
    if not truncated.any():
        return _inverse_cdf(scaled_NV.softmax(-1), u_N)
    if truncated.all():
        return _sample_truncated(scaled_NV, how, u_N)
    tokens_N = torch.empty(len(scaled_NV), dtype=torch.long, device=scaled_NV.device)
    for mask, truncates in ((truncated, True), (~truncated, False)):
        index = np.flatnonzero(mask)
        chosen = torch.from_numpy(index).to(scaled_NV.device)
        if truncates:
            tokens_N[chosen] = _sample_truncated(scaled_NV[chosen], how.select(index), u_N[chosen])
        else:
            tokens_N[chosen] = _inverse_cdf(scaled_NV[chosen].softmax(-1), u_N[chosen])
    return tokens_N


def _sample_truncated(scaled_NV: Tensor, how: Drawing, u_N: Tensor) -> Tensor:
    device = scaled_NV.device
    vocab = scaled_NV.shape[-1]
    # stable: equal logits stay in id order, so that exactly top_k tokens survive, the same ones in every batch
    sorted_NV, ids_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    kept_k = torch.from_numpy(np.where(how.top_k > 0, np.minimum(how.top_k, vocab), vocab)).to(device)[:, None]
    rank_V = torch.arange(vocab, device=device)
    probs_NV = sorted_NV.masked_fill(rank_V >= kept_k, float("-inf")).softmax(-1)
    top_p = torch.from_numpy(how.top_p).to(device)[:, None]
    before_NV = probs_NV.cumsum(-1, dtype=torch.float64) - probs_NV
    # the likeliest token always stays: nothing comes before it
    probs_NV = probs_NV.masked_fill((before_NV >= top_p) & (top_p < 1), 0.0)
    min_p = torch.from_numpy(how.min_p).to(device)[:, None]
    probs_NV = probs_NV.masked_fill(probs_NV < min_p * probs_NV[:, :1], 0.0)
    return ids_NV.gather(-1, _inverse_cdf(probs_NV, u_N)[:, None])[:, 0]


def _inverse_cdf(weights_NV: Tensor, u_N: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u * total; an index of weight zero is never taken."""
    cdf_NV = weights_NV.cumsum(-1, dtype=torch.float64)
    target_N1 = u_N[:, None] * cdf_NV[:, -1:]
    # NaN weights would land behind the end; the engine refuses non-finite logits before
    return torch.searchsorted(cdf_NV, target_N1, right=True)[:, 0].clamp_max(weights_NV.shape[-1] - 1)
