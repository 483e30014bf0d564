"""Next-token, multi-token-prediction and balance losses of one micro-batch, as one module for DDP to wrap.

Legend: B rows, T tokens a row, L routers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from glmctl.data.batches import Batch
from glmctl.kernels.linear_cross_entropy import linear_cross_entropy
from glmctl.model.network import GlmMoe, RouterStats


class Losses(NamedTuple):
    """Sums, not means: what they are divided by is known only over all micro-batches and ranks."""

    main: Tensor
    """sum of -log p(t_{i+1}) over the targets, nats"""
    mtp: Tensor
    """sum of -log p(t_{i+2}) by the MTP layer, nats; 0 when not asked for"""
    balance: Tensor
    """sum over layers, mean over sequences of sum_i f_i P_i (DeepSeek-V3 eq. 17-20), without alpha"""
    counts_LE: Tensor
    """tokens sent to each expert, int64"""


class LossModule(nn.Module):
    """The model with its training losses. Everything differentiable happens in one `forward`, which DDP needs."""

    def __init__(self, model: GlmMoe, *, always_mtp: bool = False) -> None:
        """`always_mtp`: run the MTP layer even at weight 0, so that every parameter has a gradient (DDP).

        Nothing of such a pass counts: not its loads, not its balance; its gradients are the caller's to drop.
        """
        super().__init__()
        self.model = model
        self.always_mtp = always_mtp

    def forward(self, batch: Batch, mtp: bool, balance: bool, z_weight: float = 0.0) -> Losses:
        """Losses of one micro-batch on the model's device; `mtp` and `balance` say which are wanted.

        `z_weight` times the squared log-normaliser is part of the main loss (PaLM, section 5).
        """
        model = self.model
        documents_BT = None if batch.single_document else batch.documents_BT
        placed = {"positions_BT": batch.positions_BT, "documents_BT": documents_BT}
        stats = RouterStats(sequence_balance=balance)
        hidden_BTD = model(batch.tokens_BT, **placed, stats=stats)
        zero = torch.zeros((), device=hidden_BTD.device)
        main, _ = linear_cross_entropy(
            hidden_BTD.flatten(0, 1), model.head_weight, batch.targets_BT.flatten(), z_weight=z_weight
        )
        second = zero
        if model.mtp is not None and (mtp or self.always_mtp):
            mtp_BTD = model.mtp(hidden_BTD, batch.mtp_tokens_BT, **placed, stats=stats if mtp else None)
            second, _ = linear_cross_entropy(mtp_BTD.flatten(0, 1), model.head_weight, batch.mtp_targets_BT.flatten())
        routed = model.config.num_moe_layers > 0 or (model.mtp is not None and mtp)
        counts_LE = stats.counts_LE if routed else torch.zeros(0, model.config.n_routed_experts, dtype=torch.int64)
        return Losses(main, second, stats.sequence_loss if balance and routed else zero, counts_LE)


@torch.no_grad()
def main_loss(model: GlmMoe, batch: Batch) -> tuple[float, int]:
    """Sum of -log p(t_{i+1}) in nats and the number of targets, without gradients: for validation."""
    documents_BT = None if batch.single_document else batch.documents_BT
    hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=documents_BT)
    loss, count = linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, batch.targets_BT.flatten())
    return float(loss), int(count)
