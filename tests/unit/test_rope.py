"""Laws of partial rotary embedding (spec sections 1.2 and 5)."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.kernels.rope import Rotation, rope, rotation


def turn(positions: torch.Tensor, rotary: int, theta: float, dtype: torch.dtype = torch.float32) -> Rotation:
    return rotation(positions, rotary, 16, theta, dtype)


def heads(seed: int = 0, width: int = 16, length: int = 6) -> torch.Tensor:
    return torch.randn(1, length, 2, width, generator=torch.Generator().manual_seed(seed))


def test_pairs_are_half_split_and_angles_are_the_formula() -> None:
    """Dimension i is rotated with i + rotary/2 by position * theta^(-2i/rotary)."""
    x, rotary, theta = heads(), 8, 100.0
    out = rope(x, turn(torch.arange(6)[None], rotary, theta))
    for t in range(6):
        for i in range(rotary // 2):
            angle = t * theta ** (-2 * i / rotary)
            a, b = x[0, t, :, i], x[0, t, :, i + rotary // 2]
            torch.testing.assert_close(out[0, t, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(out[0, t, :, i + rotary // 2], b * math.cos(angle) + a * math.sin(angle))


def test_other_dimensions_pass_through() -> None:
    x = heads()
    out = rope(x, turn(torch.arange(6)[None], 8, 1e4))
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert not torch.equal(out[..., :8], x[..., :8])


def test_position_zero_is_the_identity() -> None:
    x = heads()
    assert torch.equal(rope(x, turn(torch.zeros(1, 6, dtype=torch.long), 16, 1e4)), x)


@settings(max_examples=30, deadline=None)
@given(shift=st.integers(0, 2000), gap=st.integers(0, 50), theta=st.sampled_from([1e2, 1e4, 1e6]))
def test_scores_depend_on_relative_position_only(shift: int, gap: int, theta: float) -> None:
    q, k = heads(1, length=1).double(), heads(2, length=1).double()

    def score(query_position: int, key_position: int) -> torch.Tensor:
        rotated = [
            rope(x, turn(torch.tensor([[p]]), 8, theta, torch.float64))
            for x, p in ((q, query_position), (k, key_position))
        ]
        return (rotated[0] * rotated[1]).sum(-1)

    # angles are fp32: at position 2000 they are exact to about 1e-4
    torch.testing.assert_close(score(shift + gap, shift), score(gap, 0), atol=2e-3, rtol=0)


def test_norms_are_kept() -> None:
    x = heads()
    out = rope(x, turn(torch.arange(6)[None] * 37, 8, 1e4))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
