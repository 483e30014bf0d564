"""Stages of a `data` recipe: what is dropped, what is shown more than once. Importable without torch.

Stages of `LOCAL_STAGES` look at one document alone and come first; the others compare documents with each other.
Every stage may be limited to some domains; documents of other domains pass it untouched.
Conversations pass every stage but `exact`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import Section


class _Stage(Section):
    domains: list[str] | None = Field(None, description="the domains it applies to; null = all")


class WebRules(_Stage):
    """Drop pages that no reader would miss: the rules of Gopher (Rae et al. 2021) and C4 (Raffel et al. 2020)."""

    type: Literal["web_rules"] = "web_rules"
    min_words: int = Field(50, ge=0)
    max_words: int = Field(100_000, gt=0)
    mean_word_length: tuple[float, float] = (3.0, 10.0)
    max_symbol_ratio: float = Field(0.1, ge=0.0, description="`#` and ellipses per word")
    max_bullet_lines: float = Field(0.9, ge=0.0, le=1.0)
    max_ellipsis_lines: float = Field(0.3, ge=0.0, le=1.0)
    min_alphabetic_words: float = Field(0.8, ge=0.0, le=1.0)
    max_repeated_lines: float = Field(0.3, ge=0.0, le=1.0, description="share of characters in repeated lines")


class CodeRules(_Stage):
    """Drop source files that nobody wrote: generated, minified, data (rules as in StarCoder, Li et al. 2023)."""

    type: Literal["code_rules"] = "code_rules"
    min_chars: int = Field(30, ge=0)
    max_line_chars: int = Field(1000, gt=0)
    max_mean_line_chars: int = Field(100, gt=0)
    min_alphanumeric: float = Field(0.25, ge=0.0, le=1.0)
    max_digits: float = Field(0.4, ge=0.0, le=1.0)


class Language(_Stage):
    """Keep documents of some natural languages, and show some languages more often."""

    type: Literal["language"] = "language"
    keep: list[str] = Field([], description="ISO 639-1 codes; empty = every language that is recognised")
    min_confidence: float = Field(0.5, ge=0.0, le=1.0)
    epochs: dict[str, float] = Field({}, description="times a document of that language is seen; 1 where not given")


class CodePages(_Stage):
    """HTML pages that hold code, read again so that the code keeps its lines and indentation.

    A page is chosen by its code tags (`<pre>`, `<code>`, ...) or by a classifier (either is enough).
    """

    type: Literal["code_pages"] = "code_pages"
    min_code_chars: int = Field(200, ge=0, description="characters inside code tags that make a page a code page")
    classifier: str | None = Field(None, description="an .npz of a `taught` scorer, for pages without code tags")
    min_score: float = Field(0.5, ge=0.0, le=1.0)
    others: Literal["drop", "keep"] = Field("drop", description="what happens to HTML pages without code")


class Exact(_Stage):
    """Drop documents whose text was there before."""

    type: Literal["exact"] = "exact"


class MinHash(_Stage):
    """Drop near-duplicates: estimated Jaccard similarity of word n-grams (Broder 1997; Lee et al. 2022)."""

    type: Literal["minhash"] = "minhash"
    similarity: float = Field(0.8, gt=0.0, le=1.0)
    ngram: int = Field(5, gt=0, description="words in one shingle")
    permutations: int = Field(128, ge=16, le=1024)


class HashedEmbedding(Section):
    """TF-IDF of words, reduced by a singular value decomposition that is fitted on a sample. Offline."""

    type: Literal["hashed"] = "hashed"
    dimensions: int = Field(64, ge=2, le=1024)
    sample: int = Field(8192, gt=1, description="documents that the decomposition is fitted on")


class EndpointEmbedding(Section):
    """Embeddings from any OpenAI-compatible endpoint (the key, if any, in OPENAI_API_KEY)."""

    type: Literal["endpoint"] = "endpoint"
    base_url: str
    model: str
    max_chars: int = Field(8000, gt=0)


Embedding = Annotated[HashedEmbedding | EndpointEmbedding, Field(discriminator="type")]


class Semantic(_Stage):
    """SemDedup (Abbas et al. 2023): cluster document embeddings, drop near neighbours inside a cluster."""

    type: Literal["semantic"] = "semantic"
    similarity: float = Field(0.95, gt=0.0, le=1.0, description="cosine from which two documents are the same")
    cluster_size: int = Field(1000, gt=0, description="documents in a cluster on average")
    embedding: Embedding = HashedEmbedding()


class Heuristic(Section):
    """A score in [0, 1] from counts of words and signs; `length` is the document's characters instead."""

    type: Literal["heuristic"] = "heuristic"
    what: Literal["web", "educational", "math", "code", "length"]


class StoredClassifier(Section):
    """A classifier that an earlier run taught (`classifiers/<stage>.npz` in its export)."""

    type: Literal["classifier"] = "classifier"
    path: str


class EndpointTeacher(Section):
    """An LLM behind any OpenAI-compatible endpoint that rates documents (the key, if any, in OPENAI_API_KEY)."""

    type: Literal["endpoint"] = "endpoint"
    base_url: str
    model: str
    prompt: str = Field(
        "Rate from 0 to 5 how much of the following text is worth learning from as mathematics or science. "
        "Answer with the number alone.\n\n{text}",
        description="`{text}` is the document; the first number of the reply, divided by `scale`, is the score",
    )
    scale: float = Field(5.0, gt=0.0)
    max_chars: int = Field(4000, gt=0)


class LabelsTeacher(Section):
    """JSON lines of {text, score in [0, 1]} that somebody has rated already."""

    type: Literal["labels"] = "labels"
    paths: list[str]


Teacher = Annotated[Heuristic | EndpointTeacher | LabelsTeacher, Field(discriminator="type")]


class TaughtClassifier(Section):
    """A teacher rates a sample; a small classifier learns to agree with it and scores everything."""

    type: Literal["taught"] = "taught"
    teacher: Teacher
    sample: int = Field(2000, gt=1)
    positive_from: float = Field(0.5, gt=0.0, le=1.0, description="teacher's score from which a document is positive")


Scorer = Annotated[Heuristic | StoredClassifier | TaughtClassifier, Field(discriminator="type")]


class Score(_Stage):
    """Sort documents into buckets by a score; each bucket has its own number of epochs, 0 drops it."""

    type: Literal["score"] = "score"
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    scorer: Scorer
    cuts: list[float] = Field(min_length=1, description="rising borders between buckets")
    cut_by: Literal["value", "quantile"] = "value"
    within: Literal["all", "language"] = Field("all", description="quantiles over all documents or in each language")
    epochs: list[float] = Field(description="one more than cuts, lowest bucket first")

    @model_validator(mode="after")
    def _buckets(self) -> Score:
        if any(a >= b for a, b in zip(self.cuts, self.cuts[1:], strict=False)):
            raise ValueError("cuts must rise")
        if self.cut_by == "quantile" and not all(0.0 < cut < 1.0 for cut in self.cuts):
            raise ValueError("cuts by quantile lie between 0 and 1")
        if self.within == "language" and self.cut_by == "value":
            raise ValueError("within: language needs cut_by: quantile")
        if len(self.epochs) != len(self.cuts) + 1:
            raise ValueError(f"{len(self.cuts)} cuts make {len(self.cuts) + 1} buckets, epochs has {len(self.epochs)}")
        if min(self.epochs) < 0:
            raise ValueError("epochs are not negative")
        return self


LOCAL_STAGES = ("web_rules", "code_rules", "language", "code_pages")
"""types of the stages that look at one document alone"""

Stage = Annotated[
    WebRules | CodeRules | Language | CodePages | Exact | MinHash | Semantic | Score, Field(discriminator="type")
]
