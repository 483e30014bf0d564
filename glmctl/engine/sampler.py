"""Vectorised sampling: one token per row by inverse CDF, each row with its own parameters and uniform stream.

The k-th token of a request uses the k-th number of the stream its seed names, whatever else is in the batch.
Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from glmctl.engine.logits import Edit, edited
from glmctl.engine.request import SamplingParams
from glmctl.kernels.draw import F32, F64, I64, Drawing, draw, scaled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1

U64 = npt.NDArray[np.uint64]


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

    temperature: F32
    top_k: I64
    top_p: F32
    min_p: F32
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
    """Sample each row: `edits`, then as `kernels.draw` says.

    Rows of temperature 0 take the largest logit. `logprobs` is of the temperature-scaled softmax of the logits as
    given, before edits and truncation (temperature 1 for greedy rows), so that it is what a trainer recomputes.
    """
    how = Drawing(rows.temperature, rows.top_k, rows.top_p, rows.min_p, uniforms(rows.stream, rows.drawn))
    wanted = bool(rows.logprobs.any())
    if edits:
        tokens_N, _ = draw(edited(logits_NV, edits), how, logprobs=False)
        logprobs_N = _logprobs(logits_NV, rows, tokens_N) if wanted else None
    else:
        tokens_N, logprobs_N = draw(logits_NV, how, logprobs=wanted)
    most = int(rows.top_logprobs.max(initial=0))
    top = _top(logits_NV, rows, most) if most else None
    return Picked(tokens_N, logprobs_N, top)


def _logprobs(logits_NV: Tensor, rows: Rows, tokens_N: Tensor) -> Tensor:
    scaled_NV = scaled(logits_NV, rows.temperature)
    return scaled_NV.gather(-1, tokens_N[:, None])[:, 0] - scaled_NV.logsumexp(-1)


def _top(logits_NV: Tensor, rows: Rows, most: int) -> tuple[Tensor, Tensor]:
    scaled_NV = scaled(logits_NV, rows.temperature)
    values, ids = scaled_NV.topk(min(most, scaled_NV.shape[-1]), dim=-1)
    return ids, values - scaled_NV.logsumexp(-1, keepdim=True)
