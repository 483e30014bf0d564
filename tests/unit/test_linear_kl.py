"""The divergence of two output layers: by its definition, its gradient by autograd's, whatever the chunk."""

from __future__ import annotations

import pytest
import torch

from glmctl.kernels.linear_kl import linear_kl
from glmctl.kernels.registry import forced


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((11, 6), (19, 6), (11, 5), (19, 5))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_equals_the_definition_with_gradients(temperature: float, chunk: int) -> None:
    found = {}
    for name in ("reference", "chunked"):
        hidden, weight, taught, head = inputs()
        hidden.requires_grad_(True), weight.requires_grad_(True)
        with forced("linear_kl", name):
            loss = linear_kl(hidden, weight, taught, head, temperature=temperature, chunk=chunk)
        (3.0 * loss).backward()
        found[name] = (loss.detach(), hidden.grad, weight.grad)
    for one, other in zip(found["reference"], found["chunked"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_it_is_torchs_divergence_and_zero_between_equals() -> None:
    hidden, weight, taught, head = inputs()
    theirs = torch.nn.functional.kl_div(
        (hidden @ weight.t()).log_softmax(1), (taught @ head.t()).log_softmax(1), reduction="sum", log_target=True
    )
    assert float(linear_kl(hidden, weight, taught, head)) == pytest.approx(float(theirs), rel=1e-9)
    assert float(linear_kl(hidden, weight, hidden, weight)) == pytest.approx(0.0, abs=1e-12)
