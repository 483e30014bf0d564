"""Recipes that make text into tokens and problems: `tokenizer`, `data`, `problems`. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from glmctl.errors import nearest
from glmctl.recipe.curation import LOCAL_STAGES, Stage
from glmctl.recipe.sections import RecipeBase, Section
from glmctl.recipe.tasks import AlgebraTask, CodeCallsTask, CodeTask, CustomTask, GymTask, InstructionsTask, ScienceTask


class TextSource(Section):
    """Plain text files, one document a file; a path may begin with `python:stdlib/` or `python:packages/`."""

    type: Literal["text"] = "text"
    domain: str
    paths: list[str]
    weight: float = Field(1.0, gt=0, description="times each document is seen in one epoch (mixture weight)")
    max_bytes: int | None = Field(None, gt=0)


class JsonLinesSource(Section):
    """JSON lines (optionally .gz or .zst), one document a line under `field`."""

    type: Literal["jsonl"] = "jsonl"
    domain: str
    paths: list[str]
    field: str = "text"
    code: bool = Field(False, description="the texts are source code: code stages and fill-in-the-middle apply")
    language_field: str | None = Field(None, description="the row's field that names its language, e.g. `python`")
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class ParquetSource(Section):
    """Parquet files, one document a row in column `field`."""

    type: Literal["parquet"] = "parquet"
    domain: str
    paths: list[str]
    field: str = "text"
    code: bool = False
    language_field: str | None = None
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class HuggingFaceSource(Section):
    """A data set of the Hugging Face hub, streamed; needs the network."""

    type: Literal["huggingface"] = "huggingface"
    domain: str
    dataset: str = Field(description="e.g. `HuggingFaceFW/fineweb-2`")
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="a commit, branch or tag; null = main. A run keeps its first commit")
    field: str = "text"
    code: bool = False
    language_field: str | None = None
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class SourceTree(Section):
    """Source code below `root`.

    `python:stdlib` names the running interpreter's standard library, `python:packages` what is installed beside it.
    """

    type: Literal["source_tree"] = "source_tree"
    domain: str
    root: str
    include: list[str] = Field(["*.py"])
    exclude: list[str] = Field(["test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "__pycache__"])
    repo_level: bool = Field(
        True, description="files of one repository share contexts, each behind those it needs; false: each is alone"
    )
    repositories: Literal["auto", "root", "folders"] = Field(
        "auto",
        description="what a repository is: the root, each folder below it, or the root if it looks like one "
        "(it holds .git, pyproject.toml, setup.py, package.json, go.mod, Cargo.toml or __init__.py)",
    )
    context_tokens: int = Field(
        32_768, ge=64, description="most tokens in one context, its end included: a row of the training"
    )
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class RepositoryHistory(Section):
    """Issues, pull requests and commits as JSON lines; a change and what links to it directly share one context.

    A row: {"type": "issue" | "pull" | "commit", "number" or "sha", "title", "body", "diff", "comments", "links",
    "date", "repository"}. Rows of one repository that lie in several files, or of several in one, need `repository`.
    """

    type: Literal["repository_history"] = "repository_history"
    domain: str
    paths: list[str]
    root: str | None = Field(None, description="a checkout: files that a diff touches come first in its context")
    max_chars: int = Field(65_536, gt=0, description="most characters in one context")
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


class RetrievalSource(Section):
    """Generated: prose with facts in it that the document's end states again, near or far from where they were."""

    type: Literal["retrieval"] = "retrieval"
    domain: str
    documents: int = Field(gt=0)
    characters: tuple[int, int] = Field(description="shortest and longest document; a token is about three")
    facts: int = Field(4, gt=0, le=8, description="most facts in a document; each has at least one")
    rehearsals: float = Field(0.0, ge=0.0, le=1.0, description="share of documents that are random words said twice")
    seed: int = Field(0, ge=0)
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)

    @field_validator("characters")
    @classmethod
    def _rising(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("the shortest comes first, and is above 0")
        return value


Source = Annotated[
    TextSource
    | JsonLinesSource
    | ParquetSource
    | HuggingFaceSource
    | SourceTree
    | RepositoryHistory
    | BundledText
    | ConversationsSource
    | RetrievalSource,
    Field(discriminator="type"),
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
    stages: list[Stage] = Field([], description="what is done to the documents between reading and tokens, in order")
    mixture: dict[str, float] = Field(
        {}, description="share of the training tokens by domain; empty = what weights and epochs make of it"
    )
    max_epochs: float = Field(8.0, gt=0, description="most times a mixture may show a domain's documents on average")
    fim: FillInTheMiddle = FillInTheMiddle()
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5, description="of documents, chosen by content hash")
    shard_tokens: int = Field(16_777_216, gt=0)
    max_bad_rows: float = Field(0.01, ge=0.0, le=1.0, description="share of unreadable rows that is tolerated")

    @model_validator(mode="after")
    def _stages_fit(self) -> DataRecipe:
        known = {source.domain for source in self.sources}
        text = {source.domain for source in self.sources if source.type != "conversations"}
        comparing: str | None = None
        names = [stage.name for stage in self.stages if stage.type == "score"]
        for at, stage in enumerate(self.stages):
            for domain in stage.domains or []:
                if domain not in known:
                    match = nearest(domain, known)
                    more = f"did you mean '{match}'?" if match else f"one of: {', '.join(sorted(known))}"
                    raise ValueError(f"stages.{at}: no source has domain '{domain}'; {more}")
                if domain not in text and stage.type != "exact":
                    raise ValueError(
                        f"stages.{at}: '{domain}' holds conversations, which pass '{stage.type}' untouched; "
                        "only 'exact' drops any (a source's weight shows them more often)"
                    )
            if stage.type not in LOCAL_STAGES:
                comparing = comparing or stage.type
            elif comparing is not None:
                raise ValueError(
                    f"stages.{at}: '{stage.type}' looks at one document alone; put it before '{comparing}'"
                )
        if self.mixture and (set(self.mixture) != known or min(self.mixture.values()) <= 0):
            raise ValueError(f"mixture gives every domain a share above 0: {', '.join(sorted(known))}")
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two score stages are called '{repeated}'")
        return self


class ReasoningTeacher(Section):
    """A reasoning model behind an OpenAI-compatible endpoint (the key, if any, in OPENAI_API_KEY)."""

    base_url: str
    model: str
    temperature: float = Field(0.6, ge=0.0, le=2.0)
    max_tokens: int = Field(4096, gt=0)


class ReasoningRecipe(RecipeBase):
    """Mine questions with short answers from text and keep a teacher's reasoning where it ends in the answer."""

    type: Literal["reasoning"] = "reasoning"
    sources: list[Source]
    teacher: ReasoningTeacher
    questions: int = Field(1000, gt=0, description="most questions that are asked")
    samples: int = Field(4, gt=0, description="replies asked for to each question")
    keep_per_question: int = Field(1, gt=0)


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
    hasty: float = Field(0.0, ge=0.0, le=1.0, description="share of demonstrations that guess instead of calling")


Task = Annotated[
    ArithmeticTask
    | ToolUseTask
    | AlgebraTask
    | GymTask
    | CodeTask
    | CodeCallsTask
    | ScienceTask
    | InstructionsTask
    | CustomTask,
    Field(discriminator="type"),
]


class ProblemsRecipe(RecipeBase):
    """Generate verifiable problems: train, held-out (disjoint) and scripted cold-start conversations."""

    type: Literal["problems"] = "problems"
    task: Task
    train: int = Field(2000, gt=0)
    heldout: int = Field(200, gt=0)
    cold_start: int = Field(500, ge=0, description="training problems that also get a scripted demonstration")
