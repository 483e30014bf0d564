"""The recipe of supervised fine-tuning. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glmctl.recipe.lora import LoraSpec
from glmctl.recipe.sections import Finetuning, Section

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


class ToolStyle(Section):
    """How tools and calls are written; the defaults are GLM-4.5's, the others are for contrast."""

    calls: Literal["tags", "json"] = "tags"
    declaration: Literal["json", "typescript"] = "json"


class SftRecipe(Finetuning, ConversationData):
    """Packed supervised fine-tuning on conversations; loss on assistant tokens and the closing role token."""

    type: Literal["sft"] = "sft"
    model: str
    tool_style: ToolStyle | None = Field(
        None, description="the exported model's template writes tools so; null = as the model's own does"
    )
    lora: LoraSpec | None = Field(None, description="train low-rank adapters instead of the weights")
