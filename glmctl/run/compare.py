"""Several runs side by side: the registry's list, their summaries, and one metric's curves for terminal and browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from glmctl.errors import DataError, unknown
from glmctl.run.changes import differences
from glmctl.run.charts import Point, Series, line_chart, smoothed
from glmctl.run.headline import figure, headline, words
from glmctl.run.metrics import MetricsLog
from glmctl.run.view import StageView, damaged, read_head, read_stage

MIN_COLUMNS, MAX_COLUMNS, ROWS, GAP = 36, 72, 16, 3
"""of the terminal chart, in characters; each holds 2 x 4 dots"""

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""bit of each dot of a braille character, by row and column"""


def find_runs(root: Path) -> list[Path]:
    """Every run below `root`, stages of pipelines included, by path; those moved aside by --fresh are left out."""
    if not root.is_dir():
        return []
    found = [status.parent for status in root.rglob("status.json") if (status.parent / "recipe.yaml").is_file()]
    return sorted(path for path in found if not any(".old-" in part for part in path.relative_to(root).parts))


def overview(path: Path) -> tuple[StageView, int | None]:
    """A run for the list, and the step of its last row of metrics: what costs the same however long the run is.

    What cannot be read is the view's `error`; the other runs of a list are none the worse for it.
    """
    try:
        view, last = read_head(path), MetricsLog(path / "metrics.jsonl").last()
    except (DataError, OSError) as problem:
        return damaged(path, str(problem)), None
    return view, (last or {}).get("step")


def open_run(name: str, root: Path) -> StageView:
    """The run that `name` means: a path, or a run's path below `root`. RecipeError with the nearest one."""
    for path in (Path(name), root / name):
        if (path / "recipe.yaml").is_file():
            return read_stage(path)
    raise unknown("run", name, [str(path.relative_to(root)) for path in find_runs(root)])


def curve(view: StageView, metric: str, x: str) -> list[Point]:
    """(x, metric) of every row that has both. DataError names the metrics there are when none has."""
    points = [
        (float(row[x]), float(row[metric]))
        for row in view.rows
        if isinstance(row.get(x), int | float) and isinstance(row.get(metric), int | float)
    ]
    if not points:
        known = sorted({key for row in view.rows for key, value in row.items() if isinstance(value, int | float)})
        raise DataError(f"{view.path}: no '{metric}' over '{x}'; it has {', '.join(known) or 'no metrics yet'}")
    return points


def recipe_differences(views: Sequence[StageView]) -> list[str]:
    """What the recipes of the others set otherwise than the first's."""
    lines = []
    for view in views[1:]:
        lines += [f"{view.path.name}: {line}" for line in differences(views[0].recipe, view.recipe)]
    return lines


def summary_rows(views: Sequence[StageView]) -> list[list[str]]:
    """For each figure of the runs' headlines, its value in every run ("" where it has none)."""
    keys = dict.fromkeys(key for view in views for key in headline(view.kind, view.summary))
    return [
        [words(key), *(figure(key, view.summary[key]) if key in view.summary else "" for view in views)] for key in keys
    ]


def terminal_chart(curves: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, width: int) -> str:
    """The curves in braille dots, each in a frame of its own beside a common scale of x and y.

    As many side by side as `width` columns of text allow at `MIN_COLUMNS` a frame, the rest below.
    """
    points = [p for curve in curves.values() for p in curve]
    x_range, y_range = _range_of([x for x, _ in points]), _range_of([y for _, y in points])
    labels = [f"{y_range[1]:.4g}", *[""] * (ROWS - 2), f"{y_range[0]:.4g}"]
    margin = max(len(label) for label in labels) + 2
    abreast = max(1, min(len(curves), (width + GAP) // (margin + MIN_COLUMNS + GAP)))
    columns = max(MIN_COLUMNS, min(MAX_COLUMNS, (width + GAP) // abreast - GAP - margin))
    panels = []
    for name, own in curves.items():
        dots = _dots(own, x_range, y_range, columns)
        drawn = [f"{label:>{margin - 2}} |{line}" for label, line in zip(labels, dots, strict=True)]
        foot = f"{'':>{margin}}{x_range[0]:<{columns // 2}.6g}{x_range[1]:>{columns - columns // 2}.6g}"
        # in full where it is alone, however long
        head = f"{name}: {y_label} over {x_label}, last {own[-1][1]:.4g}"
        panels.append([head if abreast == 1 else _shortened(head, margin + columns), *drawn, foot])
    blocks = []
    for first in range(0, len(panels), abreast):
        rows = zip(*panels[first : first + abreast], strict=True)
        blocks.append("\n".join((" " * GAP).join(f"{x:<{margin + columns}}" for x in row).rstrip(" ") for row in rows))
    return "\n\n".join(blocks)


def _dots(curve: Sequence[Point], x_range: Point, y_range: Point, columns: int) -> list[str]:
    cells = [[0] * columns for _ in range(ROWS)]
    for x, y in curve:
        column = _place(x, *x_range, 2 * columns)
        row = 4 * ROWS - 1 - _place(y, *y_range, 4 * ROWS)
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    return ["".join(chr(0x2800 + bits) for bits in row) for row in cells]


def _range_of(values: Sequence[float]) -> Point:
    return min(values), max(values)


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def html_page(views: Sequence[StageView], curves: Mapping[str, Sequence[Point]], metric: str, x: str) -> str:
    """One self-contained page: the curves in one chart, the figures, and what the recipes set otherwise."""
    window = max(1, min(len(c) for c in curves.values()) // 20)
    series = [Series(name, smoothed(list(points), window)) for name, points in curves.items()]
    chart = line_chart(series, title=f"{words(metric)}, mean of {window}", x_label=x, width=1080, height=420)
    head = "".join(f"<th>{escape(name)}</th>" for name in curves)
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in summary_rows(views)]
    table = f"<table><tr><th></th>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    changed = "".join(f"<li>{escape(line)}</li>" for line in recipe_differences(views))
    body = (
        f"<header><h1>{escape(' · '.join(curves))}</h1><p>{len(views)} runs side by side</p></header>"
        f'<div class="card wide">{chart}</div><h2>Figures</h2><div class="card scroll">{table}</div>'
        f"<h2>Recipes</h2><ul>{changed or '<li>the same</li>'}</ul>"
    )
    page = Template(resources.files("glmctl.run").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(f"{' · '.join(curves)} · glmctl"), body=body)


def named(views: Sequence[StageView]) -> dict[str, StageView]:
    """The runs by their shortest names that differ: the folder's, else its path."""
    names = [view.path.name for view in views]
    return {(view.path.name if names.count(view.path.name) == 1 else str(view.path)): view for view in views}


def as_json(view: StageView) -> dict[str, Any]:
    """What `--json` tells of one run."""
    body = {"run": str(view.path), "type": view.kind, "state": view.state, "seconds": view.seconds}
    return {**body, "rows": len(view.rows), "summary": view.summary}


def _place(value: float, low: float, high: float, count: int) -> int:
    return 0 if high == low else min(count - 1, int((value - low) / (high - low) * count))
