"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1; GLM-4.5 report section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_FLOOR = 1e-6
"""added to the standard deviation before dividing, and the spread up to which a group counts as all equal (slime)"""


def group_advantages(rewards: Sequence[float | None], *, std_normalize: bool) -> list[float]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6); without `std_normalize` A_i = r_i - mean(r).

    `rewards` are those of all samples of one prompt. None (an infrastructure failure) takes no part in mean and
    standard deviation and gets advantage 0; the caller keeps such a sample out of the loss as well. The standard
    deviation is the sample's (n - 1), as in slime. Fewer than two valid rewards, or all equal ones, give zeros.
    """
    valid = [reward for reward in rewards if reward is not None]
    if not has_signal(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(valid) / len(valid)
    scale = sample_std(valid) + STD_FLOOR if std_normalize else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def has_signal(rewards: Sequence[float | None]) -> bool:
    """Whether a group teaches anything: at least two valid rewards whose spread exceeds 1e-6 (dynamic sampling)."""
    valid = [reward for reward in rewards if reward is not None]
    return len(valid) >= 2 and sample_std(valid) > STD_FLOOR


def sample_std(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 in the denominator."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """0 up to `limit - cache` tokens, then falling in a straight line to -1 at `limit`, and -1 beyond.

    DAPO's soft over-long punishment (arXiv 2503.14476, eq. 13).
    """
    free = limit - cache
    return 0.0 if length <= free else max(-1.0, (free - length) / cache)
