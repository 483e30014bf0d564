"""Every kind of recipe, typed. Importable without torch.

A recipe file is YAML with a `type`; the type decides which fields exist. Unknown keys are refused.
Token counts are numbers of tokens, learning rates are per optimizer step, sizes are in the unit named.
A path field may name a file, a folder, a run directory, or (inside a pipeline) `${stage}`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from glmctl.errors import nearest
from glmctl.recipe.agentic import AgenticRecipe
from glmctl.recipe.data import (
    ArithmeticTask,
    BundledText,
    ConversationsSource,
    DataRecipe,
    FillInTheMiddle,
    HuggingFaceSource,
    JsonLinesSource,
    ParquetSource,
    ProblemsRecipe,
    ReasoningRecipe,
    RepositoryHistory,
    Source,
    SourceTree,
    Task,
    TextSource,
    TokenizerRecipe,
    ToolUseTask,
)
from glmctl.recipe.distill import (
    DistillRecipe,
    Expert,
    LocalTeacher,
    LogitDistillRecipe,
    OnPolicyDistillRecipe,
    RewardFilter,
    Teacher,
)
from glmctl.recipe.evaluation import EvalRecipe, Needle
from glmctl.recipe.finetune import ConversationFiles, SftRecipe
from glmctl.recipe.lora import LoraSpec
from glmctl.recipe.pretrain import Balance, BatchRamp, MtpLoss, PretrainRecipe, TrainStage, Validation
from glmctl.recipe.reward import RewardRecipe
from glmctl.recipe.rl import GrpoSpec, GspoSpec, OverlongPenalty, PolicySpec, RlRecipe, SandboxLevel, SandboxSpec
from glmctl.recipe.rl_schedule import (
    AfterSteps,
    Curriculum,
    DynamicTemperature,
    HardStage,
    LengthStage,
    ModerateStage,
    OnPlateau,
    PlateauRule,
    Rollouts,
)
from glmctl.recipe.sections import (
    AdamWSpec,
    CheckpointPolicy,
    Finetuning,
    MuonSpec,
    Optimizer,
    RecipeBase,
    Sampling,
    Schedule,
    Section,
)
from glmctl.recipe.tasks import AlgebraTask, CodeCallsTask, CodeTask, CustomTask, GymTask, InstructionsTask, ScienceTask
from glmctl.recipe.use import ConvertRecipe, ServeRecipe, Upcycling

__all__ = [
    "AdamWSpec",
    "AfterSteps",
    "AgenticRecipe",
    "AlgebraTask",
    "ArithmeticTask",
    "Balance",
    "BatchRamp",
    "BundledText",
    "CheckpointPolicy",
    "CodeCallsTask",
    "CodeTask",
    "ConversationFiles",
    "ConversationsSource",
    "ConvertRecipe",
    "Curriculum",
    "CustomTask",
    "DataRecipe",
    "DistillRecipe",
    "DynamicTemperature",
    "EvalRecipe",
    "Expert",
    "FillInTheMiddle",
    "Finetuning",
    "GrpoSpec",
    "GspoSpec",
    "GymTask",
    "HardStage",
    "HuggingFaceSource",
    "InstructionsTask",
    "JsonLinesSource",
    "LengthStage",
    "LocalTeacher",
    "LogitDistillRecipe",
    "LoraSpec",
    "ModerateStage",
    "MtpLoss",
    "MuonSpec",
    "Needle",
    "OnPlateau",
    "OnPolicyDistillRecipe",
    "Optimizer",
    "OverlongPenalty",
    "ParquetSource",
    "PipelineRecipe",
    "PipelineStage",
    "PlateauRule",
    "PolicySpec",
    "PretrainRecipe",
    "ProblemsRecipe",
    "ReasoningRecipe",
    "Recipe",
    "RecipeBase",
    "RepositoryHistory",
    "RewardFilter",
    "RewardRecipe",
    "RlRecipe",
    "Rollouts",
    "Sampling",
    "SandboxLevel",
    "SandboxSpec",
    "Schedule",
    "ScienceTask",
    "Section",
    "ServeRecipe",
    "SftRecipe",
    "Source",
    "SourceTree",
    "StudyRecipe",
    "Task",
    "Teacher",
    "TextSource",
    "TokenizerRecipe",
    "ToolUseTask",
    "TrainStage",
    "Upcycling",
    "Validation",
]


class PipelineStage(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    recipe: str
    set: dict[str, Any] = Field({}, description="overrides by dotted key; `${stage}` is that stage's run directory")


class PipelineRecipe(RecipeBase):
    """Several recipes as one resumable run."""

    type: Literal["pipeline"] = "pipeline"
    stages: list[PipelineStage] = Field(min_length=1)


class StudyRecipe(RecipeBase):
    """The same stages under several settings (arms) and seeds, side by side."""

    type: Literal["study"] = "study"
    before: list[PipelineStage] = Field([], description="stages that run once, for all arms")
    stages: list[PipelineStage] = Field(min_length=1, description="stages of every arm and seed")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="what an arm sets, by STAGE.key; STAGE.recipe takes another recipe"
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of every stage that the arms repeat")
    metrics: dict[str, list[str]] = Field(
        min_length=1, description="label -> STAGE.key of its summary; the first that an arm has"
    )

    @model_validator(mode="after")
    def _names_fit(self) -> StudyRecipe:
        own = {stage.name for stage in self.stages}
        keys = [key for arm in self.arms.values() for key in arm] + [k for keys in self.metrics.values() for k in keys]
        for key in keys:
            if key.partition(".")[0] not in own:
                match = nearest(key.partition(".")[0], own)
                more = f"did you mean '{match}'?" if match else f"one of: {', '.join(sorted(own))}"
                raise ValueError(f"'{key}' begins with no stage; {more}")
        bad = next((name for name in self.arms if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)), None)
        if bad is not None:
            raise ValueError(f"arms: '{bad}' does not match ^[a-z0-9][a-z0-9-]*$")
        return self


Recipe = Annotated[
    TokenizerRecipe
    | DataRecipe
    | ProblemsRecipe
    | ReasoningRecipe
    | AgenticRecipe
    | PretrainRecipe
    | SftRecipe
    | RewardRecipe
    | RlRecipe
    | DistillRecipe
    | OnPolicyDistillRecipe
    | LogitDistillRecipe
    | EvalRecipe
    | ConvertRecipe
    | ServeRecipe
    | PipelineRecipe
    | StudyRecipe,
    Field(discriminator="type"),
]
