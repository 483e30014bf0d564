"""The recipe of a reward model. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmctl.recipe.finetune import ConversationData, ConversationFiles
from glmctl.recipe.sections import AdamWSpec, CheckpointPolicy, Optimizer, RecipeBase, Schedule


class RewardRecipe(RecipeBase, ConversationData):
    """Train a scorer of conversations on pairs of a chosen and a rejected one (Bradley-Terry)."""

    type: Literal["reward"] = "reward"
    model: str
    heldout: list[str | ConversationFiles] = Field([], description="pairs that are never trained on")
    steps: int = Field(gt=0)
    pairs_per_step: int = Field(16, gt=0)
    micro_tokens: int | None = Field(None, gt=0, description="most tokens in one forward pass; null = the whole step")
    sequence_length: int = Field(512, gt=1, description="pairs with a longer conversation are left out, and counted")
    center_weight: float = Field(
        0.0, ge=0.0, description="of (chosen + rejected)^2, which keeps scores around 0 (Eisenstein et al. 2023)"
    )
    optimizer: Optimizer = AdamWSpec(weight_decay=0.0)
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-5, warmup_fraction=0.05)
    grad_clip: float = Field(1.0, gt=0.0)
    precision: Literal["fp32", "bf16"] = "fp32"
    evaluate_every: int = Field(50, gt=0, description="steps between held-out accuracies")
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")
