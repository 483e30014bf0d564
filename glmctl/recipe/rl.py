"""The `rl` recipe and its sections. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmctl.recipe.sections import AdamWSpec, CheckpointPolicy, Optimizer, RecipeBase, Sampling, Schedule, Section


class GrpoSpec(Section):
    """GRPO without KL (spec section 3.3); clip values are slime's, the report gives none."""

    type: Literal["grpo"] = "grpo"
    clip_low: float = Field(0.2, gt=0.0)
    clip_high: float = Field(0.28, gt=0.0)
    std_normalize: bool = True
    aggregation: Literal["token", "sequence"] = "token"
    updates_per_batch: int = Field(1, gt=0)


class RlRecipe(RecipeBase):
    """Synchronous, colocated RL on verifiable rewards, rollouts from our own engine."""

    type: Literal["rl"] = "rl"
    model: str
    problems: list[str] = Field(min_length=1, description="problem files to train on")
    heldout: list[str] = Field(min_length=1, description="problem files never trained on")
    heldout_limit: int = Field(200, gt=0)
    steps: int = Field(gt=0)
    prompts_per_step: int = Field(16, gt=0)
    group_size: int = Field(8, gt=1)
    max_turns: int = Field(4, gt=0)
    episode_tokens: int = Field(1024, gt=1, description="most tokens of an episode, prompt and tool results counted")
    dynamic_sampling: bool = Field(True, description="replace groups whose rewards are all equal")
    oversample: float = Field(1.5, ge=1.0, description="prompts drawn per step, as a multiple of prompts_per_step")
    enable_thinking: bool = True
    sampling: Sampling = Sampling()
    objective: GrpoSpec = GrpoSpec()
    optimizer: Optimizer = AdamWSpec(weight_decay=0.0, betas=(0.9, 0.98))
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-4, warmup_fraction=0.0)
    mtp_weight: float = Field(0.0, ge=0.0, description="MTP loss on rollouts, gradient kept out of the main model")
    micro_tokens: int | None = Field(None, gt=0)
    grad_clip: float = Field(1.0, gt=0.0)
    evaluate_every: int = Field(20, gt=0)
    checkpoint: CheckpointPolicy = CheckpointPolicy(every_steps=10)
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")
