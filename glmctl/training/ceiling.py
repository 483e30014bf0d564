"""How much arithmetic a step is, and how much this device can do: the two sides of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time

import torch

from glmctl.model.config import ModelConfig
from glmctl.model.cost import forward_flops

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the measured product: large enough to reach the device's best rate (a GPU starts a product of 1024 slower than it
computes it), small enough to take a few milliseconds."""


def flops_per_token(config: ModelConfig, sequence_length: int, *, mtp: bool) -> float:
    """Floating-point operations of one trained token: the forward's (`model.cost`) and twice as many backward
    (Kaplan et al. 2020, section 2.1); a token sees half the row on average.

    `mtp` counts the MTP layer and its pass through the output matrix. Documents shorter than the row make the attention
    term an upper bound.
    """
    seen = (sequence_length + 1) / 2
    forward = forward_flops(config, seen).total
    if mtp:
        forward += forward_flops(config, seen, mtp=True).total
    return 3.0 * forward


def matmul_ceiling(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` square products on `device`, in torch's present number of threads."""
    side = SIDE.get(torch.device(device).type, SIDE["cpu"])
    # not of ones, which a GPU multiplies at a higher clock than numbers of a model
    a = torch.rand(side, side, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        if out.device.type == "cuda":
            torch.cuda.synchronize(out.device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * side**3 / best
