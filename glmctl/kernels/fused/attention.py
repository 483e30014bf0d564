"""Causal attention inside documents, compiled: no mask, no padding, no regrouping, on the projections' own layout.

Forward and backward of FlashAttention's algorithm (Dao et al. 2022, section 3.1) with whole rows of scores: a
document's scores of a block of queries fit in a core's cache, so nothing needs rescaling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glmctl.kernels.fused.library import call, compiled, strip


def usable(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> bool:
    """Whether `documents` takes these: fp32 on the CPU, wanted with gradients, heads of one suitable width.

    Without gradients (validation, the engine) torch's own attention is used: the engine is held to it.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (q_BTHd, k_BTKd, v_BTKd))
    one_width = q_BTHd.shape[-1] == v_BTKd.shape[-1]
    return wanted and one_width and compiled(q_BTHd, k_BTKd, v_BTKd) is not None and q_BTHd.shape[-1] % strip() == 0


def documents(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, start_S: Tensor, length_S: Tensor) -> Tensor:
    """Attention of each document to itself; zero at tokens of none. Returns [B, T, H, d].

    start_S, length_S (int64 on the CPU): flat first token and length of every document, the longest first so that
    threads end together.
    """
    result: Tensor = _Documents.apply(q_BTHd, k_BTKd, v_BTKd, start_S, length_S)  # type: ignore[no-untyped-call]
    return result


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, start_S: Tensor, length_S: Tensor) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.covered = int(length_S.sum()) == q.shape[0] * q.shape[1]
        out = _room(q, ctx.covered)
        lse = q.new_empty(q.shape[:-1])
        ctx.sizes = (start_S.numel(), start_S, length_S, q.shape[2], k.shape[2], q.shape[3], q.shape[3] ** -0.5)
        call("glm_attention", *ctx.sizes, q, k, v, out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grads = [_room(x, ctx.covered) for x in (q, k, v)]
        call("glm_attention_back", *ctx.sizes, q, k, v, out, lse, grad.contiguous(), *grads)
        return grads[0], grads[1], grads[2], None, None


def _room(like: Tensor, covered: bool) -> Tensor:
    """Padding is never visited, so where there is any it must be zero from the start."""
    return torch.empty_like(like) if covered else torch.zeros_like(like)
