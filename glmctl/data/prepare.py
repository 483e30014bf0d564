"""`glmctl data prepare`: sources to token shards, in three passes over work units and one decision between them.

scan    read a unit, apply the stages that look at one document alone
decide  compare documents: duplicates, quality buckets, epochs (after a pass that measures what this needs); mixture
encode  tokens of what stays
join    shards in the order of the sources, with reports and provenance

Units and their order follow from the sources alone and every random choice from a document's text, so the shards are
the same bytes for any number of processes, and after any number of interruptions.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl import __version__, console
from glmctl.data import curate, encode, hub, mixture, spool, units
from glmctl.data.encode import SPLITS
from glmctl.data.passes import Passes, opened
from glmctl.data.reading import BadRows, json_row, numbered_lines, open_maybe_packed
from glmctl.data.shards import ShardWriter
from glmctl.data.sources import name_of
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError
from glmctl.recipe.curation import LOCAL_STAGES
from glmctl.run import atomic
from glmctl.run.fingerprint import digest

if TYPE_CHECKING:
    from glmctl.recipe.schema import DataRecipe
    from glmctl.run.directory import Run

REPORT, PROVENANCE, DECISIONS, CLASSIFIERS = "report.json", "provenance.json", "decisions.npz", "classifiers"
WORK_FORMAT = 4
"""raise it when results of earlier versions in a work folder can no longer be used"""
_LIBRARIES = ("numpy", "rensa", "scikit-learn", "tokenizers", "pyarrow")


def run(recipe: DataRecipe, run: Run) -> dict[str, Any]:
    """Prepare the data of `recipe` under the run's export.

    The export holds `train/`, `validation/`, `report.json` (counts), `provenance.json` (what it takes to make the same
    bytes again), `decisions.npz` (for `glmctl data inspect`), the classifiers it was taught, and the manifest.
    Each document ends in `<|endoftext|>`. The split goes by content hash, so the same text is never on both sides;
    validation takes each of its documents once and as it is (no fill-in-the-middle).
    Summary: `tokens_train`, `tokens_validation`, `documents`, `unigram_entropy` (see there), `bad_rows`.

    Raises:
        DataError: a split ends up empty, a source has more bad rows than `max_bad_rows`, or a file is damaged.
        EnvironmentProblem: the hub or a teacher's endpoint does not answer.
    """
    tokenizer = Tokenizer.load(recipe.tokenizer)
    recipe = recipe.model_copy(update={"sources": hub.pinned(recipe.sources, run.export.with_name(hub.COMMITS))})
    planned = units.plan(recipe.sources)
    behind = units.fingerprint(recipe.sources)
    read = [units.fingerprint_file(path) for path in stage_files(recipe)]
    inputs = [
        recipe.model_dump(mode="json"),
        tokenizer.hash,
        [asdict(unit) for unit in planned],
        _plain([*behind, read]),
    ]
    key = digest([WORK_FORMAT, *inputs])
    work = run.export.with_name("work")
    with opened(work, key[:16], planned) as passes:
        learnt = work / key[:16] / "learnt"
        scanned = _scan(recipe, passes)
        bad, rows = _bad_rows(recipe, planned, scanned)
        _require_languages(recipe, planned, scanned)
        decisions = curate.decide(recipe, scanned, passes, learnt)
        factors = mixture.apply(recipe, decisions, scanned, tokenizer)
        encoded = passes.run(
            "encode",
            encode.encode,
            lambda unit: (
                scanned[unit],
                decisions.of_unit(unit),
                recipe.sources[planned[unit].source],
                recipe,
                recipe.tokenizer,
            ),
        )
        with atomic.publish(run.export) as folder:
            writers, counts, places = _join(recipe, tokenizer, encoded, folder)
            mixture.warn_of_misses(recipe.mixture, counts["tokens"]["train"])
            report = _report(writers, counts, bad, tokenizer)
            report |= {"rows": rows, "stages": _stage_reports(recipe, scanned, decisions), "mixture": factors}
            _write_json(folder / REPORT, report)
            _write_json(folder / PROVENANCE, _provenance(recipe, behind, read, report))
            decisions.save(folder / DECISIONS, places)
            for classifier in _classifiers(recipe):
                (folder / CLASSIFIERS).mkdir(exist_ok=True)
                shutil.copyfile(learnt / classifier, folder / CLASSIFIERS / classifier)
    if bad.total:
        console.warn(f"{bad.total} rows left out: {bad.summary()}")
    return _summary(writers, counts, report)


def _scan(recipe: DataRecipe, passes: Passes) -> list[Path]:
    local = [stage for stage in recipe.stages if stage.type in LOCAL_STAGES]

    def arguments(number: int) -> tuple[Any, ...]:
        unit = passes.units[number]
        return unit, recipe.sources[unit.source], local, recipe.max_bad_rows

    return passes.run("scan", spool.scan, arguments)


def _bad_rows(recipe: DataRecipe, planned: Sequence[units.Unit], scanned: Sequence[Path]) -> tuple[BadRows, list[int]]:
    """Bad rows of all sources, and the documents read from each. DataError when a source has too many."""
    bad = BadRows(limit=recipe.max_bad_rows)
    total = []
    for place, source in enumerate(recipe.sources):
        before, rows = bad.total, 0
        for unit, folder in zip(planned, scanned, strict=True):
            if unit.source == place:
                counts = spool.counts(folder)
                bad.merge(counts["bad"]["kinds"], counts["bad"]["places"])
                rows += counts["rows"]
        bad.check(before, rows + bad.total - before, name_of(source))
        total.append(rows)
    return bad, total


def _require_languages(recipe: DataRecipe, planned: Sequence[units.Unit], scanned: Sequence[Path]) -> None:
    """DataError for a `language_field` that no row has: every language would be "", and tiers those of all together."""
    for place, source in enumerate(recipe.sources):
        if not (source.type == "jsonl" or source.type == "parquet" or source.type == "huggingface"):
            continue
        if source.language_field is None:
            continue
        found = [
            spool.table(folder)["language"]
            for unit, folder in zip(planned, scanned, strict=True)
            if unit.source == place
        ]
        if sum(map(len, found)) and all((languages == spool.language_key("")).all() for languages in found):
            more = f"; the first has {', '.join(_first_row(source.paths))}" if source.type == "jsonl" else ""
            raise DataError(
                f"sources.{place}.language_field: no row of {name_of(source)} has a language in "
                f"'{source.language_field}'{more}"
            )


def _first_row(paths: Sequence[str]) -> list[str]:
    """The fields of the first row of JSON lines, at most a dozen."""
    for path in units.files_of(paths):
        with open_maybe_packed(path) as stream:
            for _, line in numbered_lines(stream):
                row = json_row(line, str(path), BadRows())
                if row:
                    return list(row)[:12]
    return []


def _join(
    recipe: DataRecipe, tokenizer: Tokenizer, encoded: Sequence[Path], folder: Path
) -> tuple[dict[str, ShardWriter], dict[str, Any], np.ndarray]:
    """Write the shards of all units in order; returns the writers, the summed counts, and each document's place."""
    writers = {
        split: ShardWriter(
            folder / split,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            end_of_document=tokenizer.pad_id,
            shard_tokens=recipe.shard_tokens,
            domains=encode.domain_names(recipe),
        )
        for split in SPLITS
    }
    size = 0
    tokens: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    documents: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    lengths: dict[str, dict[str, Counter[str]]] = {split: {} for split in SPLITS}
    repositories: dict[str, dict[str, Counter[str]]] = {split: {} for split in SPLITS}
    places = [np.zeros(0, encode.PLACE)]
    with writers["train"], writers["validation"]:
        for unit in encoded:
            counts, found_places = encode.append(unit, writers, tokenizer.vocab_size)
            places.append(found_places)
            size += counts["bytes"]
            for split in SPLITS:
                tokens[split].update(counts["tokens"][split])
                documents[split].update(counts["documents"][split])
                for domain, found in counts["lengths"][split].items():
                    lengths[split].setdefault(domain, Counter()).update(found)
                for domain, found in counts["repositories"][split].items():
                    repositories[split].setdefault(domain, Counter()).update(found)
    _require_both(writers, recipe.validation_fraction)
    summed = {
        "bytes": size,
        "tokens": tokens,
        "documents": documents,
        "lengths": lengths,
        "repositories": repositories,
    }
    return writers, summed, np.concatenate(places)


def _report(
    writers: dict[str, ShardWriter], counts: dict[str, Any], bad: BadRows, tokenizer: Tokenizer
) -> dict[str, Any]:
    lengths = {
        split: {
            domain: {key: found[key] for key in sorted(found, key=int)}
            for domain, found in sorted(counts["lengths"][split].items())
        }
        for split in SPLITS
    }
    return {
        "tokens": {split: dict(sorted(counts["tokens"][split].items())) for split in SPLITS},
        "documents": {split: writers[split].documents for split in SPLITS},
        "documents_by_domain": {split: dict(sorted(counts["documents"][split].items())) for split in SPLITS},
        "lengths": lengths,
        "repositories": {
            split: {domain: dict(found) for domain, found in sorted(counts["repositories"][split].items())}
            for split in SPLITS
        },
        "unigram_entropy": unigram_entropy(writers["validation"].counts),
        "bad_rows": {"by_kind": dict(bad.kinds), "places": bad.places},
        "tokenizer_hash": tokenizer.hash,
    }


def _stage_reports(recipe: DataRecipe, scanned: Sequence[Path], decisions: curate.Decisions) -> list[dict[str, Any]]:
    """What each stage was given and what it dropped, in the recipe's order."""
    local = 0
    found = [spool.counts(folder)["stages"] for folder in scanned]
    reports = []
    for at, stage in enumerate(recipe.stages):
        name = stage.name if stage.type == "score" else None
        report: dict[str, Any] = {"type": stage.type} | ({"name": name} if name else {})
        if stage.type in LOCAL_STAGES:
            reasons: Counter[str] = Counter()
            for unit in found:
                reasons.update(unit[local]["reasons"])
            report |= {"in": sum(unit[local]["in"] for unit in found), "reasons": dict(sorted(reasons.items()))}
            local += 1
        else:
            report |= {"in": 0, "reasons": {}} | decisions.reports.get(at, {})
        report["out"] = report["in"] - sum(report["reasons"].values())
        reports.append(report)
    return reports


def _provenance(
    recipe: DataRecipe,
    behind: Sequence[Sequence[units.SourceFile]],
    read: Sequence[units.SourceFile],
    report: dict[str, Any],
) -> dict[str, Any]:
    """What it takes to make the same shards: `recipe` with these files and this tokenizer gives these bytes."""
    train = report["tokens"]["train"]
    total = sum(train.values())
    return {
        "recipe": recipe.model_dump(mode="json"),
        "sources": [
            {"name": name_of(source), "domain": source.domain, "documents": rows, "files": files}
            for source, rows, files in zip(recipe.sources, report["rows"], _plain(behind), strict=True)
        ],
        "stages": report["stages"],
        "repositories": report["repositories"],
        "stage_files": _plain([read])[0],
        "mixture": {domain: count / total for domain, count in train.items()},
        "tokenizer_hash": report["tokenizer_hash"],
        "glmctl": __version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }


def _plain(behind: Sequence[Sequence[units.SourceFile]]) -> list[list[dict[str, Any]]]:
    return [[asdict(file) for file in files] for files in behind]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def stage_files(recipe: DataRecipe) -> list[Path]:
    """Files that stages read: stored classifiers and a teacher's labels."""
    found: list[Path] = []
    for stage in recipe.stages:
        if stage.type == "code_pages" and stage.classifier is not None:
            found.append(Path(stage.classifier))
        elif stage.type == "score" and stage.scorer.type == "classifier":
            found.append(Path(stage.scorer.path))
        elif stage.type == "score" and stage.scorer.type == "taught" and stage.scorer.teacher.type == "labels":
            found += units.files_of(stage.scorer.teacher.paths)
    return found


def _classifiers(recipe: DataRecipe) -> list[str]:
    return [f"{stage.name}.npz" for stage in recipe.stages if stage.type == "score" and stage.scorer.type == "taught"]


def _summary(writers: dict[str, ShardWriter], counts: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    total = sum(writer.total_tokens for writer in writers.values())
    summary: dict[str, Any] = {f"tokens_{split}": writers[split].total_tokens for split in SPLITS}
    summary["documents"] = sum(writer.documents for writer in writers.values())
    summary["unigram_entropy"] = report["unigram_entropy"]
    summary["bytes_per_token"] = counts["bytes"] / total
    summary["bad_rows"] = sum(report["bad_rows"]["by_kind"].values())
    if report["stages"]:
        summary["dropped"] = sum(stage["in"] - stage["out"] for stage in report["stages"])
    return summary | {f"tokens_train_{domain}": count for domain, count in sorted(report["tokens"]["train"].items())}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_both(writers: dict[str, ShardWriter], fraction: float) -> None:
    count = sum(writer.documents for writer in writers.values())
    for split, writer in writers.items():
        if writer.documents == 0:
            raise DataError(
                f"the {split} split is empty: {count} documents, validation_fraction {fraction}",
                hint="add documents or change validation_fraction" if count else "the sources hold no text",
            )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats a token of the distribution that `counts` [vocab] of ids describe.

    It is the loss of the best model that ignores context, so how far a model's loss is below it is what the model
    learnt from context.
    """
    total = counts.sum()
    assert total > 0, "entropy of nothing"
    p = counts[counts > 0] / total
    return float(-(p * np.log(p)).sum())
