"""Newton-Schulz orthogonalisation, the heart of Muon (Jordan et al. 2024; Moonlight report, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from glmctl.kernels.registry import op, variant

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of X <- aX + b(XX^T)X + c(XX^T)^2 X; they trade exactness for speed: singular values end in [0.7, 1.2]."""


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix to each g [..., A, B]: UV^T of its SVD.

    Batched over the leading dimensions. Same shape and dtype as g; computed in fp32 on CPU (where bf16
    products are far slower) and in bf16 on CUDA. A zero matrix stays zero.
    """
    result: Tensor = op("newton_schulz", g.device.type, g.dtype)(g, steps)
    return result


def _iterate(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        # b A + c A^2, then a X + (.) X: two fused multiply-adds
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def _orthogonalise(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    x = g.reshape(-1, g.shape[-2], g.shape[-1])
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x.to(dtype) if wide else x.to(dtype).mT.contiguous()
    x = _iterate(x, steps)
    return (x if wide else x.mT).reshape(g.shape).to(g.dtype)


@variant("newton_schulz", "reference")
def reference(g: Tensor, steps: int) -> Tensor:
    """In the dtype of g."""
    return _orthogonalise(g, steps, g.dtype)


@variant("newton_schulz", "cpu", devices=("cpu",), dtypes=(torch.float32, torch.bfloat16, torch.float16))
def on_cpu(g: Tensor, steps: int) -> Tensor:
    """In fp32."""
    return _orthogonalise(g.float(), steps, torch.float32).to(g.dtype)


@variant("newton_schulz", "cuda", devices=("cuda",))
def on_cuda(g: Tensor, steps: int) -> Tensor:
    """In bf16, as Muon's authors do."""
    return _orthogonalise(g.float(), steps, torch.bfloat16).to(g.dtype)
