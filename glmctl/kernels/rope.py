"""Partial rotary position embedding in NeoX half-split pairing (Su et al. 2021, eq. 34; spec section 1.2)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmctl.kernels.fused import passes
from glmctl.kernels.fused.library import compiled
from glmctl.kernels.registry import op, variant
from glmctl.kernels.rms_norm import reference as rms_norm_reference
from glmctl.kernels.rms_norm import rms_norm


class Rotation(NamedTuple):
    """The angles of one forward pass, laid out for `x * cos + (x @ swap) * sin`."""

    cos_BT1d: Tensor
    """1 beyond the rotated dimensions"""
    sin_BT1d: Tensor
    """negative in the first half of the rotated dimensions, positive in the second, 0 beyond"""
    swap_dd: Tensor
    """permutation that exchanges the two halves (zero beyond): dimension i is paired with i + rotary_dim / 2"""
    rotary_dim: int


def yarn_frequencies(
    rotary_dim: int, theta: float, *, factor: float, original_length: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """Angles per position [rotary_dim / 2] under YaRN (arXiv 2309.00071, section 3.2), fp32.

    Pairs that turn more than `beta_fast` times within the original length keep their frequency, those that turn less
    than `beta_slow` times are slowed by `factor`, and between them a linear ramp over the pair's index.
    """

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), rotary_dim - 1)
    # the released code's way out of a ramp of no length
    width = high - low or 0.001
    slowed = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))
    return frequencies / factor * slowed + frequencies * (1 - slowed)


def rotation(
    positions_BT: Tensor,
    rotary_dim: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype = torch.float32,
    *,
    frequencies: Tensor | None = None,
    scale: float = 1.0,
) -> Rotation:
    """Rotation by `position * theta^(-2i / rotary_dim)` of pair i, for heads of `head_dim` dimensions.

    dtype is that of the tables: fp32 even for narrower heads, whose products are then rounded once. Angles, sines
    and cosines are computed in fp32 as transformers does, so that logits agree at large positions too.
    frequencies [rotary_dim / 2] replace theta^(-2i / rotary_dim); scale multiplies rotated dimensions (both YaRN's).
    """
    device = positions_BT.device
    if frequencies is None:
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        frequencies = 1.0 / (theta**exponents)
    angles = positions_BT[..., None, None].float() * frequencies.to(device)
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    rest = (*cos.shape[:-1], head_dim - rotary_dim)
    cos_BT1d = torch.cat([cos, cos, cos.new_ones(rest)], dim=-1).to(dtype)
    sin_BT1d = torch.cat([-sin, sin, sin.new_zeros(rest)], dim=-1).to(dtype)
    return Rotation(cos_BT1d, sin_BT1d, _swap(rotary_dim, head_dim, device, dtype), rotary_dim)


@lru_cache(maxsize=16)
def _swap(rotary_dim: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    half = rotary_dim // 2
    # an inference tensor could not serve a later training step
    with torch.inference_mode(False):
        swap = torch.zeros(head_dim, head_dim)
        first = torch.arange(half)
        swap[first, first + half] = 1.0
        swap[first + half, first] = 1.0
        return swap.to(device=device, dtype=dtype)


def norm_rope(x_BTHd: Tensor, weight_d: Tensor | None, eps: float, turn: Rotation) -> Tensor:
    """`rope(rms_norm(x, weight, eps), turn)`: QK-norm and rotation in one pass if it can be; weight None: no norm."""
    result: Tensor = op("norm_rope", x_BTHd.device.type, x_BTHd.dtype)(x_BTHd, weight_d, eps, turn)
    return result


@variant("norm_rope", "reference")
def norm_rope_reference(x_BTHd: Tensor, weight_d: Tensor | None, eps: float, turn: Rotation) -> Tensor:
    """The definition."""
    return reference(x_BTHd if weight_d is None else rms_norm_reference(x_BTHd, weight_d, eps), turn)


@variant("norm_rope", "apart", devices=("cpu", "cuda"))
def norm_then_rope(x_BTHd: Tensor, weight_d: Tensor | None, eps: float, turn: Rotation) -> Tensor:
    """Each as its own operation."""
    return rope(x_BTHd if weight_d is None else rms_norm(x_BTHd, weight_d, eps), turn)


@variant("norm_rope", "function", devices=("cpu",), dtypes=(torch.float32,))
def norm_rope_in_one_function(x_BTHd: Tensor, weight_d: Tensor | None, eps: float, turn: Rotation) -> Tensor:
    """One autograd node in C++; without gradients, or where that cannot be, as two."""
    needed = torch.is_grad_enabled() and x_BTHd.requires_grad
    tables = (turn.cos_BT1d, turn.sin_BT1d)
    parts = (x_BTHd, *tables) if weight_d is None else (x_BTHd, weight_d, *tables)
    one_table_row_each = turn.cos_BT1d.numel() * x_BTHd.shape[2] == x_BTHd.numel()
    if needed and one_table_row_each and compiled(*parts) is not None:
        result: Tensor = _NormRope.apply(x_BTHd, weight_d, eps, *tables, turn.rotary_dim)  # type: ignore[no-untyped-call]
        return result
    return norm_then_rope(x_BTHd, weight_d, eps, turn)


def rope(x_BTHd: Tensor, turn: Rotation) -> Tensor:
    """Rotate the first `rotary_dim` dimensions of each head; the others pass through. x [B, T, H, d], same result."""
    result: Tensor = op("rope", x_BTHd.device.type, x_BTHd.dtype)(x_BTHd, turn)
    return result


@variant("rope", "reference")
def reference(x_BTHd: Tensor, turn: Rotation) -> Tensor:
    """The definition: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b."""
    half = turn.rotary_dim // 2
    cos, sin = turn.cos_BT1d[..., :half], turn.sin_BT1d[..., half : 2 * half]
    a, b, rest = x_BTHd[..., :half], x_BTHd[..., half : 2 * half], x_BTHd[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x_BTHd.dtype)


@variant("rope", "function", devices=("cpu",), dtypes=(torch.float32, torch.float64))
def in_one_function(x_BTHd: Tensor, turn: Rotation) -> Tensor:
    """Three passes: the exchange of halves as a product with a 0-1 matrix is exact and faster on CPU than copies.

    The backward is the transposed map.
    """
    if turn.cos_BT1d.dtype != x_BTHd.dtype:
        return reference(x_BTHd, turn)
    if torch.is_grad_enabled() and x_BTHd.requires_grad:
        result: Tensor = _Rope.apply(x_BTHd, *turn)  # type: ignore[no-untyped-call]
        return result
    return (x_BTHd * turn.cos_BT1d).addcmul_(x_BTHd @ turn.swap_dd, turn.sin_BT1d)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, swap: Tensor, rotary_dim: int) -> Tensor:
        ctx.save_for_backward(cos, sin, swap)
        return (x * cos).addcmul_(x @ swap, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin, swap = ctx.saved_tensors
        return (grad * cos).add_((grad * sin) @ swap), None, None, None, None


@variant("rope", "exchange", devices=("cuda",), dtypes=(torch.float32, torch.bfloat16, torch.float16))
def by_exchange(x_BTHd: Tensor, turn: Rotation) -> Tensor:
    """Three kernels, in the dtype of the tables; the backward is the rotation by the opposite angle."""
    if turn.cos_BT1d.dtype != torch.float32:
        return reference(x_BTHd, turn)
    tables = (turn.cos_BT1d, turn.sin_BT1d, turn.rotary_dim)
    wide = x_BTHd.float()
    if torch.is_grad_enabled() and x_BTHd.requires_grad:
        turned: Tensor = _Exchange.apply(wide, *tables)  # type: ignore[no-untyped-call]
        return turned.to(x_BTHd.dtype)
    return _turn(wide, *tables, 1).to(x_BTHd.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, sign: int) -> Tensor:
    first, second, rest = torch.split(x, [rotary_dim // 2, rotary_dim // 2, x.shape[-1] - rotary_dim], dim=-1)
    # the sine is 0 at the dimensions that are not rotated
    return (x * cos).addcmul_(torch.cat([second, first, rest], dim=-1), sin, value=sign)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotary_dim = rotary_dim
        return _turn(x, cos, sin, rotary_dim, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.rotary_dim, -1), None, None, None


class _NormRope(torch.autograd.Function):
    """Norm of each head, then its rotation; the backward is the rotation's transpose, then the norm's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_d: Tensor | None, eps: float, cos: Tensor, sin: Tensor, rotary_dim: int
    ) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out, scale = passes.norm_rope(x, weight_d, eps, cos, sin, rotary_dim)
        ctx.save_for_backward(x, weight_d, scale, cos, sin)
        ctx.rotary_dim = rotary_dim
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        x, weight_d, scale, cos, sin = ctx.saved_tensors
        grads = passes.norm_rope_back(grad, x, weight_d, scale, cos, sin, ctx.rotary_dim)
        return *grads, None, None, None, None
