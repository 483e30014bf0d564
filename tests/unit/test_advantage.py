"""Group-relative advantages, against values worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmctl.rl.advantage import group_advantages, has_signal

REWARDS = st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=16)


def test_without_std_it_is_reward_minus_mean() -> None:
    assert group_advantages([1.0, 0.0, 0.0, 1.0, 1.0], std_normalize=False) == pytest.approx(
        [0.4, -0.6, -0.6, 0.4, 0.4]
    )


def test_with_std_it_is_divided_by_the_sample_deviation() -> None:
    # mean 1/2, squared deviations sum to 1, n - 1 = 3
    std = math.sqrt(1 / 3)
    expected = [0.5 / (std + 1e-6), -0.5 / (std + 1e-6)]
    assert group_advantages([1.0, 0.0, 1.0, 0.0], std_normalize=True) == pytest.approx(expected * 2, rel=1e-12)


@pytest.mark.parametrize("std_normalize", [True, False])
def test_equal_rewards_give_exactly_zero(std_normalize: bool) -> None:
    # a third is not exact in binary: the mean of three of them may differ from it in the last place
    for rewards in ([1.0] * 4, [0.0] * 4, [1 / 3] * 3, [None, 1.0, 1.0], [1.0], [None, None]):
        assert group_advantages(rewards, std_normalize=std_normalize) == [0.0] * len(rewards)
        assert not has_signal(rewards)


def test_infrastructure_failures_take_no_part_in_the_group() -> None:
    with_failure = group_advantages([1.0, None, 0.0], std_normalize=True)
    without = group_advantages([1.0, 0.0], std_normalize=True)
    assert with_failure == [without[0], 0.0, without[1]]


@given(REWARDS, st.booleans())
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards: list[float | None], std_normalize: bool) -> None:
    advantages = group_advantages(rewards, std_normalize=std_normalize)
    assert abs(sum(advantages)) < 1e-9
    if has_signal(rewards):
        judged = [(r, a) for r, a in zip(rewards, advantages, strict=True) if r is not None]
        assert all((r1 < r2) == (a1 < a2) for r1, a1 in judged for r2, a2 in judged)
