"""The policy in training: the updates that one batch of rollouts is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import RlRecipe, Sampling
from glmctl.rl.episode import Trajectory
from glmctl.rl.invariants import Ledger, check_versions
from glmctl.rl.learn import UpdateStats, update, weigh
from glmctl.rl.pack import pack
from glmctl.training.step import Stepper

OF_ANOTHER_RUN = -1
"""a weight version that no rollout of this run has"""


class Policy:
    """A model, its stepper, its reference where the objective wants one, and what it was trained on."""

    def __init__(self, model: GlmMoe, stepper: Stepper, recipe: RlRecipe, start: Path) -> None:
        """`start` is the folder of the model that the run began with: the reference of the KL."""
        self.model = model
        self._stepper = stepper
        self._recipe = recipe
        self._objective = recipe.objective
        if recipe.rollouts.precision != "fp32":
            limit = recipe.rollouts.fp8_gap_limit
            self._objective = recipe.objective.model_copy(update={"logprob_gap_limit": limit})
        self._staleness = recipe.rollouts.max_staleness if recipe.rollouts.unfinished == "carry" else 0
        self.ledger = Ledger(memory=1 + self._staleness)
        self._reference: GlmMoe | None = None
        if recipe.objective.kl_weight > 0:
            self._reference = load_model(start, device=model.device, dtype=torch.float32).requires_grad_(False)

    def learn(
        self, groups: Sequence[Sequence[Trajectory]], step: int, lr: float, sampling: Sampling
    ) -> list[UpdateStats]:
        """`updates_per_batch` optimizer steps, each over the whole batch; the clip bounds what the later ones may do.

        The weights before step s have version s - 1. Rollouts that another run recorded are not held to any version,
        nor to ratio 1. Nothing to train on (every sample masked) is no update.
        """
        recipe, objective, version = self._recipe, self._objective, step - 1
        recorded = recipe.mode == "train_only"
        weighted = weigh(
            groups, objective, max_tokens=sampling.max_tokens, version=OF_ANOTHER_RUN if recorded else version
        )
        if not weighted:
            return []
        trained = [one.trajectory for one in weighted]
        if not recorded:
            check_versions(trained, version, self._staleness)
        self.ledger.enter(trained, step)
        batches = [batch.to(self.model.device) for batch in pack(weighted, recipe.micro_tokens)]
        stats: list[UpdateStats] = []
        for _ in range(objective.updates_per_batch):
            stats.append(
                update(
                    self.model,
                    self._stepper,
                    batches,
                    objective,
                    lr=lr,
                    temperature=sampling.temperature,
                    mtp_weight=recipe.mtp_weight,
                    old=stats[0].logp if stats else None,
                    reference=self._reference,
                    reference_is_start=self._reference is not None and step == 1 and not stats,
                )
            )
        return stats
