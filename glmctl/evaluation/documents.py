"""Documents of our own tasks: rows that ship, rows from files, and rows as the data set that lm-eval wants."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import datasets

from glmctl.errors import DataError, RecipeError

Row = dict[str, Any]


def shipped(name: str) -> list[Row]:
    """Rows of a JSON-lines file in `glmctl/evaluation/data`."""
    text = resources.files("glmctl.evaluation").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_rows(path: Path, field: str) -> list[Row]:
    """Rows of a JSON-lines file, each with a string `field`. RecipeError or DataError naming file and line."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    rows = []
    # not splitlines, which also parts at characters that JSON leaves as they are
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise DataError(f"{path}:{number}: needs a string '{field}'")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows in this file")
    return rows


def as_dataset(rows: list[Row]) -> Row:
    """The part of an lm-eval config that names the documents: no file is cached, nothing is looked for on the hub."""

    def custom_dataset(**kwargs: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(rows)}

    return {"custom_dataset": custom_dataset, "test_split": "test"}


def means(*names: str) -> list[Row]:
    """`metric_list` of metrics that are means over documents, better when higher."""
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
