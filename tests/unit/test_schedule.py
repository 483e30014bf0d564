"""Rates, batch ramp and the plan of a run: boundary values, and that a stage ends exactly where it should."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.recipe.derive import stage_steps
from glmctl.recipe.schema import BatchRamp, PretrainRecipe, Schedule
from glmctl.training.plan import plan_steps
from glmctl.training.schedule import batch_tokens_at, lr_at

SCHEDULE = Schedule(peak_lr=1.0, final_lr=0.1, warmup_fraction=0.1)


def test_rate_at_the_boundaries() -> None:
    assert lr_at(0.0, SCHEDULE) == 0.0
    assert lr_at(0.05, SCHEDULE) == pytest.approx(0.5)
    assert lr_at(0.1, SCHEDULE) == 1.0
    assert lr_at(0.55, SCHEDULE) == pytest.approx(0.55)  # half-way down: the mean of peak and final
    assert lr_at(1.0, SCHEDULE) == pytest.approx(0.1)
    assert lr_at(1.5, SCHEDULE) == pytest.approx(0.1)
    assert lr_at(0.0, Schedule(peak_lr=1.0, final_lr=0.1, warmup_fraction=0.0)) == 1.0


@settings(deadline=None)
@given(a=st.floats(0.0, 1.0), b=st.floats(0.0, 1.0))
def test_rate_rises_in_the_warm_up_and_never_after(a: float, b: float) -> None:
    low, high = sorted((a, b))
    if high <= SCHEDULE.warmup_fraction:
        assert lr_at(low, SCHEDULE) <= lr_at(high, SCHEDULE)
    elif low >= SCHEDULE.warmup_fraction:
        assert lr_at(low, SCHEDULE) >= lr_at(high, SCHEDULE)


def test_batch_ramp_at_the_boundaries() -> None:
    ramp = BatchRamp(tokens=64, start_tokens=16, ramp_tokens=500)
    assert [batch_tokens_at(n, ramp) for n in (0, 250, 500, 10_000)] == [16, 40, 64, 64]
    assert batch_tokens_at(0, BatchRamp(tokens=64)) == 64


def recipe(stages: list[tuple[int, int]], batch: dict[str, int], **more: object) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "name": "p",
            "model": "nano",
            "tokenizer": "t",
            "stages": [
                {"name": f"s{i}", "data": "d", "tokens": tokens, "sequence_length": length}
                for i, (tokens, length) in enumerate(stages)
            ],
            "batch": batch,
            **more,
        }
    )


@settings(deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(1, 5000), st.integers(2, 64)), min_size=1, max_size=3),
    tokens=st.integers(1, 700),
    start=st.integers(1, 700),
    ramp=st.integers(0, 4000),
)
def test_a_plan_ends_stages_exactly_and_reads_each_sequence_once(
    stages: list[tuple[int, int]], tokens: int, start: int, ramp: int
) -> None:
    r = recipe(stages, {"tokens": tokens, "start_tokens": start, "ramp_tokens": ramp})
    plan = plan_steps(r)
    ends = [sum(n for n, _ in stages[: i + 1]) for i in range(len(stages))]
    assert [s.tokens for s in plan if s.ends_stage] == ends
    assert [s.number for s in plan] == list(range(1, len(plan) + 1))
    for before, after in pairwise(plan):
        assert after.tokens > before.tokens
        same = after.stage == before.stage
        assert after.first_sequence == (before.first_sequence + before.sequences if same else 0)
    assert all(s.sequences >= 1 for s in plan)
    assert plan[-1].lr == pytest.approx(r.schedule.final_lr)
    assert plan[0].lr > 0
    assert all(math.isfinite(s.lr) for s in plan)
    counts = [sum(s.stage == i for s in plan) for i in range(len(stages))]
    assert counts == stage_steps(r), "the dry run promises another number of steps"


def test_switches_happen_with_the_step_that_starts_there() -> None:
    plan = plan_steps(
        recipe(
            [(100, 10), (100, 10)],
            {"tokens": 20},
            mtp={"weight": 0.3, "then_weight": 0.1, "switch_tokens": 100},
            balance={"bias_update_rate": 0.01, "until_tokens": 60},
        )
    )
    assert [s.mtp_weight for s in plan] == [0.3] * 5 + [0.1] * 5
    assert [s.bias_update_rate for s in plan] == [0.01] * 3 + [0.0] * 7
