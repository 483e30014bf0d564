"""Laws: pass@k is the exact share of k-subsets with a hit; paired tests agree with enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmctl.evaluation.statistics import holm, mcnemar, paired, pass_at_k, repeated


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(itertools.combinations(samples, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(len(samples), sum(samples), k) == pytest.approx(expected)


def test_pass_at_k_refuses_more_draws_than_samples() -> None:
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_repeated_samples_give_the_mean_and_powers_of_two() -> None:
    figures = repeated([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert figures == pytest.approx({"avg@4": 3 / 8, "pass@1": 3 / 8, "pass@2": (1 / 2 + 5 / 6) / 2, "pass@4": 1.0})


def test_a_sample_lost_to_the_infrastructure_bounds_k_for_all() -> None:
    assert set(repeated([[1.0, 0.0], [1.0]])) == {"avg@2", "pass@1"}


@given(st.integers(0, 7), st.integers(0, 7))
def test_mcnemar_counts_the_outcomes_at_least_as_extreme(wins: int, losses: int) -> None:
    n = wins + losses
    extreme = [heads for heads in range(n + 1) if abs(heads - n / 2) >= abs(wins - n / 2)]
    assert mcnemar(wins, losses) == pytest.approx(sum(math.comb(n, heads) for heads in extreme) / 2**n)


def test_paired_binary_scores_count_wins_and_are_antisymmetric() -> None:
    first = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    second = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    there, back = paired(first, second), paired(second, first)
    assert (there.wins, there.ties, there.losses) == (3, 2, 1)
    assert there.difference == pytest.approx(1 / 3) == -back.difference
    assert there.p_value == back.p_value == mcnemar(3, 1)
    assert there.low < there.difference < there.high


def test_sign_flip_agrees_with_all_flips() -> None:
    first, second = [0.0] * 6, [0.1, 0.4, -0.2, 0.3, 0.2, 0.5]
    seen = abs(sum(second))
    flips = [sum(s * d for s, d in zip(signs, second, strict=True)) for signs in itertools.product((-1, 1), repeat=6)]
    exact = sum(abs(total) >= seen - 1e-9 for total in flips) / len(flips)
    # 10,000 seeded draws: three standard errors
    assert paired(first, second).p_value == pytest.approx(exact, abs=3 * math.sqrt(exact / 10_000))


def test_two_equal_systems_are_not_told_apart() -> None:
    same = [0.25, 0.5, 1.0]
    result = paired(same, same)
    assert (result.p_value, result.low, result.high) == (1.0, 0.0, 0.0)


def test_unequal_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        paired([1.0, 0.0], [1.0])


def test_holm_adjusts_step_down_and_never_reorders() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_adjusted_p_values_keep_their_order_and_the_smallest_is_bonferroni_s(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(raw <= one <= 1.0 for raw, one in zip(p_values, adjusted, strict=True))
    assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))
    by_raw = [one for _, one in sorted(zip(p_values, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)
