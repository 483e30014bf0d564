"""The choice of experts from a router's scores: a selection-only bias and group-limited top-k (spec section 1.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from glmctl.kernels.registry import op, variant


def router_topk(
    scores_NE: Tensor,
    bias_E: Tensor | None,
    *,
    top_k: int,
    groups: int,
    groups_kept: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token and weigh them.

    scores_NE: sigmoid or softmax of the router logits, fp32. bias_E: `e_score_correction_bias`, added for the choice
    only (None: none); weights are made of the unbiased scores, divided by their sum (+1e-20) when `normalize`, times
    `scale`. Returns indices [N, k] (int64) and weights [N, k] (fp32, differentiable in the scores).
    """
    choose = op("router_topk", scores_NE.device.type, scores_NE.dtype)
    with torch.no_grad():
        choice_NE = scores_NE.detach()
        index_NK: Tensor = choose(choice_NE if bias_E is None else choice_NE + bias_E, top_k, groups, groups_kept)
    weight_NK = scores_NE.gather(-1, index_NK)
    if normalize:
        weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
    if scale != 1.0:
        weight_NK = weight_NK * scale
    return index_NK, weight_NK


def _limit_groups(choice_NE: Tensor, groups: int, groups_kept: int) -> Tensor:
    """Experts outside the best `groups_kept` groups become -inf; a group scores the sum of its two best."""
    if groups == groups_kept:
        return choice_NE
    grouped = choice_NE.view(choice_NE.shape[0], groups, -1)
    score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = score.topk(groups_kept, dim=-1, sorted=False).indices
    dropped = torch.ones_like(score, dtype=torch.bool).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)


@variant("router_topk", "reference")
def reference(choice_NE: Tensor, top_k: int, groups: int, groups_kept: int) -> Tensor:
    """Indices of the top-k of the biased scores after the group limit, in no promised order."""
    return _limit_groups(choice_NE, groups, groups_kept).topk(top_k, dim=-1, sorted=False).indices


@variant("router_topk", "argmax", devices=("cpu",))
def by_argmax(choice_NE: Tensor, top_k: int, groups: int, groups_kept: int) -> Tensor:
    """k rounds of argmax: several times faster than `topk` on CPU for few experts."""
    limited = _limit_groups(choice_NE, groups, groups_kept)
    if top_k > 2 or limited.shape[-1] > 16 or limited.shape[0] < 256:
        return limited.topk(top_k, dim=-1, sorted=False).indices
    first = limited.argmax(-1, keepdim=True)
    if top_k == 1:
        return first
    rest = limited.scatter(-1, first, float("-inf"))
    return torch.cat([first, rest.argmax(-1, keepdim=True)], dim=-1)
