"""What a difference between two scores is worth: pass@k, avg@k, intervals and paired tests, all exact or seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""bootstrap and sign-flip draws: the p value's own error is below 0.005"""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` samples, drawn without replacement from `samples`, is correct.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1). ValueError unless
    0 <= correct <= samples and 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def repeated(rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """`avg@n` and `pass@k` (k = 1, 2, 4 ... n) over problems that were each sampled n > 1 times.

    `rewards[i]` are the rewards of problem i's samples; a sample is correct when its reward is 1. Problems may have
    lost samples to the infrastructure: k goes up to the fewest that any has left.
    """
    fewest = min(len(one) for one in rewards)
    figures = {f"avg@{max(len(one) for one in rewards)}": _mean([_mean(one) for one in rewards])}
    for k in powers_of_two(fewest):
        estimates = [pass_at_k(len(one), sum(reward >= 1.0 for reward in one), k) for one in rewards]
        figures[f"pass@{k}"] = _mean(estimates)
    return figures


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())]


@dataclass(frozen=True)
class Paired:
    """Two systems on the same documents."""

    documents: int
    first: float
    second: float
    """mean scores"""
    wins: int
    ties: int
    losses: int
    """documents on which the second is better, equal, worse"""
    low: float
    high: float
    """95% interval of second - first"""
    p_value: float
    """two-sided, of the hypothesis that neither is better"""

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Paired:
    """Compare scores of the same documents, in the same order.

    The interval is the percentile bootstrap over documents. The test is McNemar's exact one (a binomial test of wins
    against losses) when every score is 0 or 1, else a sign-flip permutation test of the mean difference.
    ValueError when the two do not have as many documents, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} documents cannot be paired")
    difference_N = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    wins, losses = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    rng = np.random.default_rng(seed)
    low, high = _bootstrap(difference_N, rng)
    binary = all(score in (0.0, 1.0) for score in (*first, *second))
    p_value = mcnemar(wins, losses) if binary else _sign_flip(difference_N, rng)
    ties = len(first) - wins - losses
    return Paired(len(first), _mean(first), _mean(second), wins, ties, losses, low, high, p_value)


def wilson(count: int, of: int) -> tuple[float, float]:
    """95% interval of a share: Wilson 1927, which stays within 0..1 and is honest near its ends.

    ValueError unless 0 <= count <= of and of > 0.
    """
    if not 0 <= count <= of or of < 1:
        raise ValueError(f"{count} of {of} is no share")
    z, share = 1.959963984540054, count / of
    middle = share + z * z / (2 * of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p value of McNemar's test: both outcomes equally likely among documents that differ."""
    n = wins + losses
    tail: float = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of tests, adjusted so that below 0.05 means: 5% chance of any such among true hypotheses.

    Holm 1979, step-down: the smallest is multiplied by the number of tests, the next by one less, never falling.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _bootstrap(difference_N: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    means = np.concatenate([draws.mean(axis=1) for draws in _resampled(difference_N, rng)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled(values_N: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """RESAMPLES draws with replacement, in blocks that stay small whatever the number of documents."""
    block = max(1, min(RESAMPLES, 4_000_000 // len(values_N)))
    sizes = [block] * (RESAMPLES // block) + ([RESAMPLES % block] if RESAMPLES % block else [])
    return [values_N[rng.integers(0, len(values_N), (size, len(values_N)))] for size in sizes]


def _sign_flip(difference_N: np.ndarray, rng: np.random.Generator) -> float:
    seen = abs(difference_N.mean())
    reached = 0
    for _ in range(RESAMPLES // 100):
        signs_RN = rng.choice([-1.0, 1.0], size=(100, len(difference_N)))
        # equal up to rounding counts as reached: the flip by nothing is one of the flips
        reached += int((abs((signs_RN * difference_N).mean(axis=1)) >= seen - 1e-12).sum())
    return (reached + 1) / (RESAMPLES + 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
