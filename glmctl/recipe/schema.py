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
    RetrievalSource,
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
    "RetrievalSource",
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


class Choice(Section):
    """Which of an arm's searched settings is its best."""

    metric: str = Field(description="a label of `metrics`, as the first seed has it")
    best: Literal["lowest", "highest"] = "lowest"


class StudyRecipe(RecipeBase):
    """The same stages under several settings (arms) and seeds, side by side; an arm may search for its best first."""

    type: Literal["study"] = "study"
    before: list[PipelineStage] = Field([], description="stages that run once, for all arms")
    stages: list[PipelineStage] = Field(min_length=1, description="stages of every arm and seed")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="what an arm sets, by STAGE.key; STAGE.recipe takes another recipe"
    )
    search: dict[str, list[dict[str, Any]]] = Field(
        {}, description="arm -> settings to try on the first seed; the best joins what the arm sets, for all seeds"
    )
    choose: Choice | None = Field(None, description="what makes a searched setting the best")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of every stage that the arms repeat")
    metrics: dict[str, list[str]] = Field(
        min_length=1, description="label -> STAGE.key of its summary; the first that an arm has"
    )

    curves: dict[str, str] = Field({}, description="label -> STAGE.key of its metrics, drawn as the mean of the seeds")

    @model_validator(mode="after")
    def _names_fit(self) -> StudyRecipe:
        own = {stage.name for stage in self.stages}
        settings = [*self.arms.values(), *(setting for tried in self.search.values() for setting in tried)]
        keys = [key for one in settings for key in one]
        keys += [key for alternatives in self.metrics.values() for key in alternatives]
        for key in [*keys, *self.curves.values()]:
            if key.partition(".")[0] not in own:
                raise ValueError(f"'{key}' begins with no stage; {_choice(key.partition('.')[0], own)}")
        bad = next((name for name in self.arms if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)), None)
        if bad is not None:
            raise ValueError(f"arms: '{bad}' does not match ^[a-z0-9][a-z0-9-]*$")
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> StudyRecipe:
        for arm, tried in self.search.items():
            if arm not in self.arms:
                raise ValueError(f"search: no arm is called '{arm}'; {_choice(arm, set(self.arms))}")
            if not tried:
                raise ValueError(f"search: arm '{arm}' has no settings to try")
        if self.search and self.choose is None:
            raise ValueError("search: needs `choose`, which says what makes a setting the best")
        if self.choose is not None and self.choose.metric not in self.metrics:
            raise ValueError(
                f"choose: no metric '{self.choose.metric}'; {_choice(self.choose.metric, set(self.metrics))}"
            )
        return self


def _choice(given: str, known: set[str]) -> str:
    match = nearest(given, known)
    return f"did you mean '{match}'?" if match else f"one of: {', '.join(sorted(known))}"


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
