"""The `pretrain` recipe and its sections. Importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from glmctl.model.config import ModelConfig
from glmctl.recipe.presets import resolve_model
from glmctl.recipe.sections import CheckpointPolicy, MuonSpec, Optimizer, RecipeBase, Schedule, Section


class Balance(Section):
    """Loss-free balancing plus the sequence-level loss (spec section 2)."""

    bias_update_rate: float | None = Field(
        None, ge=0.0, description="null = 1e-3, and 0 for softmax routers, which have no bias"
    )
    until_tokens: int | None = Field(None, gt=0, description="rate is 0 from here on; null = never")
    center: bool = Field(False, description="subtract the mean of the signs (Moonlight's variant)")
    sequence_loss_weight: float = Field(1e-4, ge=0.0)


class MtpLoss(Section):
    weight: float = Field(0.3, ge=0.0)
    then_weight: float = Field(0.1, ge=0.0)
    switch_tokens: int | None = Field(None, gt=0, description="tokens after which `then_weight` holds; null = never")


class TrainStage(Section):
    """One stretch of pretraining with its own data, length and RoPE base."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    data: str
    tokens: int = Field(gt=0, description="places in rows; what best_fit packing leaves empty counts")
    sequence_length: int = Field(gt=1)
    packing: Literal["concat", "best_fit"] = "concat"
    rope_theta: float | None = Field(None, gt=0.0, description="null keeps the base of the stage before")
    export: bool = Field(False, description="also export the model as it is when this stage ends, to `stages/NAME`")


class BatchRamp(Section):
    """Tokens per optimizer step: from `start_tokens`, rising linearly over `ramp_tokens`, to `tokens`."""

    tokens: int = Field(gt=0)
    start_tokens: int | None = Field(None, gt=0)
    ramp_tokens: int = Field(0, ge=0)
    micro_tokens: int | None = Field(None, gt=0, description="most tokens in one forward pass; null = the whole batch")


class Validation(Section):
    every_steps: int = Field(100, gt=0)
    tokens: int = Field(65_536, gt=0)


class PretrainRecipe(RecipeBase):
    type: Literal["pretrain"] = "pretrain"
    model: ModelConfig
    tokenizer: str
    stages: list[TrainStage] = Field(min_length=1)
    batch: BatchRamp
    optimizer: Optimizer = MuonSpec()
    schedule: Schedule = Schedule()
    balance: Balance = Field(Balance(), validate_default=True)
    mtp: MtpLoss = MtpLoss()
    grad_clip: float = Field(1.0, gt=0.0)
    z_weight: float = Field(0.0, ge=0.0, description="weight of the z-loss, log(Z)^2 of every target (PaLM); 0 = none")
    spike_factor: float | None = Field(
        10.0, gt=1.0, description="skip a step with such a multiple of the usual gradient norm and a jump in loss"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = Field(False, description="recompute activations in the backward: less memory, a third more time")
    compile: bool = Field(
        False,
        description="norms, RoPE and SwiGLU by torch.compile: for CUDA; on a CPU the kernels of our own are faster",
    )
    verify_data: bool = Field(
        True, description="before the first step, compare the shards with their manifest's SHA-256"
    )
    validation: Validation = Validation()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    sample_prompts: list[str] = Field([], description="texts the base model continues after each stage")
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return resolve_model(value)

    @field_validator("balance")
    @classmethod
    def _bias_that_is_there(cls, value: Balance, info: ValidationInfo) -> Balance:
        model = info.data.get("model")
        biased = model is None or model.scoring_func == "sigmoid"
        if value.bias_update_rate is None:
            return value.model_copy(update={"bias_update_rate": 1e-3 if biased else 0.0})
        if value.bias_update_rate > 0 and not biased:
            raise ValueError("a softmax router has no selection bias: bias_update_rate must be 0 or left out")
        return value

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)
