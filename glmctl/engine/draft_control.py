"""Whether drafts pay on this machine, for this model and this load: measured while serving, decided by one comparison.

With drafts a step costs more (the rows of the drafts, and the MTP layer once for each) and emits more tokens. Every
few steps a step goes without them, so that both paces are known side by side under the same load. Tokens do not depend
on the outcome (`engine.speculative`), only their pace does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from glmctl import console

PROBE_EVERY = 16
"""every how many steps one goes without drafts"""
PROBES = 8
"""steps without drafts that a decision is made from"""
MARGIN = 0.03
"""drafts stay while they lose less than this: two timings of the same thing differ by as much"""
REST_STEPS = 2000
"""how long drafts rest before they are tried again; twice as long after each time they lose"""
LONGEST_REST = 64_000


@dataclass(frozen=True)
class Timed:
    """One step in which every request decoded."""

    requests: int
    tokens: int
    seconds: float


def pace(steps: Sequence[Timed]) -> float:
    """Tokens a second of one request: mean tokens over median seconds, so that a hiccup does not decide."""
    tokens = sum(step.tokens for step in steps) / sum(step.requests for step in steps)
    return tokens / median(step.seconds for step in steps)


def loses(plain: Sequence[Timed], drafted: Sequence[Timed]) -> bool:
    """Whether decoding with drafts is slower than without."""
    return pace(drafted) < (1 - MARGIN) * pace(plain)


class DraftControl:
    """Switches drafts off where they lose, says so, and tries again later."""

    def __init__(self) -> None:
        self.drafting = True
        self._plain: list[Timed] = []
        self._drafted: list[Timed] = []
        self._rest = REST_STEPS
        self._left = 0

    @property
    def probing(self) -> bool:
        """Whether the next step goes without drafts to see what that costs."""
        return self.drafting and len(self._drafted) >= (PROBE_EVERY - 1) * (1 + len(self._plain))

    def timed(self, step: Timed, *, plain: bool) -> None:
        """Take a step into account: a plain one's time is without the MTP layer's."""
        (self._plain if plain else self._drafted).append(step)
        if len(self._plain) < PROBES:
            return
        if loses(self._plain, self._drafted):
            console.note(
                f"MTP drafts switched off for {self._rest} steps: {pace(self._drafted):.1f} tokens/s a request "
                f"with them, {pace(self._plain):.1f} without"
            )
            self.drafting, self._left = False, self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)
        self._plain, self._drafted = [], []

    def rested(self) -> None:
        """One step went by without drafts because they are off."""
        self._left -= 1
        self.drafting = self._left <= 0
