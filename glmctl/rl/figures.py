"""A step's figures, and a run's result from those of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean as mean
from typing import Any

from glmctl.recipe.schema import Sampling
from glmctl.rl.collect import Batch
from glmctl.rl.difficulty import SOLVED
from glmctl.rl.learn import UpdateStats


def metrics_row(batch: Batch, updates: Sequence[UpdateStats], sampling: Sampling, version: int) -> dict[str, Any]:
    """Rewards over all rollouts that ended in a step, and the objective over the groups kept (none: no update).

    version: of the weights that made the step's rollouts; `staleness` is how far behind it the oldest trained token is.
    """
    # a batch that was complete when the step began has no rollouts of its own
    seen = batch.ended or [one for group in batch.groups for one in group]
    judged = [(one, one.reward) for one in seen if one.reward is not None]
    by_task: dict[str, list[float]] = {}
    best: dict[int, float] = {}
    for one, reward in judged:
        by_task.setdefault(one.task, []).append(reward)
        best[one.group] = max(reward, best.get(one.group, 0.0))
    trained = [one for group in batch.groups for one in group]
    row: dict[str, Any] = {
        "reward_mean": mean([reward for _, reward in judged]),
        "reward_by_task": {task: mean(rewards) for task, rewards in sorted(by_task.items())},
        # share of prompts that some sample solved
        "pass_rate": mean([float(reward >= SOLVED) for reward in best.values()]),
        "well_formed": mean([float(one.well_formed) for one, _ in judged]),
        "tokens_mean": mean([float(one.generated_tokens) for one, _ in judged]),
        "infrastructure": len(seen) - len(judged),
        "groups_kept": len(batch.groups),
        "prompts_drawn": batch.drawn,
        "rollouts_stopped": batch.stopped,
        "rollouts_expired": batch.expired,
        "groups_carried": len(batch.carried),
        "staleness": max((version - made for one in trained for made in one.versions), default=0),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "tokens_generated": batch.tokens,
        "tokens_trained": sum(len(one.tokens) for one in trained),
        "seconds_generate": batch.seconds - batch.seconds_reward,
        "seconds_reward": batch.seconds_reward,
    }
    if updates:
        # entropy and gap are about the rollouts as they were made, which the first update sees
        first, last = updates[0], updates[-1]
        row |= {"entropy": first.entropy, "logprob_gap": first.logprob_gap, "ratio_mean": last.ratio_mean}
        row |= {"kl": last.kl, "importance_mean": last.importance_mean}
        row |= {"clip_fraction": last.clip_fraction, "grad_norm": last.grad_norm, "loss": last.loss}
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's result from its metrics: held-out accuracy before and after, rollout reward of first and last step."""
    scores = [row for row in rows if "heldout" in row]
    rewards = [row["reward_mean"] for row in rows if "reward_mean" in row]
    start, end = scores[0]["heldout"], scores[-1]["heldout"]
    return {
        "heldout_start": start,
        "heldout_end": end,
        "heldout_gain_points": 100.0 * (end - start),
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "steps": rows[-1]["step"],
        "well_formed_start": scores[0]["heldout_well_formed"],
        "well_formed": scores[-1]["heldout_well_formed"],
    }
