"""What the stages that compare documents need to know of each: scores, MinHash signatures, embeddings.

Learnt parts (classifiers, the embedding's projection) come first, from a sample chosen by content hash; then every unit
is measured on its own. Results are flat arrays, one row a document, in the order of the documents.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl.data import duplicates, semantic, spool, teacher
from glmctl.data.asked import Asked
from glmctl.data.classifier import Classifier, teach
from glmctl.data.scores import HEURISTICS, reads
from glmctl.data.stages import classifier, compares
from glmctl.data.words import hashes, words
from glmctl.errors import DataError
from glmctl.run import atomic

if TYPE_CHECKING:
    from glmctl.data.sources import Document
    from glmctl.recipe.curation import MinHash, Score, Semantic, TaughtClassifier

    Comparing = MinHash | Semantic | Score

_DOCUMENTS_AT_ONCE = 256
MAX_FOREIGN = 0.9
"""share of a sample in languages that a heuristic teacher does not know from which it is not asked"""


@dataclass(frozen=True)
class Gauge:
    """One stage with the file of what it has learnt, if it learns."""

    place: int
    """the stage's place in the recipe"""
    stage: Comparing
    learnt: str | None = None


def learn(stage: Comparing, sample: Sequence[Document], path: Path, seed: int) -> dict[str, Any]:
    """Write what `stage` learns from a sample to `path` (.npz); returns what there is to say about it.

    What an earlier process has learnt is kept: a teacher may answer differently when it is asked again.
    """
    said = path.with_suffix(".json")
    if said.is_file():
        report: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
        return report
    report = {}
    if stage.type == "score":
        assert stage.scorer.type == "taught", "only a taught scorer learns"
        report = _teach(stage.name, stage.scorer, sample, path)
    else:
        assert stage.type == "semantic", "MinHash learns nothing"
        assert stage.embedding.type == "hashed", "an endpoint's embedding is learnt elsewhere"
        found = semantic.fit(hashes([words(document.text) for document in sample]), stage.embedding.dimensions, seed)
        buffer = io.BytesIO()
        np.savez(buffer, vocabulary=found.vocabulary_W, idf=found.idf_W, components=found.components_WD)
        atomic.write_bytes(path, buffer.getvalue())
    atomic.write_json(said, report)
    return report


def learns(stage: Comparing) -> int | None:
    """How many documents a stage wants to learn from; None when it learns nothing."""
    if stage.type == "score" and stage.scorer.type == "taught":
        return stage.scorer.sample
    if stage.type == "semantic" and stage.embedding.type == "hashed":
        return stage.embedding.sample
    return None


def _teach(name: str, scorer: TaughtClassifier, sample: Sequence[Document], path: Path) -> dict[str, Any]:
    if scorer.teacher.type == "heuristic":
        _require_language(name, scorer.teacher.what, sample)
    texts, scores = teacher.rate(scorer.teacher, sample, Asked(path.with_suffix(".asked.jsonl")))
    try:
        found, report = teach(hashes([words(text) for text in texts]), scores, scorer.positive_from)
    except DataError as error:
        raise DataError(f"stage '{name}': {error.message}", hint=error.hint) from error
    found.save(path)
    return report


def _require_language(name: str, what: str, sample: Sequence[Document]) -> None:
    """DataError when nearly no document is in a language of the heuristic: it would teach noise."""
    foreign = [document for document in sample if not reads(what, document.text, words(document.text))]
    if len(foreign) > MAX_FOREIGN * len(sample):
        domains = ", ".join(sorted({document.domain for document in foreign}))
        raise DataError(
            f"stage '{name}': scorer.teacher.what '{what}' knows English and Chinese words only, and {len(foreign)} of "
            f"{len(sample)} documents (domain {domains}, as {foreign[0].path}) hold next to none",
            hint="let a model rate them: teacher {type: endpoint, base_url, model, prompt}, or {type: labels, paths}",
        )


# ------------------------------------------------------------------ measuring a unit


def measure(folder: Path, scanned: Path, gauges: Sequence[Gauge]) -> None:
    """Measure the documents of one scanned unit for every gauge."""
    table = spool.table(scanned)
    found = spool.documents(scanned)
    # beside the passes, so that answers outlive a unit that is cut short
    asked = {
        gauge.place: Asked(scanned.parents[1] / "asked" / f"{scanned.name}-{gauge.place}.jsonl")
        for gauge in gauges
        if gauge.stage.type == "semantic" and gauge.stage.embedding.type == "endpoint"
    }
    at = 0
    with ExitStack() as stack:
        files = {
            gauge.place: [stack.enter_context(open(folder / name, "wb")) for name in _names(gauge)] for gauge in gauges
        }
        while chunk := list(islice(found, _DOCUMENTS_AT_ONCE)):
            word_lists = [words(document.text) for document in chunk]
            measured = _Chunk(chunk, word_lists, hashes(word_lists), table["digest"][at : at + len(chunk)], asked)
            for gauge in gauges:
                for stream, array in zip(files[gauge.place], _measured(gauge, measured), strict=True):
                    stream.write(array.tobytes())  # `tofile` would hide that a disk is full
            at += len(chunk)


@dataclass(frozen=True)
class _Chunk:
    documents: list[Document]
    words: list[list[str]]
    hashes: list[np.ndarray]
    digests: np.ndarray
    asked: dict[int, Asked]
    """what endpoints have answered, by the stage's place"""


def _names(gauge: Gauge) -> list[str]:
    kinds = {"minhash": ["bands", "signatures"], "semantic": ["embeddings"], "score": ["scores"]}
    return [f"{kind}-{gauge.place}.bin" for kind in kinds[gauge.stage.type]]


def _measured(gauge: Gauge, chunk: _Chunk) -> Iterator[np.ndarray]:
    """Arrays with one row a document; rows of documents that the stage does not look at are zero."""
    stage = gauge.stage
    asked = [
        at
        for at, document in enumerate(chunk.documents)
        if compares(stage, document.domain, conversation=document.conversation is not None)
    ]
    if stage.type == "minhash":
        bands, rows = duplicates.band_shape(stage.permutations, stage.similarity)
        signatures = np.zeros((len(chunk.documents), stage.permutations), np.uint32)
        if asked:
            some = [chunk.hashes[at] for at in asked]
            signatures[asked] = duplicates.signatures(some, chunk.digests[asked], stage.ngram, stage.permutations)
        yield duplicates.band_keys(signatures, bands, rows)
        yield signatures
    elif stage.type == "semantic":
        yield _embeddings(gauge, chunk, asked)
    else:
        scores = np.zeros(len(chunk.documents), np.float32)
        for at in asked:
            scores[at] = _score(gauge, chunk, at)
        yield scores


def _score(gauge: Gauge, chunk: _Chunk, at: int) -> float:
    assert gauge.stage.type == "score", "only score stages score"
    scorer = gauge.stage.scorer
    if scorer.type == "heuristic":
        document = chunk.documents[at]
        return HEURISTICS[scorer.what](document.text, chunk.words[at], document.language)
    return scorer_of(gauge).score(chunk.hashes[at])


def scorer_of(gauge: Gauge) -> Classifier:
    """The classifier of a score stage that has one."""
    assert gauge.stage.type == "score", "only score stages have a scorer"
    scorer = gauge.stage.scorer
    path = scorer.path if scorer.type == "classifier" else gauge.learnt
    assert path is not None, "a taught classifier is learnt before it scores"
    return classifier(path)


def _embeddings(gauge: Gauge, chunk: _Chunk, asked: list[int]) -> np.ndarray:
    stage = gauge.stage
    assert stage.type == "semantic", "only SemDedup embeds"
    if stage.embedding.type == "hashed":
        assert gauge.learnt is not None, "the projection is fitted before it embeds"
        projection = _projection(gauge.learnt)
        found = np.zeros((len(chunk.documents), projection.components_WD.shape[1]), np.float32)
        for at in asked:
            found[at] = projection.embed(chunk.hashes[at])
        return found
    texts = [document.text[: stage.embedding.max_chars] for document in chunk.documents]
    # documents of other domains are embedded too, so that a unit's rows have one width even when none is asked for
    rows = teacher.embed(stage.embedding.base_url, stage.embedding.model, texts, chunk.asked[gauge.place])
    return semantic.unit(np.array(rows, np.float32))


@lru_cache(maxsize=2)
def _projection(path: str) -> semantic.Projection:
    with np.load(path, allow_pickle=False) as arrays:
        return semantic.Projection(arrays["vocabulary"], arrays["idf"], arrays["components"])


# ------------------------------------------------------------------ reading what was measured


class Measured:
    """The rows of one file over all units, read as they are asked for."""

    def __init__(self, folders: Sequence[Path], name: str, dtype: Any, bounds: np.ndarray) -> None:
        self._paths = [folder / name for folder in folders]
        self._dtype = np.dtype(dtype)
        self._bounds = bounds
        total = sum(path.stat().st_size for path in self._paths) // self._dtype.itemsize
        self._columns = total // max(1, int(bounds[-1]))

    def all(self, column: int = 0) -> np.ndarray:
        """One column of every document."""
        parts = [np.fromfile(path, self._dtype).reshape(-1, self._columns)[:, column].copy() for path in self._paths]
        return np.concatenate(parts)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """[len(index), columns]: the rows of some documents, in the order asked for."""
        found = np.empty((len(index), self._columns), self._dtype)
        units = np.searchsorted(self._bounds, index, side="right") - 1
        for unit in np.unique(units).tolist():
            here = units == unit
            stored = np.memmap(self._paths[unit], self._dtype, "r").reshape(-1, self._columns)
            found[here] = stored[index[here] - self._bounds[unit]]
        return found
