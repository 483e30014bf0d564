"""SwiGLU activation (Shazeer 2020, eq. 6): silu(gate) * up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.fused import passes
from glmctl.kernels.registry import op, variant


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise; both of one shape and dtype."""
    result: Tensor = op("swiglu", gate.device.type, gate.dtype)(gate, up)
    return result


@variant("swiglu", "reference")
def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    return F.silu(gate) * up


@variant("swiglu", "function", devices=("cpu",))
def in_one_function(gate: Tensor, up: Tensor) -> Tensor:
    """Keeps only `gate` and `up` for the backward instead of also silu(gate)."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        result: Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
        return result
    return F.silu(gate).mul_(up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return passes.swiglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        passes.swiglu_back(grad, gate, up, grad_gate, grad_up)
        return grad_gate, grad_up
