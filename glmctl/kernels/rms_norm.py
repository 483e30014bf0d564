"""Root-mean-square norm (Zhang & Sennrich 2019, eq. 4), always computed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.fused import passes
from glmctl.kernels.registry import op, variant


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    x [..., D] any float dtype, weight [D]. The mean is taken in fp32; the result has the promoted dtype of
    x and weight.
    """
    if x.dtype != weight_D.dtype:
        if x.device.type == "cpu":
            return reference(x, weight_D, eps)
        # one cast and one kernel where the definition is seven
        wide = torch.promote_types(x.dtype, weight_D.dtype)
        x, weight_D = x.to(wide), weight_D.to(wide)
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
    """One autograd node made of `fused.passes`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        result: Tensor = _RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
        return result
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    plain: Tensor = (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight_D)
    return plain


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, scale = passes.rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        return *passes.rms_norm_back(grad, x, weight_D, scale), None
