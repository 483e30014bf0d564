"""The clipped policy-gradient objectives and their two aggregations (spec section 3.3).

Legend: N tokens that the model generated, flat over all trajectories of a micro-batch; S trajectories.
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
    kl_sum: float
    """sum of the per-token estimates of KL(policy || reference), nats; 0 without a reference"""


def token_weights(lengths: Sequence[int], aggregation: Literal["token", "sequence"]) -> list[float]:
    """The weight of each token of trajectory s in the loss; the weighted sum over all tokens is the mean.

    token: 1 / sum(lengths), each token counts alike (DAPO, arXiv 2503.14476, eq. 12; the GLM-4.5 report's
    token-weighted mean). sequence: 1 / (S * length_s), each trajectory counts alike (GRPO, arXiv 2402.03300, eq. 3).
    `lengths` are the numbers of generated tokens of *all* trajectories of the update, whatever the micro-batches.
    """
    if aggregation == "token":
        return [1.0 / sum(lengths)] * len(lengths)
    return [1.0 / (len(lengths) * length) for length in lengths]


def policy_loss(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_N: Tensor | None = None,
    importance_N: Tensor | None = None,
    reference_logp_N: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_corrected: bool = False,
) -> PolicyLoss:
    """Sum over tokens of w * (c * max(-rho * A, -clip(rho, 1 - clip_low, 1 + clip_high) * A) + kl_weight * KL).

    PPO's clip (arXiv 1707.06347, eq. 7) with the two sides apart (DAPO, arXiv 2503.14476, eq. 10).

    rho is `exp(logp - old)` of the token; with `sequence_N` (int64: which trajectory of the micro-batch a token is
    of) it is the trajectory's, see `sequence_log_ratio` (GSPO). `importance_N` is c, see `truncated_importance`.
    With `reference_logp_N` the loss holds `kl_weight` times `kl_estimate` of each token, itself times rho when
    `kl_corrected`. All inputs are [N], fp32; only `logp_N` carries a gradient.
    """
    log_ratio_N = logp_N - old_logp_N
    if sequence_N is not None:
        log_ratio_N = sequence_log_ratio(log_ratio_N, sequence_N)
    ratio_N = torch.exp(log_ratio_N)
    plain_N = -ratio_N * advantage_N
    clipped_N = -ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage_N
    loss_N = torch.maximum(plain_N, clipped_N)
    if importance_N is not None:
        loss_N = loss_N * importance_N
    kl_sum = 0.0
    if reference_logp_N is not None:
        kl_N = kl_estimate(logp_N, reference_logp_N)
        # times rho the estimate's gradient, too, is unbiased for the reverse KL (DeepSeek-V3.2, arXiv 2512.02556)
        loss_N = loss_N + kl_weight * (kl_N * ratio_N if kl_corrected else kl_N)
        kl_sum = float(kl_N.detach().double().sum())
    loss = (weight_N * loss_N).sum()
    return PolicyLoss(loss, float(ratio_N.detach().double().sum()), int((clipped_N > plain_N).sum()), kl_sum)


def sequence_log_ratio(log_ratio_N: Tensor, sequence_N: Tensor) -> Tensor:
    """The mean of a trajectory's token log-ratios, given to each of its tokens: [N], differentiable.

    GSPO (arXiv 2507.18071, eq. 7): s_i = (pi(y_i) / pi_old(y_i)) ** (1 / |y_i|), so log s_i is that mean.
    """
    count = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    sums_S = log_ratio_N.new_zeros(count).index_add(0, sequence_N, log_ratio_N)
    lengths_S = torch.bincount(sequence_N, minlength=count).clamp(min=1)
    return (sums_S / lengths_S)[sequence_N]


def truncated_importance(old_logp_N: Tensor, behaviour_logp_N: Tensor, cap: float) -> Tensor:
    """min(pi_old(token) / pi_engine(token), cap): what corrects for engine and trainer giving different log-probs.

    `old` is the trainer's log-prob under the weights that generated, `behaviour` the engine's. Constant in the
    gradient. Truncated importance sampling: Ionides 2008; for RL engines Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training" (slime's `--use-tis`, cap 2).
    """
    return torch.exp(old_logp_N - behaviour_logp_N).clamp(max=cap).detach()


def kl_estimate(logp_N: Tensor, reference_logp_N: Tensor) -> Tensor:
    """exp(ref - logp) - (ref - logp) - 1 of each sampled token, nats: unbiased for KL(policy || ref), never negative.

    Schulman's k3 ("Approximating KL divergence", 2020) as GRPO uses it (arXiv 2402.03300, eq. 4).
    """
    difference_N = reference_logp_N - logp_N
    return torch.exp(difference_N) - difference_N - 1.0
