"""The compiled passes of a training step against the same operations in torch and float64.

They are skipped only where no g++ is: then there is nothing to test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glmctl.data.batches import pad_batch
from glmctl.kernels.attention import causal_attention, document_attention, find_segments, masked
from glmctl.kernels.experts import by_expert
from glmctl.kernels.experts import reference as experts_reference
from glmctl.kernels.fused import passes
from glmctl.kernels.fused.library import in_torch, library
from glmctl.kernels.linear_cross_entropy import linear_cross_entropy
from glmctl.kernels.rms_norm import reference as norm_reference
from glmctl.kernels.rms_norm import rms_norm
from glmctl.kernels.rope import norm_rope, rope, rotation
from glmctl.kernels.swiglu import reference as swiglu_reference
from glmctl.kernels.swiglu import swiglu
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.training.loss import LossModule

pytestmark = pytest.mark.skipif(library() is None, reason="no g++ here")


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


def against_float64(ours: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients of fp32 `ours` lie within fp32 rounding of `exact` on the same inputs in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = ours(*inputs), exact(*wide)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = torch.autograd.grad((out * weight.float()).sum(), inputs)
    right = torch.autograd.grad((expected * weight).sum(), wide)
    for a, b in zip([out.detach(), *got], [expected, *right], strict=True):
        scale = float(b.detach().abs().max()) + 1e-6
        assert float((a.double() - b).abs().max()) / scale < 1e-5


@pytest.mark.parametrize("width", [5, 31, 32, 200])
def test_rms_norm(width: int) -> None:
    inputs = [draw(70, width), draw(width, seed=1)]
    against_float64(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: norm_reference(x, w, 1e-5), inputs)


def test_swiglu_of_dense_and_strided_rows() -> None:
    against_float64(swiglu, swiglu_reference, [draw(5, 9, 33), draw(5, 9, 33, seed=1)])

    def halves(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: f(*x.chunk(2, -1))

    against_float64(halves(swiglu), halves(swiglu_reference), [draw(40, 66, scale=8.0)])


@pytest.mark.parametrize("rotary", [16, 32])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotation_together(rotary: int, normed: bool) -> None:
    positions = torch.tensor([[3, 4, 5, 0, 1], [0, 1, 2, 3, 900]])
    turns = {dtype: rotation(positions, rotary, 32, 1e4, dtype) for dtype in (torch.float32, torch.float64)}
    # both from the same fp32 angles
    turns[torch.float64] = turns[torch.float64]._replace(
        cos_BT1d=turns[torch.float32].cos_BT1d.double(), sin_BT1d=turns[torch.float32].sin_BT1d.double()
    )

    def exact(x: Tensor, *weight: Tensor) -> Tensor:
        return rope(norm_reference(x, weight[0], 1e-5) if weight else x, turns[torch.float64])

    inputs = [draw(2, 5, 6, 32), draw(32, seed=1)] if normed else [draw(2, 5, 6, 32)]
    against_float64(lambda x, *w: norm_rope(x, w[0] if w else None, 1e-5, turns[torch.float32]), exact, inputs)


layouts = st.lists(st.lists(st.integers(-1, 2), min_size=70, max_size=70), min_size=1, max_size=2)


@settings(max_examples=30, deadline=None)
@given(ids=layouts, kv=st.sampled_from([1, 2]))
def test_attention_of_documents_for_any_layout(ids: list[list[int]], kv: int) -> None:
    """Documents of any length, padding anywhere; grouped heads."""
    segments = find_segments(torch.tensor(ids))
    shapes = [(len(ids), 70, heads, 32) for heads in (4, kv, kv)]
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    against_float64(lambda *x: document_attention(*x, segments), lambda *x: masked(*x, segments), inputs)


def test_attention_of_whole_rows_with_large_scores() -> None:
    """Scores of several hundred neither overflow nor lose the rest of the row."""
    inputs = [draw(2, 131, n, 64, seed=i, scale=8.0 if i < 2 else 1.0) for i, n in enumerate((4, 2, 2))]
    segments = find_segments(torch.zeros(2, 131, dtype=torch.int64))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    torch.testing.assert_close(causal_attention(*inputs).double(), masked(*wide, segments), atol=1e-4, rtol=1e-4)


def test_experts() -> None:
    index = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:2] for i in range(37)])
    inputs = [draw(37, 24), draw(37, 2, seed=1), draw(5, 2 * 12, 24, seed=2), draw(5, 24, 12, seed=3)]
    against_float64(
        lambda x, w, g, d: by_expert(x, index, w, g, d), lambda x, w, g, d: experts_reference(x, index, w, g, d), inputs
    )


def test_cross_entropy() -> None:
    target = torch.randint(0, 301, (530,), generator=torch.Generator().manual_seed(5))
    target[::7] = -100
    hidden, weight = draw(530, 20), draw(301, 20, seed=1, scale=3.0)
    against_float64(
        lambda h, w: linear_cross_entropy(h, w, target)[0],
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.t(), target, reduction="sum"),
        [hidden, weight],
    )


def test_not_a_number_is_never_hidden() -> None:
    """One bad value in, a bad value out: the guard of the step depends on it."""
    logits = torch.randn(4, 50)
    logits[2, 7] = float("nan")
    assert passes.softmax_loss(logits.clone(), torch.zeros(4, dtype=torch.int64), gradient=True)[2].isnan()
    q, k, v = (draw(1, 20, 2, 32, seed=i) for i in range(3))
    with torch.no_grad():
        k[0, 0] = float("nan")
    assert causal_attention(q, k, v).isnan().all()
    assert passes.swiglu(torch.full((1, 9), float("nan")), torch.ones(1, 9)).isnan().all()


def test_a_step_does_not_depend_on_the_number_of_threads_nor_on_the_compiler(tiny_config: ModelConfig) -> None:
    """Gradients of the whole model: the compiled passes equal torch up to rounding, and 1 thread equals 3 in them."""
    config = tiny_config.model_copy(update={"head_dim": 32})
    rows = [([(7 * i + j) % 500 for j in range(n)], [1] * n) for i, n in enumerate((60, 33, 47))]
    batch = pad_batch(rows, pad_id=0)

    def gradients() -> dict[str, Tensor]:
        model = GlmMoe(config, seed=0)
        found = LossModule(model)(batch, True, True)
        (found.main + 0.3 * found.mtp + found.balance).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    compiled = gradients()
    with in_torch():
        plain = gradients()
    for name, gradient in compiled.items():
        torch.testing.assert_close(gradient, plain[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    x, weight = draw(333, 48), draw(48, seed=1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), [x, weight]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
