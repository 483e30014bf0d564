"""Which prompts to teach and how often (spec section 3.1): hard prompts, several responses of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from glmctl.rl.episode import Trajectory


def select(samples: Sequence[Trajectory], *, hard_fraction: float, responses_per_prompt: int) -> list[Trajectory]:
    """Keep the `hard_fraction` of prompts with the longest responses, and of each at most `responses_per_prompt`.

    The length of a prompt is the mean of its samples' generated tokens; the share is rounded up; equal lengths keep
    their order. The report drops the 50% of prompts with the shortest responses and keeps four responses of each
    prompt left. Responses that repeat another one token for token are left out: they would teach nothing new.
    """
    by_prompt: dict[str, list[Trajectory]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.problem_id, []).append(sample)
    order = sorted(by_prompt, key=lambda prompt: -mean_length(by_prompt[prompt]))
    hard = set(order[: math.ceil(hard_fraction * len(order))])
    chosen: list[Trajectory] = []
    for prompt, group in by_prompt.items():
        if prompt in hard:
            distinct = {tuple(one.tokens): one for one in reversed(group)}
            unique = [one for one in group if distinct[tuple(one.tokens)] is one]
            chosen += unique[:responses_per_prompt]
    return chosen


def preferences(kept: Sequence[Trajectory], samples: Sequence[Trajectory]) -> list[dict[str, Any]]:
    """Pairs for a reward model: of each prompt the first sample that was kept and the first well-formed one refused.

    Rows as `glmctl reward` reads them. Prompts whose samples all passed, or all failed, give none.
    """
    good = {one.problem_id: one for one in reversed(kept)}
    bad: dict[str, Trajectory] = {}
    passed = {id(one) for one in kept}
    for one in samples:
        answered = one.well_formed and bool(one.messages) and bool(one.messages[-1].get("content"))
        if id(one) not in passed and answered and one.messages[-1]["role"] == "assistant":
            bad.setdefault(one.problem_id, one)
    return [
        {"chosen": good[name].messages, "rejected": worse.messages, **({"tools": worse.tools} if worse.tools else {})}
        for name, worse in bad.items()
        if name in good and good[name].messages != worse.messages
    ]


def mean_length(samples: Sequence[Trajectory]) -> float:
    """Mean tokens that the model wrote."""
    return sum(one.generated_tokens for one in samples) / len(samples)
