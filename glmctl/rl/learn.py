"""One optimizer update from a batch of trajectories, with the invariants that hold while it happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from glmctl.kernels.linear_cross_entropy import linear_cross_entropy, token_log_probs
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import OverlongPenalty, PolicySpec
from glmctl.rl import invariants
from glmctl.rl.advantage import group_advantages, overlong_penalty
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.objective import policy_loss, token_weights, truncated_importance
from glmctl.rl.pack import PackedRollouts, Weighted
from glmctl.training.step import Stepper


@dataclass(frozen=True)
class UpdateStats:
    """Means over the N generated tokens of one update, under the weights before it."""

    loss: float
    grad_norm: float
    entropy: float
    """nats: minus the mean log-prob of the sampled tokens, an unbiased estimate of the policy's entropy"""
    ratio_mean: float
    clip_fraction: float
    logprob_gap: float
    """mean |trainer - engine| in nats over the tokens that the weights before the update made (0 if none)"""
    kl: float = 0.0
    """nats to the reference; 0 without one"""
    importance_mean: float = 1.0
    """mean truncated importance weight; 1 when it is off"""
    logp: list[Tensor] = field(default_factory=list, repr=False, compare=False)
    """the trainer's log-probs, one tensor a micro-batch: `old` of the next update of the same batch"""


def weigh(
    groups: Sequence[Sequence[Trajectory]], spec: PolicySpec, *, max_tokens: int, version: int | None = None
) -> list[Weighted]:
    """Every trajectory to train on with its advantage and token weight.

    Left out are infrastructure failures and, with `mask_truncated`, samples that ran out of tokens; they take no
    part in their group's mean either. `max_tokens` bounds a model turn: where the over-long penalty ends. `version`
    is that of the weights about to be trained: tokens of older ones are not held to ratio 1 (None: all are fresh).
    Raises AdvantageNotCentred when a group's advantages do not sum to about zero.
    """
    kept: list[tuple[Trajectory, float]] = []
    for group in groups:
        rewards = [shaped_reward(one, spec, max_tokens) for one in group]
        advantages = group_advantages(rewards, std_normalize=spec.std_normalize)
        invariants.check_advantages(group, rewards, advantages)
        kept += [(one, a) for one, reward, a in zip(group, rewards, advantages, strict=True) if reward is not None]
    weights = token_weights([one.generated_tokens for one, _ in kept], spec.aggregation)
    return [
        Weighted(one, advantage, weight, version is None or all(made == version for made in one.versions))
        for (one, advantage), weight in zip(kept, weights, strict=True)
    ]


def breakdown(group: Sequence[Trajectory], spec: PolicySpec, *, max_tokens: int) -> list[dict[str, float | None]]:
    """What became of each sample's reward: `verifier`, `overlong` (the penalty), `shaped` (their sum, None where the
    sample is left out), and its `advantage` in the group.
    """
    rewards = [shaped_reward(one, spec, max_tokens) for one in group]
    advantages = group_advantages(rewards, std_normalize=spec.std_normalize)
    return [
        {
            "verifier": one.reward,
            "overlong": overlong_of(one, spec.overlong, max_tokens),
            "shaped": reward,
            "advantage": None if reward is None else advantage,
        }
        for one, reward, advantage in zip(group, rewards, advantages, strict=True)
    ]


def shaped_reward(one: Trajectory, spec: PolicySpec, max_tokens: int) -> float | None:
    """The reward that advantages are made of: None when masked, less the over-long penalty of its longest turn."""
    if one.reward is None or (spec.mask_truncated and one.stop_reason is StopReason.TRUNCATED):
        return None
    return one.reward + overlong_of(one, spec.overlong, max_tokens)


def overlong_of(one: Trajectory, spec: OverlongPenalty | None, max_tokens: int) -> float:
    """The (negative) over-long penalty of a trajectory; 0 without one."""
    if spec is None:
        return 0.0
    longest = max((sum(1 for _ in turn) for made, turn in groupby(one.loss_mask) if made), default=0)
    return spec.weight * overlong_penalty(longest, max_tokens, spec.cache_tokens)


def update(
    model: GlmMoe,
    stepper: Stepper,
    batches: Sequence[PackedRollouts],
    spec: PolicySpec,
    *,
    lr: float,
    temperature: float,
    mtp_weight: float,
    old: Sequence[Tensor] | None = None,
    reference: GlmMoe | None = None,
    reference_is_start: bool = False,
) -> UpdateStats:
    """Accumulate the objective over the micro-batches, then take one step at rate `lr`.

    `old` None is the first update of a batch: its fresh tokens must have ratio 1, and LogprobMismatch or RatioOffOne
    is raised before the step when they have not. Later updates get the `logp` of the first. With
    `reference_is_start` the reference equals the policy, so that the KL must be 0 (FirstStepKl). Raises
    RouterBiasMoved when a selection bias changes.
    """
    biases = invariants.router_biases(model)
    sums = dict.fromkeys(("loss", "gap", "logp", "ratio", "fresh_ratio", "kl", "importance"), 0.0)
    clipped = tokens = fresh = 0
    known: list[Tensor] = []
    for index, batch in enumerate(batches):
        hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.at_N]
        logp_N = token_log_probs(hidden_ND, model.head_weight, batch.target_N, temperature=temperature)
        known.append(logp_N.detach())
        old_N, importance_N = batch.behaviour_logp_N, None
        if spec.importance_cap is not None:
            old_N = known[-1] if old is None else old[index]
            importance_N = truncated_importance(old_N, batch.behaviour_logp_N, spec.importance_cap)
            sums["importance"] += float(importance_N.sum())
        part = policy_loss(
            logp_N,
            old_N,
            batch.advantage_N,
            batch.weight_N,
            clip_low=spec.clip_low,
            clip_high=spec.clip_high,
            sequence_N=batch.sequence_N if spec.type == "gspo" else None,
            importance_N=importance_N,
            reference_logp_N=None if reference is None else _log_probs(reference, batch, temperature),
            kl_weight=spec.kl_weight,
            kl_corrected=spec.kl_corrected,
        )
        stepper.accumulate(part.loss)
        if mtp_weight > 0:
            accumulate_mtp(model, hidden_BTD, batch, mtp_weight * float(batch.weight_N.sum()))
        difference_N = (known[-1] - batch.behaviour_logp_N)[batch.fresh_N]
        sums["loss"] += float(part.loss.detach())
        sums["gap"] += float(difference_N.abs().sum())
        sums["fresh_ratio"] += float(difference_N.double().exp().sum())
        sums["logp"] += float(known[-1].sum())
        sums["ratio"] += part.ratio_sum
        sums["kl"] += part.kl_sum
        clipped += part.clipped
        tokens += len(logp_N)
        fresh += len(difference_N)
    if old is None and fresh:
        invariants.check_fresh(sums["gap"] / fresh, sums["fresh_ratio"] / fresh, spec.logprob_gap_limit)
    if reference_is_start:
        invariants.check_first_kl(sums["kl"] / tokens)
    grad_norm = stepper.update(lr)
    invariants.check_biases(model, biases)
    return UpdateStats(
        loss=sums["loss"],
        grad_norm=grad_norm,
        entropy=-sums["logp"] / tokens,
        ratio_mean=sums["ratio"] / tokens,
        clip_fraction=clipped / tokens,
        logprob_gap=sums["gap"] / max(fresh, 1),
        kl=sums["kl"] / tokens,
        importance_mean=1.0 if spec.importance_cap is None else sums["importance"] / tokens,
        logp=known,
    )


@torch.no_grad()
def _log_probs(model: GlmMoe, batch: PackedRollouts, temperature: float) -> Tensor:
    """Log-probs [N] of the generated tokens under another model."""
    hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    hidden_ND = hidden_BTD.flatten(0, 1)[batch.at_N]
    return token_log_probs(hidden_ND, model.head_weight, batch.target_N, temperature=temperature)


def accumulate_mtp(model: GlmMoe, hidden_BTD: Tensor, batch: PackedRollouts, weight: float) -> None:
    """Add the gradient of `weight` times the MTP layer's mean loss on the generated tokens, to that layer alone.

    The hidden states are detached, and the shared embedding and head receive no gradient either, so the draft layer
    follows the policy without changing it (as slime trains it; the report says nothing of MTP during RL). Only the
    clipping of the global gradient norm sees both.
    """
    assert model.mtp is not None, "checked when the run starts"
    mtp_BTD = model.mtp(
        hidden_BTD.detach(),
        batch.next_tokens_BT,
        positions_BT=batch.positions_BT,
        documents_BT=batch.documents_BT,
    )
    mtp_MD = mtp_BTD.flatten(0, 1)[batch.mtp_at_M]
    loss, count = linear_cross_entropy(mtp_MD, model.head_weight.detach(), batch.mtp_target_M)
    torch.autograd.backward(loss * (weight / max(int(count), 1)), inputs=list(model.mtp.parameters()))
