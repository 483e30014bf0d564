"""The parts several recipes share. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MuonSpec(Section):
    """Muon for matrices; embedding, biases and norms go to AdamW with the same rate and decay."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    ns_steps: int = Field(5, gt=0)
    update_rms: float = Field(0.2, gt=0.0, description="RMS of the orthogonalised update before the rate")
    weight_decay: float = Field(0.1, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    head: Literal["adamw", "muon"] = Field("adamw", description="optimizer of lm_head; the report leaves it open")


class AdamWSpec(Section):
    """AdamW for everything; decay on matrices only."""

    type: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.1, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)


Optimizer = Annotated[MuonSpec | AdamWSpec, Field(discriminator="type")]


class Schedule(Section):
    """Linear warm-up from zero, then one cosine to `final_lr` at the end of the last stage."""

    peak_lr: float = Field(2.5e-4, gt=0.0)
    final_lr: float = Field(2.5e-5, ge=0.0)
    warmup_fraction: float = Field(0.01, ge=0.0, lt=1.0, description="of all tokens (pretrain) or steps (else)")

    @model_validator(mode="after")
    def _falls(self) -> Schedule:
        if self.final_lr > self.peak_lr:
            raise ValueError("final_lr is above peak_lr")
        return self


class CheckpointPolicy(Section):
    every_steps: int = Field(50, gt=0)
    keep: int = Field(2, gt=0, description="the newest ones kept to resume from")
    keep_every: int | None = Field(None, gt=0, description="those of every such step are kept for good")


class Sampling(Section):
    temperature: float = Field(1.0, ge=0.0, le=2.0, description="0 = greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, description="0 = off")
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    max_tokens: int = Field(256, gt=0)


class RecipeBase(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)


class Finetuning(RecipeBase):
    """What every supervised run on conversations shares: how much, how packed, on which tokens, by which optimizer."""

    steps: int = Field(gt=0)
    batch_tokens: int = Field(8192, gt=0)
    micro_tokens: int | None = Field(None, gt=0, description="most tokens in one forward pass; null = the whole batch")
    sequence_length: int = Field(512, gt=1)
    loss_on: Literal["last_message", "last_turn", "all_turns"] = Field(
        "last_turn", description="all_turns: each as inference meets it, with the reasoning that later turns drop"
    )
    optimizer: Optimizer = MuonSpec()
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-5, warmup_fraction=0.05)
    mtp_weight: float = Field(0.1, ge=0.0)
    grad_clip: float = Field(1.0, gt=0.0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")
