"""Loss-free load balancing of the experts (arXiv 2408.15664), and how uneven the load is.

Legend: L routers (MoE layers in order, the MTP layer's last), E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glmctl.model.network import GlmMoe


@torch.no_grad()
def update_router_bias(model: GlmMoe, counts_LE: Tensor, rate: float, center: bool = False) -> None:
    """b_i += rate * sign(mean load - load_i) in every router, from one optimizer step's counts.

    `counts_LE` is summed over micro-batches and ranks, so that it is the global load and all ranks move alike.
    `center` subtracts the mean of the signs (Moonlight's variant), which keeps the sum of the biases.
    """
    for router, counts_E in zip(model.routers(), counts_LE, strict=False):
        load_E = counts_E.to(torch.float32)
        sign_E = torch.sign(load_E.mean() - load_E)
        if center:
            sign_E = sign_E - sign_E.mean()
        router.e_score_correction_bias.add_(rate * sign_E.to(router.e_score_correction_bias.device))


def max_vio(counts_LE: Tensor) -> float:
    """MaxVio = (largest load - mean load) / mean load, averaged over the layers; 0 is perfect balance."""
    if counts_LE.numel() == 0:
        return 0.0
    load_LE = counts_LE.to(torch.float64)
    mean_L = load_LE.mean(1)
    return float(((load_LE.amax(1) - mean_L) / mean_L.clamp(min=1e-9)).mean())


def dead_experts(counts_LE: Tensor) -> int:
    """Experts, over all layers, that no token of the step was sent to."""
    return int((counts_LE == 0).sum())


def expert_load(counts_LE: Tensor) -> list[list[float]]:
    """Each expert's share of its layer's assignments; every row sums to 1 (or is 0 when nothing was routed)."""
    load_LE = counts_LE.to(torch.float64)
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1.0)
    return [[round(value, 6) for value in row] for row in share_LE.tolist()]
