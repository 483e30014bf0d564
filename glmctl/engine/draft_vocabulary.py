"""Which tokens are worth drafting: the few that make up nearly all of what an engine has seen.

A draft needs the model's head, which at GLM's shapes is as large as several layers of a step; of 151,552 tokens a
service meets a fraction. Drafting among those alone is right nearly as often and reads a fraction of the head. What is
emitted never depends on it (`engine.speculative`): a token outside is simply not drafted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

COVERED = 0.99
"""share of the tokens seen that the vocabulary holds"""
EVERY = 1 << 16
"""tokens seen between two choices; what was seen before counts half each time, so that it follows the service"""
MULTIPLE = 64


class DraftVocabulary:
    """Counts tokens; `chosen` after enough of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._counts = np.zeros(size, np.float64)
        self._since = 0

    def see(self, tokens: Sequence[int]) -> bool:
        """Count a finished request's tokens; says whether it is time to choose."""
        np.add.at(self._counts, np.asarray(tokens, np.int64), 1.0)
        self._since += len(tokens)
        return self._since >= EVERY

    def chosen(self) -> Tensor | None:
        """Ids, ascending, int64; None (all) while fewer than half of the vocabulary would not cover what was seen."""
        self._since = 0
        order = np.argsort(-self._counts, kind="stable")
        covered = np.cumsum(self._counts[order])
        self._counts *= 0.5
        needed = int(np.searchsorted(covered, COVERED * covered[-1])) + 1
        needed = -(-needed // MULTIPLE) * MULTIPLE
        return torch.from_numpy(np.sort(order[:needed])) if 2 * needed <= self.size else None
