"""Newton-Schulz as Muon uses it: singular values near one, directions kept, batches independent."""

from __future__ import annotations

import pytest
import torch

from glmctl.kernels.newton_schulz import newton_schulz


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (3, 5, 24, 40), (2, 40, 24)])
def test_singular_values_end_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    g = matrices(*shape)
    out = newton_schulz(g, 5)
    assert out.shape == g.shape
    singular = torch.linalg.svdvals(out)
    assert singular.max() < 1.3
    # a random square matrix has a few singular values too small for five steps
    assert singular.median() > 0.65
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(out.flatten(-2), (u @ vh).flatten(-2), dim=-1)
    assert cosine.min() > 0.95


def test_five_steps_follow_the_iteration_by_hand() -> None:
    g = matrices(6, 9).double()
    x = g / (g.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(newton_schulz(g, 5), x)
    torch.testing.assert_close(newton_schulz(g.float(), 5).double(), x, atol=1e-5, rtol=1e-4)


def test_each_matrix_of_a_batch_is_treated_alone() -> None:
    g = matrices(4, 12, 20)
    together = newton_schulz(g, 5)
    for i in range(4):
        torch.testing.assert_close(together[i], newton_schulz(g[i], 5), atol=1e-5, rtol=1e-4)


def test_scale_and_transpose_do_not_matter() -> None:
    g = matrices(12, 20)
    torch.testing.assert_close(newton_schulz(g * 1000, 5), newton_schulz(g, 5), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(newton_schulz(g.T, 5), newton_schulz(g, 5).T, atol=1e-5, rtol=1e-4)


def test_a_zero_matrix_stays_zero() -> None:
    assert (newton_schulz(torch.zeros(3, 4, 5), 5) == 0).all()


def test_dtype_is_kept() -> None:
    assert newton_schulz(matrices(8, 8).bfloat16(), 5).dtype == torch.bfloat16
