"""The sampling temperature of the rollouts, raised when the reward has converged (GLM-4.5 report section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glmctl.recipe.schema import DynamicTemperature
from glmctl.rl.plateau import Plateau


def next_temperature(scores: Mapping[float, float], tolerance: float) -> float:
    """The largest temperature whose score is at most `tolerance` (a share of it) below the best score.

    `scores`: temperature -> held-out score, of either sign. GLM-4.5 report: the highest that costs no more than 1%.
    """
    best = max(scores.values())
    least = best - tolerance * abs(best)
    return max(temperature for temperature, score in scores.items() if score >= least)


class Temperature:
    """`value` is the temperature of the next rollouts. Without a spec it never changes."""

    def __init__(self, spec: DynamicTemperature | None, start: float) -> None:
        self._spec = spec
        self.value = start
        self._plateau = Plateau(spec.plateau) if spec is not None else None

    def after_step(self, step: int, reward: float, score_at: Callable[[float], float]) -> dict[str, Any]:
        """See the mean reward of `step`; validate the grid and choose again when that is due.

        `score_at(temperature)` scores the held-out problems with the weights as they are. Returns what to log: nothing,
        or why the grid was validated, its scores, and the choice. Afterwards the plateau is looked for anew, since
        rewards at two temperatures cannot be compared.
        """
        if self._spec is None or self._plateau is None:
            return {}
        self._plateau.see(reward)
        periodic = self._spec.every is not None and step % self._spec.every == 0
        if not (self._plateau.reached or periodic):
            return {}
        reason = "plateau" if self._plateau.reached else "periodic"
        scores = {temperature: score_at(temperature) for temperature in self._spec.grid}
        before, self.value = self.value, next_temperature(scores, self._spec.tolerance)
        if self.value != before or reason == "plateau":
            self._plateau = Plateau(self._spec.plateau)
        return {
            "temperature_reason": reason,
            "temperature_scores": {f"{temperature:g}": score for temperature, score in scores.items()},
            "temperature_next": self.value,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"value": self.value, "rewards": [] if self._plateau is None else list(self._plateau.values)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.value = float(state["value"])
        rewards: Sequence[float] = state["rewards"]
        if self._spec is not None:
            self._plateau = Plateau(self._spec.plateau, rewards)
