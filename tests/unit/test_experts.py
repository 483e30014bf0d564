"""Routed experts: every path equals the definition in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glmctl.kernels import experts as module
from glmctl.kernels.experts import by_expert, experts, reference


def problem(n: int, n_experts: int, k: int, d: int = 12, width: int = 5, *, used: int | None = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(n * 31 + n_experts)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    index = torch.stack([torch.randperm(used or n_experts, generator=g)[:k] for _ in range(n)])
    weight = torch.rand(n, k, generator=g, dtype=torch.float64)
    gate_up = torch.randn(n_experts, 2 * width, d, generator=g, dtype=torch.float64)
    down = torch.randn(n_experts, d, width, generator=g, dtype=torch.float64)
    for tensor in (x, weight, gate_up, down):
        tensor.requires_grad_()
    return [x, index, weight, gate_up, down]


SIZES = [(1, 4, 2), (7, 4, 1), (50, 8, 3), (64, 16, 16), (9, 32, 2)]


@pytest.mark.parametrize(("n", "n_experts", "k"), SIZES)
def test_values_and_gradients_equal_the_definition(n: int, n_experts: int, k: int) -> None:
    inputs = problem(n, n_experts, k)
    wanted = [inputs[0], *inputs[2:]]
    projection = torch.randn(n, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = by_expert(*inputs), reference(*inputs)
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad((ours * projection).sum(), wanted)
    right = torch.autograd.grad((theirs * projection).sum(), wanted)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("n", "n_experts", "k"), SIZES)
@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["sorted", "through-all"])
def test_both_inference_paths_equal_the_definition(
    n: int, n_experts: int, k: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALL_EXPERTS_BYTES", limit)
    inputs = problem(n, n_experts, k)
    with torch.no_grad():
        torch.testing.assert_close(by_expert(*inputs), reference(*inputs))


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    """Not uninitialised memory."""
    inputs = problem(20, 8, 2, used=3)
    by_expert(*inputs).sum().backward()
    for weights in inputs[3:]:
        assert weights.grad is not None
        assert (weights.grad[3:] == 0).all()
        assert (weights.grad[:3] != 0).any()


def test_backward_may_run_twice() -> None:
    """Nothing the backward needs is overwritten by it."""
    inputs = problem(20, 8, 2)
    loss = by_expert(*inputs).square().sum()
    first = torch.autograd.grad(loss, [inputs[0], *inputs[2:]], retain_graph=True)
    second = torch.autograd.grad(loss, [inputs[0], *inputs[2:]])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def choose(n: int, n_experts: int, k: int, used: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    return torch.stack([torch.randperm(used, generator=g)[:k] for _ in range(n)])


@pytest.mark.parametrize(("n", "n_experts", "k", "used"), [(60, 8, 3, 8), (60, 16, 4, 5), (1, 8, 2, 8), (9, 4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grouped_products_equal_the_definition(n: int, n_experts: int, k: int, used: int, dtype: torch.dtype) -> None:
    """The way of a GPU, here by torch's grouped product for a CPU: values, gradients, experts without tokens."""
    _, _, *floats = problem(n, n_experts, k, d=16, width=8)
    index = choose(n, n_experts, k, used)
    drawn = [torch.randn(n, 16, generator=torch.Generator().manual_seed(1)), *(t.detach() for t in floats)]
    exact = [t.to(dtype).double().requires_grad_() for t in drawn]
    mine = [t.detach().to(dtype).requires_grad_() for t in exact]
    right, found = reference(exact[0], index, *exact[1:]), module.by_group(mine[0], index, *mine[1:])
    assert type(found.grad_fn).__name__ == "_GroupedBackward"
    share = 1e-5 if dtype == torch.float32 else 3e-2

    def near(a: Tensor, b: Tensor) -> None:
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=share * float(b.detach().abs().max()))

    near(found, right)
    projection = torch.randn(n, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = torch.autograd.grad((found * projection.to(dtype)).sum(), mine)
    expected = torch.autograd.grad((right * projection).sum(), exact)
    for a, b in zip(got, expected, strict=True):
        near(a, b)
    assert not got[2][used:].any()
    assert not got[3][used:].any()
    with torch.no_grad():
        assert torch.equal(module.by_group(mine[0], index, *mine[1:]), found)


def test_widths_that_a_grouped_product_refuses_go_another_way() -> None:
    x, index, *rest = problem(20, 8, 2)
    inputs = [t.detach().float().requires_grad_() for t in (x, *rest)]
    found = module.by_group(inputs[0], index, *inputs[1:])
    assert type(found.grad_fn).__name__ == "_ExpertsBackward"


def test_no_tokens_at_all() -> None:
    x, _, _, gate_up, down = problem(3, 4, 2)
    out = experts(x[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), gate_up, down)
    assert out.shape == (0, 12)


def test_only_the_inputs_that_ask_get_gradients() -> None:
    inputs = problem(20, 8, 2)
    frozen = [t.detach() for t in inputs]
    x = frozen[0].requires_grad_()
    by_expert(x, *frozen[1:]).sum().backward()
    assert x.grad is not None
    assert frozen[3].grad is None
