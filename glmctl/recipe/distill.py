"""The recipes of distillation. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glmctl.recipe.finetune import ConversationData
from glmctl.recipe.sections import (
    AdamWSpec,
    CheckpointPolicy,
    Finetuning,
    Optimizer,
    RecipeBase,
    Sampling,
    Schedule,
    Section,
)


class Expert(Section):
    """A model that is asked: one of ours by folder or run, or, with `url`, any behind an OpenAI-compatible server."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of its domain too")
    model: str = Field(description="a model folder or run; with url, the name that the server knows it by")
    url: str | None = Field(None, description="base URL of a server, for example http://127.0.0.1:8000/v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the server's key")
    concurrency: int = Field(8, gt=0, description="requests to the server at once")


class RewardFilter(Section):
    """The reward model that judges what no rule can (the report's third filter)."""

    model: str = Field(description="what `glmctl reward` made")
    min_score: float = Field(0.0, description="samples that score below it are refused")


class Teacher(Expert):
    """An expert and the problems it is asked."""

    problems: list[str] = Field(min_length=1)
    heldout: list[str] = Field(min_length=1)
    prompts: int = Field(gt=0)
    samples_per_prompt: int = Field(4, gt=0)
    direct_fraction: float = Field(0.3, ge=0.0, le=1.0, description="share of kept samples turned into /nothink ones")
    reward: RewardFilter | None = Field(None, description="for a domain that is partly a matter of taste")


class DistillRecipe(Finetuning):
    """Rejection-sample the experts and train one hybrid model from the base (overall SFT)."""

    type: Literal["distill"] = "distill"
    teachers: list[Teacher] = Field(min_length=1)
    student: str = Field(description="the base model, before any expert training")
    sampling: Sampling = Sampling(temperature=0.8)
    min_tokens: int = Field(4, ge=0)
    max_turns: int = Field(4, gt=0)
    episode_tokens: int = Field(1024, gt=1, description="most tokens of an episode, prompt and tool results counted")
    select_hard_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="share of prompts kept, longest responses first; the report keeps 0.5"
    )
    responses_per_prompt: int = Field(4, gt=0, description="most verified responses kept of one prompt")
    mixture: dict[str, float] = Field(
        {}, description="share of the trained tokens by teacher; empty = every conversation once"
    )
    heldout_limit: int = Field(200, gt=0)

    @model_validator(mode="after")
    def _names_fit(self) -> DistillRecipe:
        check_names([teacher.name for teacher in self.teachers], self.mixture)
        return self


def check_names(names: list[str], shares: dict[str, float]) -> None:
    """ValueError for two teachers of one name, a name that is taken, or shares that are not above 0 for each."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"teachers: two have the same name, '{repeated}'")
    taken = next((name for name in names if name in ("base", "hybrid")), None)
    if taken is not None:
        raise ValueError(f"teachers: '{taken}' is what the comparison calls another model")
    if shares and (set(shares) != set(names) or min(shares.values()) <= 0):
        raise ValueError(f"mixture gives every teacher a share above 0: {', '.join(names)}")


class LocalTeacher(Section):
    """A model of ours that says how likely a student's own tokens are, and the problems of its domain."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of its domain too")
    model: str = Field(description="a model folder or run, of the student's tokenizer")
    problems: list[str] = Field(min_length=1)
    heldout: list[str] = Field(min_length=1)
    share: float = Field(1.0, gt=0.0, description="of the prompts of a step, beside the other teachers' shares")


class OnPolicyDistillRecipe(RecipeBase):
    """The student answers, the teachers grade every token of it: reverse KL on the student's own samples."""

    type: Literal["on_policy_distill"] = "on_policy_distill"
    teachers: list[LocalTeacher] = Field(min_length=1)
    student: str = Field(description="a model that can hold the format already: cold-started, or distilled")
    steps: int = Field(gt=0)
    prompts_per_step: int = Field(16, gt=0)
    samples_per_prompt: int = Field(4, gt=0)
    max_tokens: int = Field(256, gt=0, description="of one turn")
    max_turns: int = Field(4, gt=0)
    episode_tokens: int = Field(1024, gt=1, description="most tokens of an episode, prompt and tool results counted")
    micro_tokens: int | None = Field(None, gt=0, description="most tokens in one forward pass; null = the whole step")
    heldout_limit: int = Field(200, gt=0)
    evaluate_every: int = Field(20, gt=0)
    optimizer: Optimizer = AdamWSpec(weight_decay=0.0)
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-5, warmup_fraction=0.05)
    grad_clip: float = Field(1.0, gt=0.0)
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")

    @model_validator(mode="after")
    def _names_fit(self) -> OnPolicyDistillRecipe:
        check_names([teacher.name for teacher in self.teachers], {})
        return self


class LogitDistillRecipe(Finetuning, ConversationData):
    """The student learns the teacher's whole distribution over the next token, on given conversations."""

    type: Literal["logit_distill"] = "logit_distill"
    teacher: str = Field(description="a model folder or run, of the student's tokenizer")
    student: str
    temperature: float = Field(1.0, gt=0.0, description="softens both distributions (Hinton et al. 2015)")
    hard_weight: float = Field(
        0.0, ge=0.0, le=1.0, description="share of the loss that is the data's own tokens, as in SFT"
    )
