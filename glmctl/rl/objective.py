"""The clipped policy-gradient objective without KL, and its two aggregations (spec section 3.3).

Legend: N tokens that the model generated, flat over all trajectories of an update; S trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """`loss` is differentiable; the rest are detached sums over the N tokens given, to be divided by the caller."""

    loss: Tensor
    ratio_sum: float
    clipped: int
    """tokens where the clipped branch is the larger loss, so that they push the policy no further"""


def token_weights(lengths: Sequence[int], aggregation: Literal["token", "sequence"]) -> list[float]:
    """The weight of each token of trajectory s in the loss; the weighted sum over all tokens is the mean.

    token: 1 / sum(lengths), each token counts alike. sequence: 1 / (S * length_s), each trajectory counts alike.
    `lengths` are the numbers of generated tokens of *all* trajectories of the update, whatever the micro-batches.
    """
    if aggregation == "token":
        return [1.0 / sum(lengths)] * len(lengths)
    return [1.0 / (len(lengths) * length) for length in lengths]


def policy_loss(
    logp_N: Tensor,
    behaviour_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """Sum over tokens of w * max(-rho * A, -clip(rho, 1 - clip_low, 1 + clip_high) * A), rho = exp(logp - behaviour).

    PPO's clip (arXiv 1707.06347, eq. 7) with the two sides apart (DAPO, arXiv 2503.14476, section 3.1). All inputs
    fp32 [N]; only `logp_N` carries a gradient. There is no KL term.
    """
    ratio_N = torch.exp(logp_N - behaviour_logp_N)
    plain_N = -ratio_N * advantage_N
    clipped_N = -ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage_N
    loss = (weight_N * torch.maximum(plain_N, clipped_N)).sum()
    clipped = int((clipped_N > plain_N).sum())
    return PolicyLoss(loss, float(ratio_N.detach().double().sum()), clipped)
