"""What is on disk of a run or a pipeline, read for showing: nothing here writes or judges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glmctl.errors import DataError
from glmctl.run.metrics import MetricsLog


@dataclass
class StageView:
    """What is on disk of one stage."""

    name: str
    path: Path
    kind: str
    recipe: dict[str, Any]
    state: str
    seconds: float
    summary: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    """why it cannot be read, where it cannot"""


def collect(root: Path) -> list[StageView]:
    """Every stage in the order of pipeline.json (then by name), or the one run that `root` itself is."""
    if (root / "status.json").is_file():
        return [read_stage(root)]
    order: list[str] = []
    if (root / "pipeline.json").is_file():
        order = list(read_json(root / "pipeline.json").get("stages", {}))
    present = sorted(status.parent.name for status in root.glob("*/status.json"))
    names = [n for n in order if n in present] + [n for n in present if n not in order and ".old-" not in n]
    if not names:
        raise DataError(f"{root}: no finished or started run here")
    return [read_stage(root / n) for n in names]


def read_stage(path: Path) -> StageView:
    """One run directory; missing files are empty. DataError names a file that is damaged."""
    view = read_head(path)
    view.rows = MetricsLog(path / "metrics.jsonl").rows()
    view.samples = list(_json_lines(path / "samples.jsonl"))
    view.env = read_json(path / "env.json")
    return view


def read_head(path: Path) -> StageView:
    """The same without what grows with the run: rows, samples and environment are left empty."""
    status = read_json(path / "status.json")
    recipe = _read_recipe(path / "recipe.yaml")
    summary = status.get("summary") or {}
    seconds = status.get("seconds", 0.0)
    if not isinstance(summary, dict) or not isinstance(seconds, int | float):
        raise DataError(f"{path / 'status.json'}: not the status of a run")
    return StageView(
        name=path.name,
        path=path,
        kind=str(recipe.get("type", "")),
        recipe=recipe,
        state=str(status.get("state", "unknown")),
        seconds=float(seconds),
        summary=summary,
    )


def damaged(path: Path, reason: str) -> StageView:
    """What is shown of a run that cannot be read: `error` says why."""
    return StageView(
        name=path.name, path=path, kind="", recipe={}, state="damaged", seconds=0.0, summary={}, error=reason
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none. DataError when it is something else."""
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(body, dict):
        raise DataError(f"{path}: not an object")
    return body


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a recipe: {error}") from error
    if not isinstance(body, dict):
        raise DataError(f"{path}: not a recipe: it holds no keys")
    return body


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line without its newline was being written and is left out."""
    if not path.is_file():
        return
    for index, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1]):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{index + 1}: not JSON: {error}") from error


def of_kind(stages: list[StageView], *kinds: str) -> list[StageView]:
    """The stages whose recipe has one of these types."""
    return [stage for stage in stages if stage.kind in kinds]
