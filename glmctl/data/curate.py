"""The stages that compare documents: which stay, and how often each is shown.

Everything here works on one record a document (about a hundred bytes), so a corpus of ten million documents is decided
on in a gigabyte; texts and signatures stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl.data import duplicates, semantic, spool
from glmctl.data.measure import Gauge, Measured, learn, learns, measure
from glmctl.data.stages import compares
from glmctl.recipe.curation import LOCAL_STAGES

if TYPE_CHECKING:
    from glmctl.data.passes import Passes
    from glmctl.recipe.curation import Exact, MinHash, Score, Semantic
    from glmctl.recipe.schema import DataRecipe

    Comparing = Exact | MinHash | Semantic | Score

KEPT = -1


@dataclass
class Decisions:
    """What became of every document that survived the local stages."""

    table: np.ndarray
    """records of `glmctl.data.spool`, all units"""
    bounds: np.ndarray
    """[units + 1]: where each unit's documents begin"""
    epochs: np.ndarray
    """float64: times each document is shown, 0 for a dropped one"""
    dropped_by: np.ndarray
    """int16: place of the stage in the recipe that dropped it, or -1"""
    cause: np.ndarray
    """int64: the document that it is a duplicate of, or its bucket; -1 where neither"""
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    """float32 by the name of the score stage"""
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    """by the stage's place: documents in, out and per reason, and what the stage has to say"""

    def of_unit(self, unit: int) -> np.ndarray:
        """The epochs of one unit's documents."""
        found: np.ndarray = self.epochs[self.bounds[unit] : self.bounds[unit + 1]]
        return found

    def save(self, path: Path, places: np.ndarray) -> None:
        """Write what `glmctl data inspect` needs; `places`: where in the shards each document is (`encode.PLACE`)."""
        np.savez_compressed(
            path,
            bounds=self.bounds,
            epochs=self.epochs,
            dropped_by=self.dropped_by,
            cause=self.cause,
            split=places["split"],
            document=places["document"],
            **{f"score_{name}": values for name, values in self.scores.items()},  # type: ignore[arg-type]
        )


def decide(recipe: DataRecipe, scanned: Sequence[Path], passes: Passes, learnt: Path) -> Decisions:
    """Run the comparing stages of `recipe` over the scanned units; what stages learn is written below `learnt`."""
    tables = [spool.table(folder) for folder in scanned]
    bounds = np.cumsum([0, *map(len, tables)]).astype(np.int64)
    table = np.concatenate(tables) if tables else np.zeros(0, spool.RECORD)
    weights = np.array([source.weight for source in recipe.sources])
    decisions = Decisions(
        table,
        bounds,
        table["epochs"].astype(np.float64) * weights[table["source"]],
        np.full(len(table), KEPT, np.int16),
        np.full(len(table), -1, np.int64),
    )
    comparing = [(at, stage) for at, stage in enumerate(recipe.stages) if stage.type not in LOCAL_STAGES]
    if not comparing or not len(table):
        return decisions
    gauges = []
    for at, stage in comparing:
        if stage.type == "exact" or stage.type in LOCAL_STAGES:
            continue
        gauges.append(_gauge(at, stage, recipe, decisions, scanned, learnt))
    measured = passes.run("measure", measure, lambda unit: (scanned[unit], gauges)) if gauges else []
    for at, stage in comparing:
        _apply(at, stage, recipe, decisions, measured)
    return decisions


def _gauge(
    at: int, stage: Any, recipe: DataRecipe, decisions: Decisions, scanned: Sequence[Path], learnt: Path
) -> Gauge:
    """The stage with what it learns from a sample: the documents with the smallest digests, each text once."""
    wanted = learns(stage)
    if wanted is None:
        return Gauge(at, stage)
    digests = decisions.table["digest"][:, 0]
    (index,) = np.nonzero(_asked(stage, recipe, decisions))
    _, once = np.unique(digests[index], return_index=True)
    sample = np.sort(index[once[:wanted]])
    documents = spool.pick(scanned, decisions.bounds, decisions.table["start"], sample)
    name = f"{stage.name}.npz" if stage.type == "score" else f"projection-{at}.npz"
    learnt.mkdir(parents=True, exist_ok=True)
    decisions.reports[at] = learn(stage, documents, learnt / name, recipe.seed)
    return Gauge(at, stage, str(learnt / name))


def _asked(stage: Any, recipe: DataRecipe, decisions: Decisions) -> np.ndarray:
    """bool: documents that are still there and that the stage looks at."""
    mine = np.array(
        [compares(stage, source.domain, conversation=source.type == "conversations") for source in recipe.sources]
    )
    found: np.ndarray = (decisions.dropped_by == KEPT) & mine[decisions.table["source"]]
    return found


def _apply(at: int, stage: Any, recipe: DataRecipe, decisions: Decisions, measured: Sequence[Path]) -> None:
    asked = _asked(stage, recipe, decisions)
    report = decisions.reports.setdefault(at, {})
    report["in"] = int(asked.sum())

    def file(kind: str, dtype: Any) -> Measured:
        return Measured(measured, f"{kind}-{at}.bin", dtype, decisions.bounds)

    if stage.type == "score":
        scores = file("scores", "<f4").all()
        _buckets(at, stage, scores, asked, decisions)
        return
    cause = np.full(len(asked), -1, np.int64)
    if stage.type == "exact":
        cause, reason = duplicates.exact(decisions.table["digest"], asked), "same text"
    elif stage.type == "minhash":
        bands, _ = duplicates.band_shape(stage.permutations, stage.similarity)
        keys, rows = file("bands", "<u8"), file("signatures", "<u4").rows
        cause, reason = duplicates.near(keys.all, bands, rows, asked, stage.similarity), "near duplicate"
    else:
        (index,) = np.nonzero(asked)
        embeddings: Callable[[np.ndarray], np.ndarray] = file("embeddings", "<f4").rows
        near = semantic.near(embeddings, index, stage.similarity, stage.cluster_size, recipe.seed)
        cause[list(near)] = list(near.values())
        reason = "semantic duplicate"
    dropped = cause >= 0
    decisions.dropped_by[dropped], decisions.epochs[dropped] = at, 0.0
    decisions.cause[dropped] = cause[dropped]
    report["reasons"] = {reason: int(dropped.sum())} if dropped.any() else {}


def _buckets(at: int, stage: Score, scores: np.ndarray, asked: np.ndarray, decisions: Decisions) -> None:
    buckets = np.zeros(len(scores), np.int64)
    for group in _groups(stage, asked, decisions):
        digests = decisions.table["digest"][group, 0]
        buckets[group] = _places(stage, scores[group].astype(np.float64), digests)
    epochs = np.array(stage.epochs)[buckets]
    dropped = asked & (epochs == 0)
    decisions.epochs[asked] *= epochs[asked]
    decisions.dropped_by[dropped] = at
    decisions.cause[dropped] = buckets[dropped]
    decisions.scores[stage.name] = np.where(asked, scores, np.float32(np.nan))
    counts = np.bincount(buckets[asked], minlength=len(stage.epochs))
    report = decisions.reports[at]
    report["reasons"] = {
        f"bucket {bucket + 1} of {len(counts)}": int(count)
        for bucket, count in enumerate(counts)
        if count and stage.epochs[bucket] == 0
    }
    report["buckets"] = [
        {"documents": int(count), "epochs": shown, "mean_score": _mean(scores[asked & (buckets == bucket)])}
        for bucket, (count, shown) in enumerate(zip(counts, stage.epochs, strict=True))
    ]


def _groups(stage: Score, asked: np.ndarray, decisions: Decisions) -> Iterator[np.ndarray]:
    """Places of the documents that share their quantiles: those of one language, or all."""
    (index,) = np.nonzero(asked)
    if stage.within == "all":
        yield index
        return
    languages = decisions.table["language"][index]
    order = np.argsort(languages, kind="stable")
    borders = np.flatnonzero(np.diff(languages[order])) + 1
    for first, last in pairwise([0, *borders.tolist(), len(order)]):
        yield index[order[first:last]]


def _places(stage: Score, scores: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """The bucket of each score. By quantile, equal scores are ranked by digest, so that buckets have their share."""
    if stage.cut_by == "quantile":
        order = np.lexsort((digests, scores))
        scores = np.empty(len(order))
        scores[order] = (np.arange(len(order)) + 0.5) / len(order)
    return np.searchsorted(stage.cuts, scores, side="right")


def _mean(values: np.ndarray) -> float | None:
    return float(values.astype(np.float64).mean()) if len(values) else None
