"""When a curve has stopped rising."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from glmctl.recipe.schema import PlateauRule


class Plateau:
    """Watches one value a step. It has a plateau once two full windows lie behind it and the later is hardly better.

    The report names convergence of the mean rollout reward as the signal and gives no window; comparing the means of
    two windows is our choice. `values` is all there is to save.
    """

    def __init__(self, rule: PlateauRule, values: Sequence[float] = ()) -> None:
        self._rule = rule
        self.values = list(values)

    def see(self, value: float) -> None:
        """One more value; those before the last two windows are forgotten."""
        self.values = [*self.values, value][-2 * self._rule.window :]

    @property
    def reached(self) -> bool:
        """Whether mean(last window) - mean(window before) < min_gain."""
        window = self._rule.window
        if len(self.values) < 2 * window:
            return False
        return fmean(self.values[window:]) - fmean(self.values[:window]) < self._rule.min_gain
