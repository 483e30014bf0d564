"""Output projection and cross-entropy together, so that logits are never whole in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.fused import passes
from glmctl.kernels.registry import op, variant

IGNORE = -100
"""target of a position that carries no loss"""

_CHUNK = {"cpu": 256, "cuda": 4096}
"""rows at a time: on CPU few enough for the logits to stay in cache, on CUDA enough to fill the device"""

_PADDING = 16
"""Columns added to the row stride of the logits: with a power-of-two vocabulary all rows of a column would share
one cache set, which halves the speed of the weight gradient."""


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int | None = None, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over rows with a target of `-log softmax(hidden @ weight.T)[target]`, in nats, and how many rows.

    With `z_weight`, plus z_weight * log(Z)^2 with Z the softmax's normaliser (z-loss; PaLM, section 5).

    hidden [N, D], weight [V, D], targets [N] int64 with -100 for "no loss": such rows cost nothing.
    Returns (loss_sum, count): fp32 and int64 scalars. Gradients are made in the forward, `chunk` rows at
    a time, so the backward is a multiplication by the incoming scalar. Differentiable once.
    """
    hidden_ND, weight_VD = _one_dtype(hidden_ND, weight_VD)
    kept = (targets_N != IGNORE).nonzero().squeeze(1)
    count = torch.tensor(kept.numel(), device=hidden_ND.device)
    if kept.numel() < targets_N.numel():
        hidden_ND, targets_N = hidden_ND.index_select(0, kept), targets_N.index_select(0, kept)
    chunk = chunk or _CHUNK.get(hidden_ND.device.type, 1024)
    loss = op("linear_cross_entropy", hidden_ND.device.type, hidden_ND.dtype)(
        hidden_ND, weight_VD, targets_N, chunk, z_weight
    )
    return loss, count


def token_log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[target] for each row: [N], fp32, nats.

    Every target must be a token (no -100). Chunked; the backward recomputes the logits of each chunk.
    Differentiable once, in hidden and weight.
    """
    assert temperature > 0
    chunk = chunk or _CHUNK.get(hidden_ND.device.type, 1024)
    hidden_ND, weight_VD = _one_dtype(hidden_ND, weight_VD)
    result: Tensor = _TokenLogProbs.apply(hidden_ND, weight_VD, targets_N, temperature, chunk)  # type: ignore[no-untyped-call]
    return result


def _one_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden_ND.to(dtype), weight_VD.to(dtype)
    return hidden_ND, weight_VD.to(hidden_ND.dtype)


def _buffer(hidden_ND: Tensor, weight_VD: Tensor, rows: int) -> Tensor:
    """Room for the logits of `rows` rows."""
    vocabulary = weight_VD.shape[0]
    return hidden_ND.new_empty(min(rows, hidden_ND.shape[0]), vocabulary + _PADDING)[:, :vocabulary]


def _add_outer(total_VD: Tensor, grad_logits_NV: Tensor, hidden_ND: Tensor) -> None:
    """total += grad_logits^T hidden; the total may be wider than its terms."""
    if total_VD.dtype == hidden_ND.dtype:
        total_VD.addmm_(grad_logits_NV.t(), hidden_ND)
    else:
        total_VD += grad_logits_NV.t() @ hidden_ND


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@variant("linear_cross_entropy", "reference")
def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, z_weight: float = 0.0) -> Tensor:
    """The definition, all logits at once."""
    logits = _wide(hidden_ND @ weight_VD.t())
    return F.cross_entropy(logits, targets_N, reduction="sum") + z_weight * logits.logsumexp(1).square().sum()


@variant("linear_cross_entropy", "chunked", devices=("cpu", "cuda"))
def chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, z_weight: float = 0.0) -> Tensor:
    """A chunk of rows at a time, with the gradients made on the way when they will be wanted."""
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, chunk, z_weight, torch.is_grad_enabled()
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk: int,
        z_weight: float,
        grad_enabled: bool,
    ) -> Tensor:
        for_hidden, for_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=_wide(hidden_ND[:0]).dtype, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if for_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=loss.dtype) if for_weight else None
        buffer = _buffer(hidden_ND, weight_VD, chunk)
        for start in range(0, hidden_ND.shape[0], chunk):
            hidden = hidden_ND[start : start + chunk]
            target = targets_N[start : start + chunk]
            logits = _wide(torch.mm(hidden, weight_VD.t(), out=buffer[: hidden.shape[0]]))
            loss += passes.softmax_loss(logits, target, gradient=for_hidden or for_weight, z_weight=z_weight).sum()
            if not (for_hidden or for_weight):
                continue
            # the logits have become softmax - one-hot, their gradient
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[start : start + chunk])
            if grad_weight is not None:
                _add_outer(grad_weight, grad_logits, hidden)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # a number without dimensions: it is read at full width and the product is rounded once
        scaled = [None if g is None else g * grad for g in (grad_hidden, grad_weight)]
        return scaled[0], scaled[1], None, None, None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        parts, normalisers = [], []
        buffer = _buffer(hidden_ND, weight_VD, chunk)
        for start in range(0, hidden_ND.shape[0], chunk):
            hidden = hidden_ND[start : start + chunk]
            logits = _wide(torch.mm(hidden, weight_VD.t(), out=buffer[: hidden.shape[0]])).div_(temperature)
            normaliser = logits.logsumexp(1)
            parts.append(logits.gather(1, targets_N[start : start + chunk, None]).squeeze(1) - normaliser)
            normalisers.append(normaliser)
        empty = torch.zeros(0, dtype=_wide(hidden_ND[:0]).dtype, device=hidden_ND.device)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, torch.cat([*normalisers, empty]))
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat([*parts, empty])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_ND, weight_VD, targets_N, normaliser_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=normaliser_N.dtype) if ctx.needs_input_grad[1] else None
        buffer = _buffer(hidden_ND, weight_VD, ctx.chunk)
        for start in range(0, hidden_ND.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            hidden, target = hidden_ND[rows], targets_N[rows, None]
            logits = _wide(torch.mm(hidden, weight_VD.t(), out=buffer[: hidden.shape[0]])).div_(ctx.temperature)
            grad = grad_N[rows, None] / ctx.temperature
            # d logp / d logits = (one-hot - softmax) / temperature
            grad_logits = logits.sub_(normaliser_N[rows, None]).exp_().mul_(-grad)
            grad_logits.scatter_(1, target, grad_logits.gather(1, target) + grad)
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_outer(grad_weight, grad_logits, hidden)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None
