"""Every step of a pretraining run, known before it starts: a pure function of the recipe.

That makes resuming exact: the number of steps done is the whole position, on any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmctl.recipe.schema import PretrainRecipe
from glmctl.training.schedule import batch_tokens_at, lr_at


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step."""

    number: int
    """1-based over all stages"""
    stage: int
    """index into the recipe's stages"""
    first_sequence: int
    """where in the stage's data it starts"""
    sequences: int
    tokens: int
    """tokens seen when it is done, over all stages"""
    lr: float
    mtp_weight: float
    bias_update_rate: float
    ends_stage: bool


def plan_steps(recipe: PretrainRecipe) -> list[PlannedStep]:
    """The steps of all stages under one cosine over all tokens (GLM-4.5 report section 2.4).

    A step holds as many whole sequences as fit in the ramped batch, at least one. A stage ends exactly at its token
    count: its last step is smaller (and its last sequence counted in part). MTP weight and bias rate switch with the
    first step that starts at or after their token count.
    """
    steps: list[PlannedStep] = []
    tokens = 0
    for index, stage in enumerate(recipe.stages):
        first, end = 0, tokens + stage.tokens
        while tokens < end:
            left = -(-(end - tokens) // stage.sequence_length)
            sequences = min(left, max(1, batch_tokens_at(tokens, recipe.batch) // stage.sequence_length))
            after = min(end, tokens + sequences * stage.sequence_length)
            steps.append(
                PlannedStep(
                    number=len(steps) + 1,
                    stage=index,
                    first_sequence=first,
                    sequences=sequences,
                    tokens=after,
                    lr=lr_at(after / recipe.total_tokens, recipe.schedule),
                    mtp_weight=_mtp_weight(tokens, recipe),
                    bias_update_rate=_bias_rate(tokens, recipe),
                    ends_stage=after == end,
                )
            )
            first, tokens = first + sequences, after
    return steps


def _mtp_weight(tokens: int, recipe: PretrainRecipe) -> float:
    switch = recipe.mtp.switch_tokens
    return recipe.mtp.weight if switch is None or tokens < switch else recipe.mtp.then_weight


def _bias_rate(tokens: int, recipe: PretrainRecipe) -> float:
    until, rate = recipe.balance.until_tokens, recipe.balance.bias_update_rate
    assert rate is not None, "resolved with the recipe"
    return rate if until is None or tokens < until else 0.0
