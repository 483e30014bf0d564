"""Stages that look at one document alone: a verdict from the stage and the document, with its reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from glmctl.data import pages
from glmctl.data.classifier import Classifier
from glmctl.data.language import identify
from glmctl.data.rules import code_finding, web_finding
from glmctl.data.words import hashes, words

if TYPE_CHECKING:
    from glmctl.data.sources import Document
    from glmctl.recipe.curation import CodePages, CodeRules, Exact, Language, MinHash, Score, Semantic, WebRules

    LocalStage = WebRules | CodeRules | Language | CodePages
    ComparingStage = Exact | MinHash | Semantic | Score


@dataclass(frozen=True)
class Verdict:
    """What a stage says of a document."""

    kept: bool
    reason: str = ""
    """why it is dropped, in words that are the same for all documents dropped for it"""
    measured: str = ""
    """what was seen, for `glmctl data inspect`"""
    epochs: float = 1.0
    """how many times as often it is shown from here on"""


class Page:
    """A document with what stages compute of it, so that two stages do not do it twice."""

    def __init__(self, document: Document) -> None:
        self.document = document

    @cached_property
    def words(self) -> list[str]:
        """Its lower-case words."""
        return words(self.document.text)


def applies(domains: list[str] | None, domain: str) -> bool:
    """Whether a stage limited to `domains` looks at a document of `domain`."""
    return domains is None or domain in domains


def compares(stage: ComparingStage, domain: str, *, conversation: bool) -> bool:
    """Whether a stage that compares documents looks at one of `domain`.

    Conversations pass all but `exact`: those with one list of tools are near duplicates by that list alone, and
    scores are made for prose and code.
    """
    return applies(stage.domains, domain) and (stage.type == "exact" or not conversation)


def judge(stage: LocalStage, page: Page) -> tuple[Page, Verdict]:
    """The verdict on a document, and the document as the next stage is to see it. Conversations pass every stage."""
    if page.document.conversation is not None:
        return page, Verdict(True, measured="a conversation")
    if stage.type == "web_rules":
        found = web_finding(page.document.text, page.words, stage)
        return page, Verdict(True) if found is None else Verdict(False, *found)
    if stage.type == "code_rules":
        found = code_finding(page.document.text, stage)
        return page, Verdict(True) if found is None else Verdict(False, *found)
    if stage.type == "language":
        return _judge_language(stage, page)
    return _judge_page(stage, page)


def _judge_language(stage: Language, page: Page) -> tuple[Page, Verdict]:
    language, confidence = identify(page.document.text, page.words)
    measured = f"{language} with confidence {confidence:.2f}"
    if language == "?" or confidence < stage.min_confidence:
        return page, Verdict(False, "language not certain", f"{measured}, {stage.min_confidence:g} wanted")
    if stage.keep and language not in stage.keep:
        return page, Verdict(False, f"language {language}", measured)
    epochs = stage.epochs.get(language, 1.0)
    page.document = replace(page.document, language=language)
    if epochs <= 0:
        return page, Verdict(False, f"language {language}", f"{measured}, shown 0 times")
    return page, Verdict(True, measured=measured, epochs=epochs)


def _judge_page(stage: CodePages, page: Page) -> tuple[Page, Verdict]:
    document = page.document
    if not pages.is_html(document.text):
        return page, Verdict(True, measured="not an HTML page")
    text, code_chars = pages.code_text(document.text)
    read = Page(replace(document, text=text))
    measured = f"{code_chars} characters inside code tags"
    chosen = code_chars >= stage.min_code_chars
    if not chosen and stage.classifier is not None:
        (found,) = hashes([read.words])
        score = classifier(stage.classifier).score(found)
        measured += f", classifier {score:.2f}"
        chosen = score >= stage.min_score
    if not chosen and stage.others == "drop":
        return page, Verdict(False, "HTML page without code", measured)
    if not text.strip():
        return page, Verdict(False, "HTML page without text", measured)
    return read, Verdict(True, measured=measured)


@lru_cache(maxsize=4)
def classifier(path: str) -> Classifier:
    """The classifier in an .npz file, read once a process."""
    return Classifier.load(Path(path))
