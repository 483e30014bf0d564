"""Output projection and cross-entropy together, so that logits are never whole in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.registry import op, variant

IGNORE = -100
"""target of a position that carries no loss"""


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Sum over rows with a target of `-log softmax(hidden @ weight.T)[target]`, in nats, and how many rows.

    hidden [N, D], weight [V, D], targets [N] int64 with -100 for "no loss": such rows cost nothing.
    Returns (loss_sum, count): fp32 and int64 scalars. Gradients are made in the forward, a `chunk` of rows at
    a time, so the backward is a multiplication by the incoming scalar. Differentiable once.
    """
    hidden_ND, weight_VD = _one_dtype(hidden_ND, weight_VD)
    kept = (targets_N != IGNORE).nonzero().squeeze(1)
    count = torch.tensor(kept.numel(), device=hidden_ND.device)
    if kept.numel() < targets_N.numel():
        hidden_ND, targets_N = hidden_ND.index_select(0, kept), targets_N.index_select(0, kept)
    loss = op("linear_cross_entropy", hidden_ND.device.type, hidden_ND.dtype)(hidden_ND, weight_VD, targets_N, chunk)
    return loss, count


def token_log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[target] for each row: [N], fp32, nats.

    Every target must be a token (no -100). Chunked; the backward recomputes the logits of each chunk.
    Differentiable once, in hidden and weight.
    """
    assert temperature > 0
    hidden_ND, weight_VD = _one_dtype(hidden_ND, weight_VD)
    result: Tensor = _TokenLogProbs.apply(hidden_ND, weight_VD, targets_N, temperature, chunk)  # type: ignore[no-untyped-call]
    return result


def _one_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden_ND.to(dtype), weight_VD.to(dtype)
    return hidden_ND, weight_VD.to(hidden_ND.dtype)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@variant("linear_cross_entropy", "reference")
def reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    """The definition, all logits at once."""
    return F.cross_entropy(_wide(hidden_ND @ weight_VD.t()), targets_N, reduction="sum")


@variant("linear_cross_entropy", "chunked", devices=("cpu", "cuda"))
def chunked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    """A chunk of rows at a time, with the gradients made on the way when they will be wanted."""
    result: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, grad_enabled: bool
    ) -> Tensor:
        wanted = grad_enabled and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        loss = torch.zeros((), dtype=_wide(hidden_ND[:0]).dtype, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        grad_weight = torch.zeros_like(weight_VD, dtype=loss.dtype) if wanted else None
        for start in range(0, hidden_ND.shape[0], chunk):
            hidden = hidden_ND[start : start + chunk]
            target = targets_N[start : start + chunk, None]
            logits = _wide(hidden @ weight_VD.t())
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target)
            exp = logits.sub_(top).exp_()
            total = exp.sum(1, keepdim=True)
            loss += (total.log() + top - chosen).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot
            grad_logits = exp.div_(total)
            grad_logits.scatter_(1, target, grad_logits.gather(1, target) - 1)
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden[start : start + chunk])
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden)
            else:
                grad_weight += grad_logits.t() @ hidden
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype) if ctx.needs_input_grad[0] else None,
            grad_weight * grad.to(grad_weight.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        parts, normalisers = [], []
        for start in range(0, hidden_ND.shape[0], chunk):
            logits = _wide(hidden_ND[start : start + chunk] @ weight_VD.t()).div_(temperature)
            normaliser = logits.logsumexp(1)
            parts.append(logits.gather(1, targets_N[start : start + chunk, None]).squeeze(1) - normaliser)
            normalisers.append(normaliser)
        empty = torch.zeros(0, dtype=_wide(hidden_ND[:0]).dtype, device=hidden_ND.device)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, torch.cat([*normalisers, empty]))
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat([*parts, empty])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_ND, weight_VD, targets_N, normaliser_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=normaliser_N.dtype)
        for start in range(0, hidden_ND.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            hidden, target = hidden_ND[rows], targets_N[rows, None]
            logits = _wide(hidden @ weight_VD.t()).div_(ctx.temperature)
            grad = grad_N[rows, None] / ctx.temperature
            # d logp / d logits = (one-hot - softmax) / temperature
            grad_logits = logits.sub_(normaliser_N[rows, None]).exp_().mul_(-grad)
            grad_logits.scatter_(1, target, grad_logits.gather(1, target) + grad)
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden[rows])
            grad_weight += grad_logits.t() @ hidden
        return grad_hidden, grad_weight.to(weight_VD.dtype), None, None, None
