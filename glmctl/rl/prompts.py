"""The order in which problems are drawn: an endless sequence of shuffled epochs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from glmctl.rl.environment import Problem
from glmctl.rl.seeds import derive_seed


class Prompts:
    """Draws from `problems`, each once an epoch: a function of (seed, name, number drawn), so it can be resumed."""

    def __init__(self, problems: Sequence[Problem], seed: int, *, name: str = "", drawn: int = 0) -> None:
        """name: of the pool; two pools of one run are shuffled apart."""
        assert problems
        self._problems = problems
        self._parts = (seed, "prompts", name) if name else (seed, "prompts")
        self._epoch, self._order = -1, list[int]()
        self.drawn = drawn

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems; with more than an epoch of them some twice."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Problem:
        epoch, at = divmod(self.drawn, len(self._problems))
        if epoch != self._epoch:
            self._order = list(range(len(self._problems)))
            random.Random(derive_seed(*self._parts, epoch)).shuffle(self._order)
            self._epoch = epoch
        self.drawn += 1
        return self._problems[self._order[at]]
