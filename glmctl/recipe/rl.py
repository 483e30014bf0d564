"""The `rl` recipe and its sections. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glmctl.recipe.rl_schedule import Curriculum, DynamicTemperature, LengthStage, Rollouts
from glmctl.recipe.sections import AdamWSpec, CheckpointPolicy, Optimizer, RecipeBase, Sampling, Schedule, Section


class OverlongPenalty(Section):
    """DAPO's soft over-long punishment (arXiv 2503.14476, eq. 13), subtracted from the reward before advantages."""

    cache_tokens: int = Field(gt=0, description="the ramp: 0 at max_tokens - cache_tokens, full at max_tokens")
    weight: float = Field(1.0, gt=0.0)


class PolicySpec(Section):
    """What the clipped policy-gradient objectives share."""

    type: Literal["grpo", "gspo"]
    clip_low: float = Field(0.2, gt=0.0)
    clip_high: float = Field(0.28, gt=0.0)
    std_normalize: bool = Field(True, description="divide advantages by the group's standard deviation")
    aggregation: Literal["token", "sequence"] = Field("token", description="mean over tokens, or over trajectories")
    kl_weight: float = Field(0.0, ge=0.0, description="of the KL to the start model; 0 (the report) loads no reference")
    kl_corrected: bool = Field(False, description="weigh each token's KL by its ratio (DeepSeek-V3.2)")
    importance_cap: float | None = Field(
        None, gt=0.0, description="truncated importance sampling between engine and trainer; null = off"
    )
    overlong: OverlongPenalty | None = None
    mask_truncated: bool = Field(False, description="leave samples that ran out of tokens out of the loss, not at 0")
    updates_per_batch: int = Field(1, gt=0, description="optimizer steps on each batch of rollouts")
    logprob_gap_limit: float = Field(
        1e-3, gt=0.0, description="most mean |trainer - engine| log-prob on fresh rollouts, nats a token"
    )


class GrpoSpec(PolicySpec):
    """GRPO without KL (spec section 3.3); clip values are slime's (and DAPO's), the report gives none."""

    type: Literal["grpo"] = "grpo"


class GspoSpec(PolicySpec):
    """GSPO: one ratio a trajectory (arXiv 2507.18071); clip values are those of its section 5.1."""

    type: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, gt=0.0)
    clip_high: float = Field(4e-4, gt=0.0)
    aggregation: Literal["token", "sequence"] = "sequence"


Objective = Annotated[GrpoSpec | GspoSpec, Field(discriminator="type")]


SandboxLevel = Literal["B", "C", "http", "unsafe-none"]


class SandboxSpec(Section):
    """Where code that the model writes is run; `glmctl doctor` shows what this machine offers."""

    level: SandboxLevel = Field("B", description="never exchanged for a lower one; http is an executor elsewhere")
    url: str | None = Field(None, description="of the HTTP executor; its key is GLMCTL_SANDBOX_KEY")
    wall_seconds: float = Field(5.0, gt=0.0)
    memory_mb: int = Field(256, ge=64)
    processes: int = Field(32, gt=0)

    @model_validator(mode="after")
    def _has_url(self) -> SandboxSpec:
        if (self.level == "http") != (self.url is not None):
            raise ValueError("url belongs to level http, and level http needs one")
        return self


class RlRecipe(RecipeBase):
    """Synchronous, colocated RL on verifiable rewards, rollouts from our own engine."""

    type: Literal["rl"] = "rl"
    mode: Literal["full", "rollout_only", "train_only"] = Field(
        "full", description="rollout_only: the weights stay as they are; train_only: on what another run recorded"
    )
    recorded: str | None = Field(None, description="the run whose rollouts/ train_only trains on")
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
    rollouts: Rollouts = Rollouts()
    curriculum: Curriculum | None = Field(None, description="null = every problem, in shuffled order")
    dynamic_temperature: DynamicTemperature | None = Field(None, description="null = sampling.temperature throughout")
    lengths: list[LengthStage] = Field(
        [], description="a progressive schedule; empty = one stage of sampling.max_tokens (what the report found best)"
    )
    sandbox: SandboxSpec = SandboxSpec()
    objective: Objective = GrpoSpec()
    optimizer: Optimizer = AdamWSpec(weight_decay=0.0, betas=(0.9, 0.98))
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-4, warmup_fraction=0.0)
    mtp_weight: float = Field(0.0, ge=0.0, description="MTP loss on rollouts, gradient kept out of the main model")
    micro_tokens: int | None = Field(None, gt=0)
    grad_clip: float = Field(1.0, gt=0.0)
    evaluate_every: int = Field(20, gt=0)
    checkpoint: CheckpointPolicy = CheckpointPolicy(every_steps=10)
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")

    @model_validator(mode="after")
    def _modes_fit(self) -> RlRecipe:
        if (self.mode == "train_only") != (self.recorded is not None):
            raise ValueError("recorded belongs to mode train_only, and train_only needs it")
        if self.mode == "train_only" and (self.curriculum or self.dynamic_temperature or self.lengths):
            raise ValueError("train_only makes no rollouts: no curriculum, dynamic_temperature or lengths")
        return self

    @model_validator(mode="after")
    def _lengths_grow(self) -> RlRecipe:
        if self.lengths:
            steps, sizes = [one.from_step for one in self.lengths], [one.max_tokens for one in self.lengths]
            if steps[0] != 1 or sorted(set(steps)) != steps or sorted(sizes) != sizes:
                raise ValueError("lengths must begin at step 1 and rise in steps and tokens")
            if sizes[-1] != self.sampling.max_tokens:
                raise ValueError("the last of lengths must be sampling.max_tokens, which held-out answers get")
        return self
