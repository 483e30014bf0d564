"""The passes, each in C++ where `compiled` says so and otherwise in torch; equal up to rounding.

They know nothing of autograd: the autograd functions of the operations are made of them.
Legend: M rows, W width, N tokens, S sorted assignments, I expert width, k choices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.fused.library import call, compiled

PARTS = 32
"""partial sums of a weight gradient, as in fused.cpp"""


def rms_norm(x_MW: Tensor, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`weight x r` with r = 1 / sqrt(mean(x^2) + eps); also r, [..., 1]. x contiguous."""
    if compiled(x_MW, weight_W):
        y, scale = torch.empty_like(x_MW), x_MW.new_empty(*x_MW.shape[:-1], 1)
        call("glm_rms_norm", scale.numel(), x_MW.shape[-1], x_MW, weight_W, eps, y, scale)
        return y, scale
    norm = torch.linalg.vector_norm(x_MW, dim=-1, keepdim=True)
    scale = norm.square_().div_(x_MW.shape[-1]).add_(eps).rsqrt_()
    return (x_MW * scale).mul_(weight_W), scale


def rms_norm_back(grad: Tensor, x_MW: Tensor, weight_W: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx = r (g w - y mean(g w y)) with y = x r, and dw = sum of g y."""
    width = x_MW.shape[-1]
    if compiled(grad, x_MW, weight_W):
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x_MW), torch.empty_like(weight_W)
        parts = x_MW.new_empty(PARTS, width)
        call("glm_rms_norm_back", scale.numel(), width, grad, x_MW, weight_W, scale, grad_x, grad_weight, parts)
        return grad_x, grad_weight
    # with p = g x, one product serves both sums: dw = p^T r and mean(g w y) = r (p w) / W
    product_MW = (grad * x_MW).reshape(-1, width)
    scale_M = scale.view(-1)
    grad_weight = torch.mv(product_MW.t(), scale_M)
    factor = torch.mv(product_MW, weight_W).mul_(scale_M).mul_(scale_M).div_(-width)
    return (grad * weight_W).addcmul_(x_MW, factor.view(scale.shape)).mul_(scale), grad_weight


def norm_rope(
    x_BTHd: Tensor, weight_d: Tensor | None, eps: float, cos: Tensor, sin: Tensor, rotary_dim: int
) -> tuple[Tensor, Tensor | None]:
    """RMS norm of each head (none without a weight), then rotation; also the inverse RMS. Compiled only."""
    B, T, H, d = x_BTHd.shape
    out, scale = torch.empty_like(x_BTHd), None if weight_d is None else x_BTHd.new_empty(B, T, H)
    call("glm_norm_rope", B * T, H, d, rotary_dim, x_BTHd, weight_d, eps, cos, sin, out, scale)
    return out, scale


def norm_rope_back(
    grad: Tensor,
    x_BTHd: Tensor,
    weight_d: Tensor | None,
    scale: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and weight."""
    B, T, H, d = x_BTHd.shape
    grad_x, grad_weight = torch.empty_like(x_BTHd), None if weight_d is None else torch.empty_like(weight_d)
    inputs = (grad.contiguous(), x_BTHd, weight_d, scale, cos, sin)
    call("glm_norm_rope_back", B * T, H, d, rotary_dim, *inputs, grad_x, grad_weight, x_BTHd.new_empty(PARTS, d))
    return grad_x, grad_weight


def swiglu(gate: Tensor, up: Tensor, weight_S: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times the row's weight when given. The last dimension is dense; rows may be strided."""
    if compiled(gate, up) and _dense_rows(gate, up):
        rows, width = gate.numel() // gate.shape[-1], gate.shape[-1]
        out = gate.new_empty(gate.shape)
        call("glm_swiglu", rows, width, gate, gate.stride(-2), up, up.stride(-2), weight_S, out)
        return out
    out = F.silu(gate).mul_(up)
    return out if weight_S is None else out.mul_(weight_S.unsqueeze(-1))


def swiglu_back(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, weight_S: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Fills grad_gate and grad_up. With weights also returns (gradient of the weights [S], the forward's result)."""
    if compiled(grad, gate, up) and _dense_rows(gate, up, grad_gate, grad_up):
        rows, width = gate.numel() // gate.shape[-1], gate.shape[-1]
        extra = None if weight_S is None else (torch.empty_like(weight_S), gate.new_empty(gate.shape))
        inputs = (grad.contiguous(), gate, gate.stride(-2), up, up.stride(-2), weight_S)
        outputs = (grad_gate, grad_gate.stride(-2), grad_up, grad_up.stride(-2), *(extra or (None, None)))
        call("glm_swiglu_back", rows, width, *inputs, *outputs)
        return extra
    silu = F.silu(gate)
    extra = None
    if weight_S is not None:
        hidden = silu * up
        extra = ((hidden * grad).sum(-1), hidden.mul_(weight_S.unsqueeze(-1)))
        grad = grad * weight_S.unsqueeze(-1)
    torch.mul(grad, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return extra


def softmax_loss(logits_NV: Tensor, target_N: Tensor, *, gradient: bool, z_weight: float = 0.0) -> Tensor:
    """-log softmax(logits)[target] + z_weight log(Z)^2 of each row, [N], Z the normaliser.

    The logits are overwritten; if `gradient`, by the gradient: softmax (1 + 2 z_weight log Z) - one-hot.
    """
    if compiled(logits_NV) and logits_NV.stride(1) == 1:
        loss_N = logits_NV.new_empty(logits_NV.shape[0])
        target_N = target_N.contiguous()
        shape = (*logits_NV.shape, logits_NV.stride(0))
        call("glm_softmax_loss", *shape, logits_NV, target_N, z_weight, loss_N, int(gradient))
        return loss_N
    target_N1 = target_N[:, None]
    top = logits_NV.amax(1, keepdim=True)
    chosen = logits_NV.gather(1, target_N1)
    exp = logits_NV.sub_(top).exp_()
    total = exp.sum(1, keepdim=True)
    normaliser = total.log() + top
    loss_N1 = normaliser - chosen + z_weight * normaliser.square()
    if gradient:
        probability = exp.mul_((1 + 2 * z_weight * normaliser) / total)
        probability.scatter_(1, target_N1, probability.gather(1, target_N1) - 1)
    return loss_N1.squeeze(1)


def gather_sum(rows_SW: Tensor, place_NK: Tensor) -> Tensor:
    """Row n of the result is the sum of rows place[n, 0], place[n, 1], ... in this order."""
    if compiled(rows_SW) and rows_SW.is_contiguous():
        out = rows_SW.new_empty(place_NK.shape[0], rows_SW.shape[1])
        call("glm_gather_sum", *place_NK.shape, rows_SW.shape[1], rows_SW, place_NK.contiguous(), out)
        return out
    if rows_SW.device.type != "cpu":
        # two kernels instead of two for each choice; the sum's order is fixed there too
        rows_NKW = rows_SW.index_select(0, place_NK.reshape(-1)).view(*place_NK.shape, -1)
        return rows_NKW.squeeze(1) if place_NK.shape[1] == 1 else rows_NKW.sum(1, dtype=rows_SW.dtype)
    total = rows_SW.index_select(0, place_NK[:, 0])
    for k in range(1, place_NK.shape[1]):
        total += rows_SW.index_select(0, place_NK[:, k])
    return total


def _dense_rows(*tensors: Tensor) -> bool:
    """One row stride describes each: the last dimension is dense and what lies before it collapses."""
    return all(
        t.dim() >= 2
        and t.stride(-1) == 1
        and all(t.stride(i) == t.stride(i + 1) * t.shape[i + 1] for i in range(t.dim() - 2))
        for t in tensors
    )
