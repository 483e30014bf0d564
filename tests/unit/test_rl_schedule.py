"""What an RL run changes as it goes: temperature, curriculum and length, by their rules and across a resume."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from glmctl.errors import DataError
from glmctl.recipe.schema import (
    AfterSteps,
    Curriculum,
    DynamicTemperature,
    HardStage,
    LengthStage,
    ModerateStage,
    OnPlateau,
    PlateauRule,
    RlRecipe,
    Rollouts,
)
from glmctl.rl import curriculum as curriculum_module
from glmctl.rl.course import max_tokens
from glmctl.rl.difficulty import hard_pool, histogram, moderate_pool
from glmctl.rl.environment import Problem
from glmctl.rl.plateau import Plateau
from glmctl.rl.temperature import Temperature, next_temperature

BASE = {"name": "r", "model": "m", "problems": ["p"], "heldout": ["h"], "steps": 100}


def recipe(**changes) -> RlRecipe:
    return RlRecipe.model_validate(BASE | changes)


# ------------------------------------------------------------------------------------------------ plateau, temperature


def test_a_plateau_is_two_windows_of_which_the_later_is_hardly_better() -> None:
    """Window 3, gain 0.1: after [0, .1, .2, .3, .4, .5] the means are .1 and .4; then .5 again and again."""
    plateau = Plateau(PlateauRule(window=3, min_gain=0.1))
    for value in (0.0, 0.1, 0.2, 0.3, 0.4):
        plateau.see(value)
        assert not plateau.reached
    plateau.see(0.5)
    assert not plateau.reached
    reached = []
    for _ in range(4):
        plateau.see(0.5)
        reached.append(plateau.reached)
    # the differences of the means: .233, .2, .1 (.5 - .4), .0333
    assert reached == [False, False, False, True]
    assert len(plateau.values) == 6


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({0.8: 0.500, 1.0: 0.500, 1.2: 0.496, 1.4: 0.494}, 1.2),  # 1% of 0.5 is 0.005: 0.495 is the bar
        ({0.8: 0.500, 1.0: 0.4949, 1.2: 0.3, 1.4: 0.1}, 0.8),
        ({0.8: 0.2, 1.0: 0.4, 1.2: 0.6}, 1.2),
        ({0.8: 0.5, 1.0: 0.3, 1.2: 0.497}, 1.2),  # a dip in between does not matter: the largest that is good enough
        ({0.8: 0.0, 1.0: 0.0}, 1.0),
        (
            {0.8: -0.500, 1.0: -0.504, 1.2: -0.506},
            1.0,
        ),  # rewards may be below zero: 1% of what the best is away from it
    ],
)
def test_the_next_temperature_is_the_largest_within_one_percent_of_the_best(scores, chosen: float) -> None:
    assert next_temperature(scores, 0.01) == chosen


SPEC = DynamicTemperature(grid=[0.8, 1.0, 1.2, 1.4], plateau=PlateauRule(window=2, min_gain=0.01))
CURVE = {0.8: 0.70, 1.0: 0.70, 1.2: 0.695, 1.4: 0.5}


def test_the_temperature_rises_on_a_plateau_and_not_before() -> None:
    temperature = Temperature(SPEC, 0.8)
    logged = [temperature.after_step(step, 0.1 * min(step, 5), CURVE.__getitem__) for step in range(1, 8)]
    # rewards .1 .2 .3 .4 .5 .5 .5: at step 7 both windows are .5 and (.4 + .5) / 2; at 8 they are equal
    assert logged == [{}] * 7
    found = temperature.after_step(8, 0.5, CURVE.__getitem__)
    assert found["temperature_reason"] == "plateau"
    assert found["temperature_next"] == temperature.value == 1.2
    assert found["temperature_scores"] == {"0.8": 0.7, "1": 0.7, "1.2": 0.695, "1.4": 0.5}
    # rewards under another temperature are another curve
    assert temperature.after_step(9, 0.5, CURVE.__getitem__) == {}


def test_the_grid_is_validated_from_time_to_time_and_may_lower_the_temperature() -> None:
    temperature = Temperature(SPEC.model_copy(update={"every": 4}), 1.4)
    assert temperature.after_step(3, 0.1, CURVE.__getitem__) == {}
    assert temperature.after_step(4, 0.2, CURVE.__getitem__)["temperature_reason"] == "periodic"
    assert temperature.value == 1.2


def test_a_fixed_temperature_scores_nothing() -> None:
    def never(value: float) -> float:
        raise AssertionError(value)

    temperature = Temperature(None, 0.9)
    for step in range(1, 50):
        assert temperature.after_step(step, 0.5, never) == {}
    assert temperature.value == 0.9


def test_a_temperature_goes_on_exactly_after_a_resume() -> None:
    rewards = [random.Random(step).random() * 0.01 for step in range(40)]
    straight = Temperature(SPEC, 0.8)
    expected = [straight.after_step(step, reward, CURVE.__getitem__) for step, reward in enumerate(rewards)]
    assert sum(bool(found) for found in expected) > 2
    for cut in (1, 3, 17):
        first, second = Temperature(SPEC, 0.8), Temperature(SPEC, 0.8)
        found = [first.after_step(step, rewards[step], CURVE.__getitem__) for step in range(cut)]
        second.load_state(json.loads(json.dumps(first.state())))
        found += [second.after_step(step, rewards[step], CURVE.__getitem__) for step in range(cut, 40)]
        assert found == expected
        assert second.value == straight.value


# ------------------------------------------------------------------------------------- difficulty, curriculum


class Policy:
    """Problem i is solved by exactly those samples that `right` names; it counts the samples it was asked for."""

    def __init__(self, right: Sequence[set[int]], failing: set[int] = frozenset()) -> None:
        self.right, self.failing, self.drawn = right, failing, 0

    def __call__(self, problems: Sequence[Problem], first: int, count: int) -> list[list[float | None]]:
        self.drawn += count * len(problems)
        samples = range(first, first + count)
        return [
            [None if int(p.id) in self.failing else float(s in self.right[int(p.id)]) for s in samples]
            for p in problems
        ]


def problems_of(count: int, unverified: set[int] = frozenset()) -> list[Problem]:
    return [Problem(str(i), "t", f"q{i}", 0, {"verified": False} if i in unverified else {}) for i in range(count)]


def test_the_moderate_pool_is_what_the_policy_solves_sometimes() -> None:
    """Pass rates over 10 samples: 0, .1, .5, .9, 1; the fifth is unverified, the sixth's judge fails."""
    right = [set(), {3}, set(range(5)), set(range(9)), set(range(10)), set(range(5)), set(range(5))]
    policy = Policy(right, failing={6})
    pool = moderate_pool(problems_of(7, {5}), ModerateStage(name="m", samples=10, low=0.1, high=0.9), policy)
    assert pool.kept == [1, 2, 3]
    assert pool.statistics == {
        "problems": 7, "unverified": 1, "measured": 6, "samples": 60, "too_hard": 1, "too_easy": 1, "not_judged": 1,
        "kept": 3, "pass_rates": {"0": 1, "<= 0.2": 1, "<= 0.4": 0, "<= 0.6": 1, "<= 0.8": 0, "<= 1": 2},
    }  # fmt: skip


def test_the_hard_pool_is_pass_at_8_zero_and_pass_at_512_above_zero() -> None:
    """Solved first by sample 0, 7, 8, 100, 511, 512 and never: 8, 100 and 511 are in, 512 would be the 513th."""
    right = [{0}, {7}, {8, 9}, {100}, {511}, {512}, set(), {20}, {20}]
    policy = Policy(right, failing={8})
    pool = hard_pool(problems_of(9, {7}), HardStage(name="h"), policy)
    assert pool.kept == [2, 3, 4]
    assert pool.statistics["pass@512_is_0"] == 2
    # a problem leaves the rounds (8, 8, 16, 32, 64, 128, 256) when it is solved
    assert pool.statistics["samples"] == policy.drawn == 8 * 8 + 5 * 8 + 4 * 16 + 4 * 32 + 4 * 64 + 3 * 128 + 3 * 256


def test_only_so_many_problems_are_measured() -> None:
    policy = Policy([{0}] * 10)
    pool = moderate_pool(problems_of(10, {0}), ModerateStage(name="m", samples=2, measure=4), policy)
    assert (pool.kept, policy.drawn) == ([1, 2, 3, 4], 8)


def test_the_histogram_counts_every_problem_once() -> None:
    rng = random.Random(0)
    rates = [rng.randint(0, 16) / 16 for _ in range(200)]
    assert sum(histogram(rates).values()) == 200


def two_stages(until) -> RlRecipe:
    stages = [
        ModerateStage(name="some", samples=4, low=0.25, high=0.75, group_size=None, until=until),
        HardStage(name="hard", failed=2, solved=8, group_size=32),
    ]
    return recipe(curriculum=Curriculum(stages=stages).model_dump(), group_size=4)


def test_the_stages_follow_each_other_and_draw_from_their_own_pools() -> None:
    right = [{0, 1}] * 3 + [{7}] * 2 + [set()] * 2
    course = curriculum_module.Curriculum(two_stages(AfterSteps(steps=3)), problems_of(7))
    assert course.due
    assert course.enter(1, Policy(right))["kept"] == 3
    assert not course.due
    assert (course.group_size, course.fields()) == (4, {"stage": "some", "pool": 3})
    assert {p.id for p in course.prompts.take(9)} == {"0", "1", "2"}
    assert [course.after_step(step, 0.5) for step in (1, 2, 3)] == [False, False, True]
    assert course.enter(4, Policy(right))["kept"] == 2
    assert (course.group_size, course.fields()) == (32, {"stage": "hard", "pool": 2})
    assert {p.id for p in course.prompts.take(9)} == {"3", "4"}
    assert not any(course.after_step(step, 0.5) for step in range(4, 90))


def test_a_stage_may_end_on_a_plateau() -> None:
    course = curriculum_module.Curriculum(two_stages(OnPlateau(window=2, min_gain=0.05)), problems_of(3))
    course.enter(1, Policy([{0, 1}] * 3))
    rewards = (0.1, 0.2, 0.3, 0.4, 0.42, 0.42, 0.42)
    assert [course.after_step(step, reward) for step, reward in enumerate(rewards, 1)] == [False] * 6 + [True]


def test_a_curriculum_goes_on_exactly_after_a_resume() -> None:
    right = [{0, 1}] * 3 + [{7}] * 2
    for until, cut in ((AfterSteps(steps=3), 2), (OnPlateau(window=1, min_gain=0.5), 1)):
        first = curriculum_module.Curriculum(two_stages(until), problems_of(5))
        first.enter(1, Policy(right))
        for step in range(1, cut + 1):
            first.prompts.take(2)
            first.after_step(step, 0.5)
        second = curriculum_module.Curriculum(two_stages(until), problems_of(5))
        second.load_state(json.loads(json.dumps(first.state())))
        assert not second.due
        assert second.fields() == first.fields()
        assert second.after_step(cut + 1, 0.5) == first.after_step(cut + 1, 0.5) is True
        assert [p.id for p in second.prompts.take(7)] == [p.id for p in first.prompts.take(7)]


def test_an_empty_first_stage_stops_the_run_and_an_empty_later_one_does_not(capsys) -> None:
    course = curriculum_module.Curriculum(two_stages(AfterSteps(steps=1)), problems_of(3))
    with pytest.raises(DataError, match=r"no problem is in stage 'some'.*too_hard 3"):
        course.enter(1, Policy([set()] * 3))
    course = curriculum_module.Curriculum(two_stages(AfterSteps(steps=1)), problems_of(3))
    course.enter(1, Policy([{0, 1}] * 3))
    assert course.enter(2, Policy([{0}] * 3))["kept"] == 0
    assert "the pool before it stays" in capsys.readouterr().err
    again = curriculum_module.Curriculum(two_stages(AfterSteps(steps=1)), problems_of(3))
    again.load_state(course.state())
    assert {p.id for p in again.prompts.take(3)} == {"0", "1", "2"}
    assert [p.id for p in again.prompts.take(3)] == [p.id for p in course.prompts.take(6)[3:]]


# ------------------------------------------------------------------------------------------------ length, recipes


def test_one_length_is_the_default_and_a_progressive_schedule_is_followed() -> None:
    assert {max_tokens(recipe(), step) for step in (1, 50, 100)} == {256}
    stages = [
        {"from_step": 1, "max_tokens": 64},
        {"from_step": 10, "max_tokens": 128},
        {"from_step": 20, "max_tokens": 256},
    ]
    progressive = recipe(lengths=stages)
    assert [max_tokens(progressive, step) for step in (1, 9, 10, 19, 20, 100)] == [64, 64, 128, 128, 256, 256]
    assert progressive.lengths[0] == LengthStage(from_step=1, max_tokens=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": [{"from_step": 2, "max_tokens": 256}]},
        {"lengths": [{"from_step": 1, "max_tokens": 512}, {"from_step": 5, "max_tokens": 256}]},
        {"lengths": [{"from_step": 1, "max_tokens": 128}]},
        {"mode": "train_only"},
        {"recorded": "runs/x"},
        {"mode": "train_only", "recorded": "runs/x", "dynamic_temperature": {}},
        {"rollouts": {"unfinished": "carry"}},
        {"dynamic_temperature": {"grid": [1.0, 0.8]}},
        {"curriculum": {"stages": [{"type": "hard", "name": "h", "until": {"type": "steps", "steps": 3}}]}},
        {"curriculum": {"stages": [{"type": "hard", "name": "h"}, {"type": "hard", "name": "g"}]}},
        {"curriculum": {"stages": [{"type": "hard", "name": "h", "failed": 8, "solved": 8}]}},
        {"curriculum": {"stages": [{"type": "moderate", "name": "m", "low": 0.9, "high": 0.1}]}},
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes) -> None:
    with pytest.raises(ValidationError):
        recipe(**changes)


def test_the_reports_numbers_are_the_defaults() -> None:
    first, second = Curriculum().stages
    assert (first.group_size, first.until) == (16, AfterSteps(steps=1500))
    assert (second.failed, second.solved, second.group_size) == (8, 512, 512)
    assert DynamicTemperature().tolerance == 0.01
    assert (recipe().lengths, Rollouts().precision) == ([], "fp32")
