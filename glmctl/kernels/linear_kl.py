"""Two output projections and the divergence between their softmaxes together, so that logits are never whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glmctl.kernels.registry import op, variant

CHUNK = {"cpu": 256, "cuda": 2048}
"""rows at a time; three times their logits are in memory"""


def linear_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_ND: Tensor,
    teacher_weight_VD: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of T^2 KL(teacher || student) of the softmaxes at temperature T (Hinton et al. 2015, section 2).

    hidden [N, D] and weight [V, D] of the student, [N, D'] and [V, D'] of the teacher; one vocabulary. Returns nats,
    an fp32 scalar. Differentiable once, in the student's hidden and weight; the teacher's get no gradient.
    """
    assert temperature > 0
    assert weight_VD.shape[0] == teacher_weight_VD.shape[0], "one vocabulary"
    dtype = hidden_ND.dtype
    chunk = chunk or CHUNK.get(hidden_ND.device.type, 1024)
    result: Tensor = op("linear_kl", hidden_ND.device.type, dtype)(
        hidden_ND,
        weight_VD.to(dtype),
        teacher_hidden_ND.detach(),
        teacher_weight_VD.detach().to(teacher_hidden_ND.dtype),
        temperature,
        chunk,
    )
    return result


@variant("linear_kl", "reference")
def reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_ND: Tensor,
    teacher_weight_VD: Tensor,
    temperature: float,
    chunk: int,
) -> Tensor:
    """The definition, all logits at once."""
    student_NV = torch.log_softmax(_wide(hidden_ND @ weight_VD.t()) / temperature, 1)
    teacher_NV = torch.log_softmax(_wide(teacher_hidden_ND @ teacher_weight_VD.t()) / temperature, 1)
    return temperature**2 * (teacher_NV.exp() * (teacher_NV - student_NV)).sum()


@variant("linear_kl", "chunked", devices=("cpu", "cuda"))
def chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_ND: Tensor,
    teacher_weight_VD: Tensor,
    temperature: float,
    chunk: int,
) -> Tensor:
    """A chunk of rows at a time, with the gradients made on the way."""
    result: Tensor = _LinearKl.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, teacher_hidden_ND, teacher_weight_VD, temperature, chunk
    )
    return result


class _LinearKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        teacher_hidden_ND: Tensor,
        teacher_weight_VD: Tensor,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        loss = torch.zeros((), dtype=_wide(hidden_ND[:0]).dtype, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=loss.dtype)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            student = torch.log_softmax(_wide(hidden_ND[rows] @ weight_VD.t()) / temperature, 1)
            teacher = torch.log_softmax(_wide(teacher_hidden_ND[rows] @ teacher_weight_VD.t()) / temperature, 1)
            share = teacher.exp()
            loss += temperature**2 * share.mul(teacher.sub_(student)).sum()
            # d (T^2 KL) / d logits = T (student - teacher)
            grad_logits = student.exp_().sub_(share).mul_(temperature)
            grad_weight_VD += grad_logits.t() @ _wide(hidden_ND[rows])
            torch.mm(grad_logits.to(hidden_ND.dtype), weight_VD, out=grad_hidden_ND[rows])
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grad, grad_weight_VD * grad, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
