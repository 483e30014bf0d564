"""What a prepared data set holds, from the report that came with it: tokens, lengths, duplicates, drop reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.data.encode import SPLITS
from glmctl.data.prepare import REPORT
from glmctl.errors import DataError, RecipeError

DUPLICATES = ("exact", "minhash", "semantic")


def read(path: Path) -> dict[str, Any]:
    """The report of a data run or of its export.

    RecipeError when nothing is there; DataError when it is no report, or one of an older version.
    """
    file = next((p for p in (path / REPORT, path / "export" / REPORT) if p.is_file()), None)
    if file is None:
        raise RecipeError(f"{path}: no {REPORT} there", hint="name a finished `glmctl data prepare` run")
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(report, dict) or not {"stages", "lengths", "repositories"} <= report.keys():
        raise DataError(f"{file}: not a report of this version", hint="prepare the data again")
    return report


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures that `glmctl data stats` prints, computed from a report."""
    train = report["tokens"]["train"]
    total = sum(train.values())
    domains = {}
    for domain in sorted({*train, *report["tokens"]["validation"]}):
        tokens, documents = train.get(domain, 0), report["documents_by_domain"]["train"].get(domain, 0)
        domains[domain] = {
            "tokens_train": tokens,
            "share": tokens / total if total else 0.0,
            "tokens_validation": report["tokens"]["validation"].get(domain, 0),
            "documents": documents,
            "tokens_per_document": tokens / documents if documents else 0.0,
        }
    dropped: dict[str, int] = {}
    for stage in report["stages"]:
        for reason, count in stage["reasons"].items():
            key = f"{stage.get('name', stage['type'])}: {reason}"
            dropped[key] = dropped.get(key, 0) + count
    lengths: dict[str, int] = {}
    for split in SPLITS:
        for found in report["lengths"][split].values():
            for power, count in found.items():
                lengths[power] = lengths.get(power, 0) + count
    return {
        "domains": domains,
        "lengths": {str(1 << int(power)): lengths[power] for power in sorted(lengths, key=int)},
        "duplicates": {
            stage["type"]: stage["in"] - stage["out"] for stage in report["stages"] if stage["type"] in DUPLICATES
        },
        "dropped": dict(sorted(dropped.items(), key=lambda item: -item[1])),
        "bad_rows": report["bad_rows"]["by_kind"],
        "repositories": report["repositories"],
        "stages": report["stages"],
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    number = console.number
    rows = [
        [
            domain,
            number(found["tokens_train"]),
            f"{found['share']:.1%}",
            number(found["tokens_validation"]),
            number(found["documents"]),
            number(found["tokens_per_document"]),
        ]
        for domain, found in figures["domains"].items()
    ]
    console.table("Tokens", ["domain", "train", "share", "validation", "documents", "tokens each"], rows)
    most = max(figures["lengths"].values(), default=1)
    bars = [
        [f"{int(low):,} to {2 * int(low) - 1:,}", number(count), "█" * max(1, round(30 * count / most))]
        for low, count in figures["lengths"].items()
    ]
    console.table("Lengths", ["tokens", "documents", ""], bars)
    contexts = [
        [split, domain, number(found["files"]), number(found["contexts"])]
        for split in SPLITS
        for domain, found in figures["repositories"][split].items()
    ]
    if contexts:
        console.table("Repositories", ["split", "domain", "files", "contexts"], contexts)
    if figures["stages"]:
        stages = [
            [stage.get("name", stage["type"]), number(stage["in"]), number(stage["in"] - stage["out"]), _said(stage)]
            for stage in figures["stages"]
        ]
        console.table("Stages", ["stage", "in", "dropped", ""], stages)
    left_out = [[reason, number(count)] for reason, count in figures["dropped"].items()]
    left_out += [[f"bad row: {kind}", number(count)] for kind, count in figures["bad_rows"].items()]
    if left_out:
        console.table("Left out", ["reason", "documents"], left_out)


def _said(stage: dict[str, Any]) -> str:
    words = []
    if "buckets" in stage:
        words.append(", ".join(f"{bucket['documents']}×{bucket['epochs']:g}" for bucket in stage["buckets"]))
    if "accuracy" in stage:
        words.append(f"agrees with its teacher on {stage['accuracy']:.1%} (by chance {stage['baseline']:.1%})")
    return "; ".join(words)
