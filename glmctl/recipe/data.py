"""Recipes that make text into tokens and problems: `tokenizer`, `data`, `problems`. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from glmctl.recipe.sections import RecipeBase, Section


class TextSource(Section):
    """Plain text files, one document a file."""

    type: Literal["text"] = "text"
    domain: str
    paths: list[str]
    weight: float = Field(1.0, gt=0, description="times each document is seen in one epoch (mixture weight)")
    max_bytes: int | None = Field(None, gt=0)


class JsonLinesSource(Section):
    """JSON lines (optionally .gz), one document a line under `field`."""

    type: Literal["jsonl"] = "jsonl"
    domain: str
    paths: list[str]
    field: str = "text"
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class SourceTree(Section):
    """Source code below `root`; `python:stdlib` names the running interpreter's standard library."""

    type: Literal["source_tree"] = "source_tree"
    domain: str
    root: str
    include: list[str] = Field(["*.py"])
    exclude: list[str] = Field(["test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "__pycache__"])
    repo_level: bool = Field(True, description="join the files of one package, in dependency order, in one document")
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class BundledText(Section):
    """Prose that is at hand without a network: `jargon-file` ships here, `python-topics` with CPython."""

    type: Literal["bundled"] = "bundled"
    domain: str
    text: Literal["jargon-file", "python-topics"]
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class ConversationsSource(Section):
    """JSON lines of {messages, tools?}, rendered by the chat template: instruction data for mid-training."""

    type: Literal["conversations"] = "conversations"
    domain: str
    paths: list[str]
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


Source = Annotated[
    TextSource | JsonLinesSource | SourceTree | BundledText | ConversationsSource, Field(discriminator="type")
]


class FillInTheMiddle(Section):
    """Applied to source code only; rate and order are not given in the report (spec section 2)."""

    rate: float = Field(0.5, ge=0.0, le=1.0)
    spm_rate: float = Field(0.5, ge=0.0, le=1.0, description="share of FIM documents in suffix-prefix-middle order")


class TokenizerRecipe(RecipeBase):
    """Train a byte-level BPE that carries GLM's 36 special tokens in their order."""

    type: Literal["tokenizer"] = "tokenizer"
    sources: list[Source]
    vocab_size: int = Field(4096, ge=320, description="with the 36 special tokens")
    digits: Literal[1, 3] = Field(3, description="most digits in one pre-token; GLM uses 3")


class DataRecipe(RecipeBase):
    """Text to token shards with a manifest."""

    type: Literal["data"] = "data"
    tokenizer: str
    sources: list[Source]
    fim: FillInTheMiddle = FillInTheMiddle()
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5, description="of documents, chosen by content hash")
    shard_tokens: int = Field(16_777_216, gt=0)
    max_bad_rows: float = Field(0.01, ge=0.0, le=1.0, description="share of unreadable rows that is tolerated")


class ArithmeticTask(Section):
    """Integer expressions, worked left to right in the reasoning; the answer is verified exactly."""

    type: Literal["arithmetic"] = "arithmetic"
    terms: tuple[int, int] = (2, 3)
    max_value: int = Field(99, gt=0)
    operators: str = Field("+-", pattern=r"^[+*-]+$")
    hasty: float = Field(
        0.0, ge=0.0, le=1.0, description="share of demonstrations that write the result in one go, without steps"
    )


class ToolUseTask(Section):
    """Questions that need one call of a small set of tools, then an answer that uses its result."""

    type: Literal["tool_use"] = "tool_use"
    max_value: int = Field(99, gt=0)


Task = Annotated[ArithmeticTask | ToolUseTask, Field(discriminator="type")]


class ProblemsRecipe(RecipeBase):
    """Generate verifiable problems: train, held-out (disjoint) and scripted cold-start conversations."""

    type: Literal["problems"] = "problems"
    task: Task
    train: int = Field(2000, gt=0)
    heldout: int = Field(200, gt=0)
    cold_start: int = Field(500, ge=0, description="training problems that also get a scripted demonstration")
