"""The recipes of distillation. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import Finetuning, Sampling, Section


class Expert(Section):
    """A model that is asked: one of ours by folder or run, or, with `url`, any behind an OpenAI-compatible server."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of its domain too")
    model: str = Field(description="a model folder or run; with url, the name that the server knows it by")
    url: str | None = Field(None, description="base URL of a server, for example http://127.0.0.1:8000/v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the server's key")
    concurrency: int = Field(8, gt=0, description="requests to the server at once")


class Teacher(Expert):
    """An expert and the problems it is asked."""

    problems: list[str] = Field(min_length=1)
    heldout: list[str] = Field(min_length=1)
    prompts: int = Field(gt=0)
    samples_per_prompt: int = Field(4, gt=0)
    direct_fraction: float = Field(0.3, ge=0.0, le=1.0, description="share of kept samples turned into /nothink ones")


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
