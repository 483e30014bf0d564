"""The clipped objective and its two aggregations, against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from glmctl.rl.advantage import overlong_penalty
from glmctl.rl.objective import kl_estimate, policy_loss, sequence_log_ratio, token_weights, truncated_importance

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def loss_of(ratios: list[float], advantages: list[float], weights: list[float]):
    logp = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(len(ratios), dtype=torch.float64)
    advantage, weight = (torch.tensor(values, dtype=torch.float64) for values in (advantages, weights))
    result = policy_loss(logp, zeros, advantage, weight, **CLIP)
    result.loss.backward()
    return result._replace(loss=result.loss.detach()), logp.grad


def test_token_and_sequence_aggregation_differ_on_unequal_lengths_as_computed() -> None:
    """Trajectories of 1 and 3 tokens, ratio 1, advantages 1 and -1.

    token: (-1 * 1 + 1 * 3) / 4 = 0.5; sequence: (-1 + 1) / 2 = 0.
    """
    assert token_weights([1, 3], "token") == [0.25, 0.25]
    assert token_weights([1, 3], "sequence") == pytest.approx([0.5, 1 / 6])
    values = {}
    for aggregation in ("token", "sequence"):
        first, second = token_weights([1, 3], aggregation)
        result, _ = loss_of([1.0] * 4, [1.0, -1.0, -1.0, -1.0], [first, second, second, second])
        values[aggregation] = float(result.loss)
    assert values["token"] == pytest.approx(0.5)
    assert values["sequence"] == pytest.approx(0.0)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_weights_sum_to_one_over_all_tokens(aggregation) -> None:
    lengths = [5, 1, 7, 2]
    assert sum(w * n for w, n in zip(token_weights(lengths, aggregation), lengths, strict=True)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.0, 1.0, -1.0, True),
        (1.27, 1.0, -1.27, True),  # inside the upper clip of 0.28
        (1.30, 1.0, -1.28, False),  # beyond it: no further push
        (0.50, 1.0, -0.50, True),  # a good token that became rare is always pulled back
        (0.81, -1.0, 0.81, True),  # inside the lower clip of 0.2
        (0.79, -1.0, 0.80, False),  # beyond it
        (1.50, -1.0, 1.50, True),  # a bad token that became likely is always pushed down
    ],
)
def test_the_clip_is_asymmetric(ratio: float, advantage: float, loss: float, moves: bool) -> None:
    result, grad = loss_of([ratio], [advantage], [1.0])
    assert float(result.loss) == pytest.approx(loss)
    # d(-rho A)/d logp = -rho A where the token still moves, 0 where it is clipped
    assert float(grad[0]) == pytest.approx(-ratio * advantage if moves else 0.0)
    assert result.clipped == (0 if moves else 1)
    assert result.ratio_sum == pytest.approx(ratio)


def test_the_first_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 the gradient is -w A: REINFORCE with the group baseline (spec section 3.4)."""
    _, grad = loss_of([1.0, 1.0], [0.7, -0.3], [0.25, 0.75])
    assert grad.tolist() == pytest.approx([-0.25 * 0.7, 0.75 * 0.3], rel=1e-6)


def test_zero_advantages_have_zero_gradient() -> None:
    result, grad = loss_of([1.0, 1.4, 0.6], [0.0] * 3, [1.0] * 3)
    assert float(result.loss) == 0.0
    assert grad.tolist() == [0.0] * 3


def test_gspo_ratio_by_hand() -> None:
    """Log-ratios (0.3) and (0.1, -0.2, 0.4): each token has its trajectory's mean, 0.3 and 0.1."""
    log_ratio = torch.tensor([0.1, 0.3, -0.2, 0.4], requires_grad=True)
    found = sequence_log_ratio(log_ratio, torch.tensor([1, 0, 1, 1]))
    assert found.tolist() == pytest.approx([0.1, 0.3, 0.1, 0.1])
    found[0].backward()
    assert log_ratio.grad.tolist() == pytest.approx([1 / 3, 0.0, 1 / 3, 1 / 3])


def test_truncated_importance_by_hand() -> None:
    old, behaviour = torch.tensor([0.5, 1.0, 8.0]).log(), torch.tensor([1.0, 1.0, 2.0]).log()
    assert truncated_importance(old, behaviour, cap=2.0).tolist() == pytest.approx([0.5, 1.0, 2.0])


def test_kl_by_hand() -> None:
    """log-ratio ref/policy of ln 2: 2 - ln 2 - 1; equal: 0; and the weight multiplies it, inside the token mean."""
    logp, reference = torch.log(torch.tensor([0.25, 0.5])), torch.log(torch.tensor([0.5, 0.5]))
    expected = 1.0 - math.log(2.0)
    assert kl_estimate(logp, reference).tolist() == pytest.approx([expected, 0.0])
    zeros, half = torch.zeros(2), torch.full((2,), 0.5)
    result = policy_loss(logp, logp, zeros, half, **CLIP, reference_logp_N=reference, kl_weight=0.1)
    assert float(result.loss) == pytest.approx(0.1 * expected / 2)
    assert result.kl_sum == pytest.approx(expected)


def test_the_overlong_ramp_by_hand() -> None:
    """Limit 100, cache 20: free to 80, -1/20 a token, -1 from 100 on."""
    found = [overlong_penalty(n, 100, 20) for n in (1, 80, 81, 90, 100, 130)]
    assert found == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
