"""The router of a mixture-of-experts layer, and what a training step wants to know of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmctl.kernels.router_topk import router_topk
from glmctl.model.config import ModelConfig


class RouterStats:
    """Expert loads and the sequence-level balance loss of one forward pass, over its MoE layers in order.

    Pass a fresh one to `GlmMoe.forward` and then to `GlmMoe.mtp`, which adds the MTP layer as the last row.
    Padding (document id -1) is left out. Holds plain tensors only.
    """

    def __init__(self, *, sequence_balance: bool = True) -> None:
        self.sequence_balance = sequence_balance
        self.valid_BT: Tensor | None = None
        self._counts: list[Tensor] = []
        self._losses: list[Tensor] = []

    def stand_in(self) -> RouterStats:
        """An empty one that is told of the same sequences, for a pass whose findings are not wanted."""
        other = RouterStats(sequence_balance=self.sequence_balance)
        other.valid_BT = self.valid_BT
        return other

    @property
    def counts_LE(self) -> Tensor:
        """Tokens sent to each expert [L, E], int64, detached; the bias update sums it over ranks and micro-batches."""
        return torch.stack(self._counts)

    @property
    def sequence_loss(self) -> Tensor:
        """Sum over layers, mean over sequences, of sum_i f_i P_i (DeepSeek-V3, eq. 17-20, without alpha).

        f_i = E / (k T) times how often i is among the k largest unbiased scores; P_i = the mean over the
        sequence of i's share of the scores. 1 per layer when perfectly even. Differentiable through P.
        """
        assert self._losses, "no MoE layer reported a sequence loss"
        return torch.stack(self._losses).sum()

    def add(self, scores_NE: Tensor, index_NK: Tensor, rows: int) -> None:
        """Record one layer: scores [N, E], chosen experts [N, k] of `rows` sequences (N = rows * T)."""
        n_experts, top_k = scores_NE.shape[1], index_NK.shape[1]
        valid_N = None if self.valid_BT is None else self.valid_BT.reshape(-1)
        self._counts.append(_loads(index_NK, valid_N, n_experts))
        if not self.sequence_balance:
            return
        scores_BTE = scores_NE.view(rows, -1, n_experts)
        share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        with torch.no_grad():
            best = scores_NE.topk(top_k, dim=-1, sorted=False).indices
            hit_BTE = torch.zeros_like(scores_NE).scatter_(1, best, 1.0).view_as(scores_BTE)
            if self.valid_BT is None:
                length_B1 = scores_NE.new_full((rows, 1), scores_BTE.shape[1])
            else:
                hit_BTE = hit_BTE * self.valid_BT[..., None]
                length_B1 = self.valid_BT.sum(1, keepdim=True).to(scores_NE.dtype)
            sequences = (length_B1 > 0).sum().clamp(min=1)
            length_B1 = length_B1.clamp(min=1)
            load_BE = hit_BTE.sum(1) * (n_experts / top_k) / length_B1
        if self.valid_BT is not None:
            share_BTE = share_BTE * self.valid_BT[..., None]
        mean_share_BE = share_BTE.sum(1) / length_B1
        self._losses.append((load_BE * mean_share_BE).sum() / sequences)


def _loads(index_NK: Tensor, valid_N: Tensor | None, n_experts: int) -> Tensor:
    """How many of the valid tokens chose each expert: [E], int64."""
    if index_NK.device.type != "cpu":
        return _loads_unseen(index_NK, valid_N, n_experts)
    chosen = index_NK if valid_N is None else index_NK[valid_N]
    return torch.bincount(chosen.reshape(-1), minlength=n_experts)


def _loads_unseen(index_NK: Tensor, valid_N: Tensor | None, n_experts: int) -> Tensor:
    """The same without bincount or a choice of rows, for whose sizes the host would wait."""
    # a token's experts are distinct
    hit_NE = torch.zeros(len(index_NK), n_experts, dtype=torch.bool, device=index_NK.device)
    hit_NE.scatter_(1, index_NK, True)
    return (hit_NE if valid_N is None else hit_NE & valid_N[:, None]).sum(0)


class Router(nn.Module):
    """Scores every expert for every token in fp32 and chooses (spec section 1.3; softmax scores: section 1.8).

    A softmax router has no selection bias: its buffer makes all routers alike, but is neither used nor stored.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=dtype))
        self.biased = config.scoring_func == "sigmoid"
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E, persistent=self.biased)

    def forward(self, x_ND: Tensor, *, rows: int, stats: RouterStats | None) -> tuple[Tensor, Tensor]:
        """x [N, D] -> experts [N, k] int64 and weights [N, k] fp32. Gradient flows to `weight`, never to the bias."""
        with torch.autocast(x_ND.device.type, enabled=False):
            wide = torch.promote_types(x_ND.dtype, torch.float32)
            logits_NE = F.linear(x_ND.to(wide), self.weight.to(wide))
            scores_NE = logits_NE.sigmoid() if self.biased else logits_NE.softmax(-1)
        c = self.config
        index_NK, weight_NK = router_topk(
            scores_NE,
            self.e_score_correction_bias if self.biased else None,
            top_k=c.num_experts_per_tok,
            groups=c.n_group,
            groups_kept=c.topk_group,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )
        if stats is not None:
            stats.add(scores_NE, index_NK, rows)
        return index_NK, weight_NK

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves like any module, but the bias keeps fp32 under `model.to(bfloat16)`: its steps of 1e-3 would vanish."""
        before = self.e_score_correction_bias
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(device=after.device)
        return result
