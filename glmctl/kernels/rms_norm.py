"""Root-mean-square norm (Zhang & Sennrich 2019, eq. 4), always computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.registry import op, variant


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    x [..., D] any float dtype, weight [D]. The mean is taken in fp32; the result has the promoted dtype of
    x and weight.
    """
    if x.dtype != weight_D.dtype:
        return reference(x, weight_D, eps)
    result: Tensor = op("rms_norm", x.device.type, x.dtype)(x, weight_D, eps)
    return result


@variant("rms_norm", "reference")
def reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition, in the order of operations of transformers' Glm4MoeRMSNorm."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x.dtype)


@variant("rms_norm", "torch", devices=("cuda",))
def fused(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """torch's own kernel, fused on CUDA (on CPU it is several passes and slower than `single`)."""
    return F.rms_norm(x, (x.shape[-1],), weight_D, eps)


@variant("rms_norm", "function", devices=("cpu",), dtypes=(torch.float32, torch.float64))
def in_one_function(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """One autograd node and as few passes over memory as plain torch allows."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        result: Tensor = _RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
        return result
    return (x * _inverse_rms(x, eps)).mul_(weight_D)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    result: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return result


class _RmsNorm(torch.autograd.Function):
    """dx = r (g w - y mean(g w y)) with y = x r, r the inverse RMS; dw = sum of g y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        # with p = g x, one product serves both sums: dw = p^T r and mean(g w y) = r (p w) / D
        product_MD = (grad * x).reshape(-1, width)
        scale_M = scale.view(-1)
        grad_weight = torch.mv(product_MD.t(), scale_M)
        factor = torch.mv(product_MD, weight_D).mul_(scale_M).mul_(scale_M).div_(-width)
        grad_x = (grad * weight_D).addcmul_(x, factor.view(scale.shape)).mul_(scale)
        return grad_x, grad_weight, None
