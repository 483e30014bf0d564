"""A document's way through a finished preparation: what each stage said of it, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl.data import hub, units
from glmctl.data.encode import SPLITS, split_of
from glmctl.data.prepare import DECISIONS, PROVENANCE, stage_files
from glmctl.data.reading import BadRows
from glmctl.data.sources import Document, read, times
from glmctl.data.stages import Page, applies, compares, judge
from glmctl.errors import DataError
from glmctl.recipe.curation import LOCAL_STAGES

if TYPE_CHECKING:
    from glmctl.recipe.schema import DataRecipe


@dataclass(frozen=True)
class Step:
    """One stage's verdict."""

    stage: str
    verdict: str
    """`kept`, `dropped` or `not asked` (another domain, or a conversation)"""
    why: str = ""


@dataclass(frozen=True)
class Way:
    """One document from its source to the shards."""

    path: str
    domain: str
    characters: int
    steps: list[Step]
    shown: int
    """times it is in the shards"""
    split: str | None


class Ways:
    """Looks documents up in the sources of a finished run."""

    def __init__(self, recipe: DataRecipe, export: Path) -> None:
        """DataError when the run has no decisions, or its sources are not what they were, to the byte."""
        path = export / DECISIONS
        for needed in (path, export / PROVENANCE):
            if not needed.is_file():
                raise DataError(f"{needed}: missing; only a finished `glmctl data prepare` can be inspected")
        recipe = recipe.model_copy(update={"sources": hub.pinned(recipe.sources, export.with_name(hub.COMMITS))})
        _require_unchanged(recipe, export / PROVENANCE)
        with np.load(path, allow_pickle=False) as arrays:
            self._arrays: dict[str, np.ndarray] = dict(arrays)
        self._recipe = recipe
        self._units = units.plan(recipe.sources)
        if len(self._units) + 1 != len(self._arrays["bounds"]):
            raise DataError(f"{path}: the sources have changed since", hint="prepare the data again")

    def find(self, text: str, limit: int) -> Iterator[Way]:
        """The first `limit` documents whose path or text contains `text`."""
        found = 0
        for number in range(len(self._units)):
            documents = self._read(number)
            if not any(text in document.path or text in document.text for document in documents):
                continue
            index = int(self._arrays["bounds"][number])
            for document in documents:
                page, steps, kept = self._local(document)
                if text in document.path or text in document.text:
                    yield self._way(document, page, steps, index if kept else None)
                    found += 1
                    if found == limit:
                        return
                index += kept

    def _read(self, number: int) -> list[Document]:
        unit = self._units[number]
        return list(read(unit, self._recipe.sources[unit.source], BadRows(limit=1.0)))

    def _local(self, document: Document) -> tuple[Page, list[Step], bool]:
        page, steps = Page(document), []
        for stage in self._recipe.stages:
            if stage.type not in LOCAL_STAGES:
                break
            if not applies(stage.domains, document.domain):
                steps.append(Step(stage.type, "not asked"))
                continue
            page, verdict = judge(stage, page)  # type: ignore[arg-type]  # the check above is a union's narrowing
            if not verdict.kept:
                steps.append(Step(stage.type, "dropped", f"{verdict.reason}: {verdict.measured}"))
                return page, steps, False
            times_more = f", shown {verdict.epochs:g} times" if verdict.epochs != 1.0 else ""
            steps.append(Step(stage.type, "kept", verdict.measured + times_more))
        return page, steps, True

    def _way(self, document: Document, page: Page, steps: list[Step], index: int | None) -> Way:
        shown, split = 0, None
        if index is not None:
            if index >= int(self._arrays["bounds"][-1]):
                raise DataError("the sources have changed since", hint="prepare the data again")
            steps += self._comparing(document, index)
            epochs = float(self._arrays["epochs"][index])
            split = split_of(page.document, self._recipe.validation_fraction)
            shown = times(page.document.digest, epochs, self._recipe.seed)
            shown = min(shown, 1) if split == "validation" else shown
            if shown and document.repository is not None:
                steps.append(self._context(index))
        return Way(document.path, document.domain, len(document.text), steps, shown, split if shown else None)

    def _comparing(self, document: Document, index: int) -> list[Step]:
        steps = []
        dropped_by, cause = int(self._arrays["dropped_by"][index]), int(self._arrays["cause"][index])
        for at, stage in enumerate(self._recipe.stages):
            if stage.type in LOCAL_STAGES:
                continue
            name = f"{stage.type} {stage.name}" if stage.type == "score" else stage.type
            # a union's narrowing: the local stages have gone on
            if not compares(stage, document.domain, conversation=document.conversation is not None):  # type: ignore[arg-type]
                steps.append(Step(name, "not asked"))
                continue
            why = self._score(stage, index) if stage.type == "score" else ""
            if at == dropped_by:
                if stage.type == "score":
                    why += f", bucket {cause + 1} of {len(stage.epochs)} is shown 0 times"
                else:
                    why = f"like {self._path_of(cause)}, which came first"
                steps.append(Step(name, "dropped", why))
                return steps
            steps.append(Step(name, "kept", why))
        return steps

    def _context(self, index: int) -> Step:
        """The context that a repository's file is in, the first time that it is shown."""
        split, number = int(self._arrays["split"][index]), int(self._arrays["document"][index])
        same = (self._arrays["split"] == split) & (self._arrays["document"] == number)
        others = int(same.sum()) - 1
        files = f"{others} other file{'s' if others != 1 else ''} of its repository"
        return Step("context", "kept", f"document {number} of {SPLITS[split]}, with {files}")

    def _score(self, stage: Any, index: int) -> str:
        score = float(self._arrays[f"score_{stage.name}"][index])
        return "" if math.isnan(score) else f"score {score:.3g}"

    def _path_of(self, index: int) -> str:
        """Where the document with this place among the survivors of the local stages came from."""
        number = int(np.searchsorted(self._arrays["bounds"], index, side="right")) - 1
        left = index - int(self._arrays["bounds"][number])
        for document in self._read(number):
            _, _, kept = self._local(document)
            if kept and left == 0:
                return document.path
            left -= kept
        raise DataError("the sources have changed since", hint="prepare the data again")


def _require_unchanged(recipe: DataRecipe, provenance: Path) -> None:
    """DataError naming a file, of the sources or of the stages, that is not what it was when the data was made."""
    try:
        said = json.loads(provenance.read_text(encoding="utf-8"))
        made = [file for source in said["sources"] for file in source["files"]] + said["stage_files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{provenance}: damaged: {error!r}") from error
    sources = [file for files in units.fingerprint(recipe.sources) for file in files]
    now = [asdict(file) for file in [*sources, *map(units.fingerprint_file, stage_files(recipe))]]
    for one, other in zip_longest(made, now):
        if one != other:
            path = (other or one)["path"]
            raise DataError(f"{path}: the sources have changed since the data was made", hint="prepare the data again")


def render(ways: Sequence[Way]) -> str:
    """The ways as text, a line a stage."""
    lines = []
    for way in ways:
        lines.append(f"{way.path}  ({way.domain}, {way.characters:,} characters)")
        width = max((len(step.stage) for step in way.steps), default=0)
        lines += [f"  {step.stage:<{width}}  {step.verdict:<9}  {step.why}".rstrip() for step in way.steps]
        end = f"in {way.split}, {way.shown} time{'s' if way.shown != 1 else ''}" if way.split else "not in the shards"
        lines += [f"  -> {end}", ""]
    return "\n".join(lines).rstrip()
