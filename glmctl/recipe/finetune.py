"""Recipes of supervised post-training: `sft` and `distill`. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import Finetuning, Sampling, Section

ConversationFormat = Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca"]


class ConversationFiles(Section):
    """Conversations to read: a file, a folder of the `datasets` library, or a data set of the Hugging Face hub."""

    path: str | None = Field(None, description=".jsonl, .json or .parquet (.gz, .zst), or a datasets folder")
    dataset: str | None = Field(None, description="name on the hub, OWNER/NAME")
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    format: ConversationFormat = Field("auto", description="auto: by the columns of the first row")

    @model_validator(mode="after")
    def _one_place(self) -> ConversationFiles:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("one of path and dataset is needed, and not both")
        return self

    @property
    def name(self) -> str:
        """What a message calls it."""
        return self.path or self.dataset or ""


class ConversationData(Section):
    """What every run on conversations reads."""

    data: list[str | ConversationFiles] = Field(min_length=1, description="conversations; a string is a path")
    bad_rows: float = Field(0.0, ge=0.0, le=1.0, description="share of unusable rows that a source may have")


class SftRecipe(Finetuning, ConversationData):
    """Packed supervised fine-tuning on conversations; loss on assistant tokens and the closing role token."""

    type: Literal["sft"] = "sft"
    model: str


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
