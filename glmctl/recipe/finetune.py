"""Recipes of supervised post-training: `sft` and `distill`. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from glmctl.recipe.sections import Finetuning, Sampling, Section


class SftRecipe(Finetuning):
    """Packed supervised fine-tuning on conversations; loss on assistant tokens and the closing role token."""

    type: Literal["sft"] = "sft"
    model: str
    data: list[str] = Field(min_length=1, description="JSON lines of {messages, tools?, enable_thinking?}")


class Teacher(Section):
    """An expert and the problems it is asked."""

    name: str
    model: str
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
    heldout_limit: int = Field(200, gt=0)
