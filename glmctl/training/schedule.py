"""Learning rate and batch size as functions of how far training is (GLM-4.5 report section 2.4)."""

from __future__ import annotations

import math

from glmctl.recipe.schema import BatchRamp, Schedule


def lr_at(fraction: float, schedule: Schedule) -> float:
    """Rate at `fraction` of the whole run: 0 -> peak linearly over the warm-up, then one cosine to final_lr at 1.

    A step takes the rate at its own end, so the first step's is above 0 and the last step's is `final_lr`.
    Fractions beyond 1 (a last sequence that reaches over the end) keep `final_lr`.
    """
    assert fraction >= 0
    if fraction < schedule.warmup_fraction:
        return schedule.peak_lr * fraction / schedule.warmup_fraction
    rest = min(1.0, (fraction - schedule.warmup_fraction) / (1.0 - schedule.warmup_fraction))
    return schedule.final_lr + (schedule.peak_lr - schedule.final_lr) * 0.5 * (1.0 + math.cos(math.pi * rest))


def batch_tokens_at(tokens_seen: int, ramp: BatchRamp) -> int:
    """Tokens of the step that starts after `tokens_seen`: linear from start_tokens to tokens over ramp_tokens."""
    start = ramp.tokens if ramp.start_tokens is None else ramp.start_tokens
    if tokens_seen >= ramp.ramp_tokens:
        return ramp.tokens
    return round(start + (ramp.tokens - start) * tokens_seen / ramp.ramp_tokens)
