"""Chunked output projection and loss: equal to torch's own in float64, for any chunk and any mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.linear_cross_entropy import linear_cross_entropy, token_log_probs


def problem(n: int, vocabulary: int = 37, width: int = 8, masked: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, vocabulary, (n,), generator=g)
    targets[torch.rand(n, generator=g) < masked] = -100
    return hidden, weight, targets


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), chunk=st.integers(1, 50), masked=st.sampled_from([0.0, 0.4]), scale=st.floats(0.1, 3))
def test_loss_and_gradients_equal_torch(n: int, chunk: int, masked: float, scale: float) -> None:
    hidden, weight, targets = problem(n, masked=masked)
    loss, count = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=-100)
    assert int(count) == int((targets != -100).sum())
    torch.testing.assert_close(loss, expected)
    # an incoming gradient that is not 1, as from division by the global token count
    got = torch.autograd.grad(loss * scale, [hidden, weight], retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(expected * scale, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_masked_rows_get_exactly_no_gradient() -> None:
    hidden, weight, targets = problem(30, masked=0.5)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert hidden.grad is not None
    assert (hidden.grad[targets == -100] == 0).all()
    assert (hidden.grad[targets != -100].abs().sum(1) > 0).all()


def test_no_targets_at_all_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets = problem(5)
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert int(count) == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_backward_may_run_twice_and_a_detached_weight_gets_nothing() -> None:
    hidden, weight, targets = problem(20)
    loss, _ = linear_cross_entropy(hidden, weight.detach(), targets)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(loss, hidden)[0]
    assert torch.equal(first, second)
    assert weight.grad is None


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, targets = problem(20)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk=7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, targets, chunk=7)[0].detach())


def test_extreme_logits_stay_finite() -> None:
    """Log-sum-exp is shifted: fp32 would overflow at 89."""
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2000.0
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_token_log_probs_and_gradients_equal_torch(temperature: float, chunk: int) -> None:
    hidden, weight, targets = problem(23)
    ours = token_log_probs(hidden, weight, targets, temperature=temperature, chunk=chunk)
    expected = (hidden @ weight.T / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, expected)
    # as a policy gradient does: a different factor on every row
    factors = torch.randn(23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = torch.autograd.grad((ours.exp() * factors).sum(), [hidden, weight])
    right = torch.autograd.grad((expected.exp() * factors).sum(), [hidden, weight])
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def test_token_log_probs_sum_to_the_cross_entropy() -> None:
    hidden, weight, targets = problem(23)
    total = -token_log_probs(hidden, weight, targets).sum()
    torch.testing.assert_close(total, linear_cross_entropy(hidden, weight, targets)[0])


def test_token_log_probs_with_a_frozen_head() -> None:
    hidden, weight, targets = problem(9)
    token_log_probs(hidden, weight.detach(), targets).sum().backward()
    frozen = hidden.grad
    hidden.grad = None
    token_log_probs(hidden, weight, targets).sum().backward()
    assert frozen is not None
    assert torch.equal(frozen, hidden.grad)


def test_token_log_probs_of_nothing() -> None:
    hidden, weight, targets = problem(3)
    logp = token_log_probs(hidden[:0], weight, targets[:0])
    assert logp.shape == (0,)
    logp.sum().backward()


def test_bf16_hidden_states_give_fp32_losses() -> None:
    hidden, weight, targets = problem(50)
    low, _ = linear_cross_entropy(hidden.bfloat16(), weight.float(), targets)
    exact, _ = linear_cross_entropy(hidden, weight, targets)
    assert low.dtype == torch.float32
    assert abs(low.item() - exact.item()) < 0.02 * exact.item()
    assert token_log_probs(hidden.bfloat16(), weight.float(), targets).dtype == torch.float32


def test_the_normaliser_is_not_rounded_to_the_width_of_the_gradients() -> None:
    """1 over the number of targets has a bf16 of its own, up to 0.4% away and another one each step."""
    hidden, weight, targets = problem(30, masked=0.5)
    narrow = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_cross_entropy(*narrow, targets)
    plain = torch.autograd.grad(loss, narrow, retain_graph=True)
    normaliser = 1 / 771
    for whole, scaled in zip(plain, torch.autograd.grad(loss * normaliser, narrow), strict=True):
        assert torch.equal(scaled, (whole.float() * normaliser).bfloat16())
