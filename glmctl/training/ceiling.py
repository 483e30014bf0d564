"""How much arithmetic a step is, and how much this device can do: the two sides of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time

import torch

from glmctl.model.config import ModelConfig

SIDE = 1024
"""of the measured product: large enough to reach the machine's best rate, small enough to take a few milliseconds"""


def flops_per_token(config: ModelConfig, sequence_length: int, *, mtp: bool) -> float:
    """Floating-point operations of one trained token: 6 for each matrix element it passes, forward and backward
    (Kaplan et al. 2020, section 2.1), and 3 x the causal half of the scores and their sums over the row.

    `mtp` counts the MTP layer and its pass through the output matrix. Documents shorter than the row make the attention
    term an upper bound.
    """
    c = config
    counts = c.parameter_counts()
    head = c.vocab_size * c.hidden_size
    layers = c.num_hidden_layers
    elements = counts.active + head
    if mtp:
        elements += counts.active_mtp + head
        layers += 1
    scores = 2 * sequence_length * c.num_attention_heads * c.head_dim * layers
    return 6.0 * elements + 3.0 * scores


def matmul_ceiling(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` square products on `device`, in torch's present number of threads."""
    a = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        if out.device.type == "cuda":
            torch.cuda.synchronize(out.device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * SIDE**3 / best
