"""What keeps a bad step from the weights: non-finite and spiking steps are recognised, counted and written down.

A spike is a step whose gradient norm exceeds `spike_factor` times the median of the last applied steps *and* whose loss
lies more than SPIKE_NATS above their median loss: either alone happens in healthy runs (harder data; a loss near zero,
where norms jump), and clipping bounds it. A new stage of data may do both, so no step is measured by another stage's.
Everything it decides by is the same on all ranks.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from glmctl import console
from glmctl.errors import DivergedError
from glmctl.run.metrics import MetricsLog

MAX_SKIPPED = 3
"""skipped steps in a row after which training stops"""

WINDOW = 32
"""applied steps that the medians are taken over"""

SETTLED = 16
"""applied steps of a stage before anything counts as a spike: the first gradients of a run are its largest"""

SPIKE_NATS = 1.0

Reason = Literal["not finite", "spike"]


class StepGuard:
    """Judges each step before the update and remembers what was skipped."""

    def __init__(self, spike_factor: float | None = None, log: MetricsLog | None = None) -> None:
        """`spike_factor` None: only non-finite steps are skipped. `log` gets one row for each skipped step."""
        self.spike_factor = spike_factor
        self.log = log
        self.skipped = 0
        """skipped steps so far"""
        self.skipped_in_row = 0
        self._stage: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def enter(self, stage: int) -> None:
        """The steps that follow are of `stage`; the medians of another stage's are forgotten.

        Other data, another length and another RoPE base have another loss and other gradients. Skipped steps do not
        move the medians, so a border taken for a spike would stay one for good.
        """
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()
            self._norms.clear()

    def verdict(self, loss: float | None, norm: float) -> Reason | None:
        """Why the step must not be taken, None when it may. `loss` None: unknown, the norm decides alone."""
        if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
            return "not finite"
        if self.spike_factor is None or loss is None or len(self._norms) < SETTLED:
            return None
        large = norm > self.spike_factor * statistics.median(self._norms)
        return "spike" if large and loss > statistics.median(self._losses) + SPIKE_NATS else None

    def applied(self, loss: float | None, norm: float) -> None:
        """Take a step that was made into the medians."""
        self.skipped_in_row = 0
        if loss is not None:
            self._losses.append(loss)
            self._norms.append(norm)

    def skip(self, reason: Reason, loss: float | None, norm: float, source: Mapping[str, Any]) -> None:
        """Count and write down a step that was not made. DivergedError when it is the third in a row."""
        self.skipped += 1
        self.skipped_in_row += 1
        if self.log is not None:
            self.log.append({**source, "reason": reason, "loss": loss, "grad_norm": norm})
        where = "" if self.log is None else f"; its batch is named in {self.log.path}"
        if self.skipped_in_row >= MAX_SKIPPED:
            raise DivergedError(
                f"{self.skipped_in_row} steps in a row were left out, the last because it was "
                f"{'a spike' if reason == 'spike' else reason}; the weights are those from before them{where}",
                hint="the same command with a lower schedule.peak_lr or grad_clip goes on from the last checkpoint",
            )
        what = "a spike" if reason == "spike" else "not finite"
        console.warn(f"loss {loss} and gradient norm {norm:.3g} are {what}: this step changes nothing{where}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        counts = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        return {**counts, "stage": self._stage, "losses": list(self._losses), "norms": list(self._norms)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up `state()` of an earlier process."""
        self.skipped, self.skipped_in_row = int(state["skipped"]), int(state["skipped_in_row"])
        self._stage = state["stage"]
        self._losses = deque(map(float, state["losses"]), maxlen=WINDOW)
        self._norms = deque(map(float, state["norms"]), maxlen=WINDOW)
