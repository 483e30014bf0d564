"""Partial rotary position embedding in NeoX half-split pairing (Su et al. 2021, eq. 34; spec section 1.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glmctl.kernels.registry import op, variant


def rope_angles(positions_BT: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, rotary_dim / 2] (fp32) of `position * theta^(-2i / rotary_dim)`.

    Computed in fp32 as transformers does, so that logits agree at large positions too.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_BT.device) / rotary_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = positions_BT[..., None, None].float() * inverse_frequencies
    return angles.cos(), angles.sin()


def rope(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` dimensions of each head; the others pass through.

    Dimension i is paired with i + rotary_dim / 2. x [B, T, H, d]; cos, sin [B or 1, T, 1, rotary_dim / 2].
    """
    result: Tensor = op("rope", x_BTHd.device.type, x_BTHd.dtype)(x_BTHd, cos, sin)
    return result


@variant("rope", "reference")
def reference(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition."""
    half = cos.shape[-1]
    cos, sin = cos.to(x_BTHd.dtype), sin.to(x_BTHd.dtype)
    a, b, rest = x_BTHd[..., :half], x_BTHd[..., half : 2 * half], x_BTHd[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@variant("rope", "function", devices=("cpu",), dtypes=(torch.float32, torch.float64))
def in_one_function(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Written straight into the result; the backward is the rotation by the opposite angle."""
    if torch.is_grad_enabled() and x_BTHd.requires_grad:
        result: Tensor = _Rope.apply(x_BTHd, cos, sin)  # type: ignore[no-untyped-call]
        return result
    return _rotate(x_BTHd, cos, sin, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x)
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=out[..., :half])
    out[..., :half].addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., half : 2 * half])
    out[..., half : 2 * half].addcmul_(a, sin, value=sign)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None
