"""Vectorised sampling: one token per row by inverse CDF, each row with its own parameters and uniform stream.

The k-th token of a request uses the k-th number of the stream its seed names, whatever else is in the batch.
Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glmctl.engine.logits import Edit, edited
from glmctl.engine.request import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


def _mix(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def stream_of(seed: int) -> int:
    """Where the stream of `seed` begins (64 bits); seeds are taken modulo 2^64."""
    return int(_mix(np.array([seed & _MASK], dtype=np.uint64) + _GOLDEN)[0])


def uniforms(streams: U64, index: I64) -> F64:
    """The `index`-th number in [0, 1) of each stream, 52 bits fine.

    SplitMix64 (Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 17) read by
    counter: no state to keep or move, and any position is reached at once.
    """
    bits = _mix(streams + (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    # 52 and not 53 bits: u * total must stay below total in float64
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


@dataclass
class Rows:
    """Sampling parameters of N rows as arrays, so that a step needs no Python loop."""

    temperature: npt.NDArray[np.float32]
    top_k: I64
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    stream: U64
    logprobs: npt.NDArray[np.bool_]
    top_logprobs: I64
    drawn: I64
    """tokens generated before: the index into the stream"""

    @classmethod
    def empty(cls, rows: int) -> Rows:
        """Greedy rows."""
        return cls(
            temperature=np.zeros(rows, np.float32),
            top_k=np.zeros(rows, np.int64),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            stream=np.zeros(rows, np.uint64),
            logprobs=np.zeros(rows, np.bool_),
            top_logprobs=np.zeros(rows, np.int64),
            drawn=np.zeros(rows, np.int64),
        )

    def put(self, row: int, params: SamplingParams) -> None:
        """Set a row to a request's parameters."""
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.stream[row] = stream_of(params.seed)
        self.logprobs[row] = params.logprobs
        self.top_logprobs[row] = params.top_logprobs

    def select(self, rows: I64) -> Rows:
        """A copy of some rows, in this order."""
        return Rows(**{name: array[rows] for name, array in vars(self).items()})


@dataclass
class Picked:
    """One token per row: ids [N], log-probabilities [N] (float32), and the likeliest alternatives when asked for."""

    tokens: Tensor
    logprobs: Tensor | None
    """None when no row wants them"""
    top: tuple[Tensor, Tensor] | None
    """ids and log-probabilities, each [N, largest top_logprobs of the rows]"""


def pick(logits_NV: Tensor, rows: Rows, edits: Sequence[Edit] = ()) -> Picked:
    """Sample each row: `edits`, temperature, then top-k, then top-p, then min-p, then inverse CDF on what is left.

    Rows of temperature 0 take the largest logit. `logprobs` is of the temperature-scaled softmax of the logits as
    given, before edits and truncation (temperature 1 for greedy rows), so that it is what a trainer recomputes.
    """
    scaled_NV = _scaled(edited(logits_NV, edits) if edits else logits_NV, rows)
    sampled = np.flatnonzero(rows.temperature > 0)
    if sampled.size == len(rows.temperature):
        tokens_N = _draw(scaled_NV, rows)
    else:
        tokens_N = scaled_NV.argmax(-1)
        if sampled.size:
            chosen = torch.from_numpy(sampled).to(scaled_NV.device)
            tokens_N[chosen] = _draw(scaled_NV[chosen], rows.select(sampled))
    if not rows.logprobs.any():
        return Picked(tokens_N, None, None)
    if edits:
        scaled_NV = _scaled(logits_NV, rows)
    normalizer_N = scaled_NV.logsumexp(-1)
    logprobs_N = scaled_NV.gather(-1, tokens_N[:, None])[:, 0] - normalizer_N
    most = int(rows.top_logprobs.max(initial=0))
    top = None
    if most:
        values, ids = scaled_NV.topk(min(most, scaled_NV.shape[-1]), dim=-1)
        top = ids, values - normalizer_N[:, None]
    return Picked(tokens_N, logprobs_N, top)


def _scaled(logits_NV: Tensor, rows: Rows) -> Tensor:
    """Divided by the temperature; greedy rows as they are."""
    if ((rows.temperature == 0) | (rows.temperature == 1)).all():
        return logits_NV
    temperature = np.where(rows.temperature > 0, rows.temperature, np.float32(1))
    return logits_NV / torch.from_numpy(temperature).to(logits_NV.device)[:, None]


def _draw(scaled_NV: Tensor, rows: Rows) -> Tensor:
    """Tokens [N] by inverse CDF; every row has a positive temperature, which is already divided out."""
    u_N = torch.from_numpy(uniforms(rows.stream, rows.drawn)).to(scaled_NV.device)
    truncated = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    if not truncated.any():
        return _inverse_cdf(scaled_NV.softmax(-1), u_N)
    if truncated.all():
        return _draw_truncated(scaled_NV, rows, u_N)
    tokens_N = torch.empty(len(scaled_NV), dtype=torch.long, device=scaled_NV.device)
    for mask, draw_truncated in ((truncated, True), (~truncated, False)):
        index = np.flatnonzero(mask)
        chosen = torch.from_numpy(index).to(scaled_NV.device)
        if draw_truncated:
            tokens_N[chosen] = _draw_truncated(scaled_NV[chosen], rows.select(index), u_N[chosen])
        else:
            tokens_N[chosen] = _inverse_cdf(scaled_NV[chosen].softmax(-1), u_N[chosen])
    return tokens_N


def _draw_truncated(scaled_NV: Tensor, rows: Rows, u_N: Tensor) -> Tensor:
    device = scaled_NV.device
    vocab = scaled_NV.shape[-1]
    # stable: equal logits stay in id order, so that exactly top_k tokens survive, the same ones in every batch
    sorted_NV, ids_NV = scaled_NV.sort(dim=-1, descending=True, stable=True)
    kept_k = torch.from_numpy(np.where(rows.top_k > 0, np.minimum(rows.top_k, vocab), vocab)).to(device)[:, None]
    rank_V = torch.arange(vocab, device=device)
    probs_NV = sorted_NV.masked_fill(rank_V >= kept_k, float("-inf")).softmax(-1)
    top_p = torch.from_numpy(rows.top_p).to(device)[:, None]
    before_NV = probs_NV.cumsum(-1, dtype=torch.float64) - probs_NV
    # the likeliest token always stays: nothing comes before it
    probs_NV = probs_NV.masked_fill((before_NV >= top_p) & (top_p < 1), 0.0)
    min_p = torch.from_numpy(rows.min_p).to(device)[:, None]
    probs_NV = probs_NV.masked_fill(probs_NV < min_p * probs_NV[:, :1], 0.0)
    return ids_NV.gather(-1, _inverse_cdf(probs_NV, u_N)[:, None])[:, 0]


def _inverse_cdf(weights_NV: Tensor, u_N: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds u * total; an index of weight zero is never taken."""
    cdf_NV = weights_NV.cumsum(-1, dtype=torch.float64)
    target_N1 = u_N[:, None] * cdf_NV[:, -1:]
    # NaN weights would land behind the end; the engine refuses non-finite logits before
    return torch.searchsorted(cdf_NV, target_N1, right=True)[:, 0].clamp_max(weights_NV.shape[-1] - 1)
