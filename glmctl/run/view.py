"""What is on disk of a run or a pipeline, read for showing: nothing here writes or judges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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
    """One run directory; missing files are empty."""
    status = read_json(path / "status.json")
    recipe_file = path / "recipe.yaml"
    recipe = yaml.safe_load(recipe_file.read_text(encoding="utf-8")) if recipe_file.is_file() else {}
    return StageView(
        name=path.name,
        path=path,
        kind=str(recipe.get("type", "")),
        recipe=recipe,
        state=str(status.get("state", "unknown")),
        seconds=float(status.get("seconds", 0.0)),
        summary=status.get("summary") or {},
        rows=MetricsLog(path / "metrics.jsonl").rows() if (path / "metrics.jsonl").is_file() else [],
        samples=list(_json_lines(path / "samples.jsonl")),
        env=read_json(path / "env.json"),
    )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error


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
