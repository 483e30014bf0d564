"""lm-eval's results: our multi-turn scores beside them, the figures that a summary holds, and how they are shown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.run.headline import figure, words

Results = dict[str, Any]

COUNTS = ("sample_len", "sample_count")
"""entries of lm-eval's results that are no figures of a model"""
STDERR = "_stderr"
MAIN_METRICS = ("exact_match", "acc", "accuracy", "f1", "obeyed", "byte_perplexity", "word_perplexity", "perplexity")
_CELL = re.compile(r"found_(\d+)@(\d+)")
"""a needle's length and depth: shown as a grid, too many for a summary"""


def add_verified(
    results: Results, name: str, figures: Mapping[str, float], problems: int, config: Mapping[str, Any]
) -> None:
    """Put a multi-turn score beside lm-eval's, in the same shape: `<metric>,none`. config: how it was asked."""
    entry = {"alias": name, **{f"{metric},none": value for metric, value in figures.items()}}
    results.setdefault("results", {})[name] = entry
    results.setdefault("group_subtasks", {})[name] = []
    results.setdefault("versions", {})[name] = 1.0
    results.setdefault("n-shot", {})[name] = 0
    results.setdefault("higher_is_better", {})[name] = {m: True for m in figures if m != "mean_tokens"}
    results.setdefault("n-samples", {})[name] = {"original": problems, "effective": problems}
    results.setdefault("configs", {})[name] = {"task": name, "output_type": "multi_turn", **config}


def figures(results: Results) -> Iterator[tuple[str, str, float]]:
    """(task, metric, value) of every finite figure; filters other than lm-eval's default named in the metric."""
    for task, entry in results.get("results", {}).items():
        for key, value in entry.items():
            metric, _, kind = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and metric not in COUNTS:
                yield task, metric if kind in ("none", "") else f"{metric}_{kind}", float(value)


def main_metric(task: str, metrics: Sequence[str]) -> str:
    """Which of a task's metrics stands for it: its catalogue entry's, else the first usual one, else the first."""
    if task in OWN_TASKS and OWN_TASKS[task].metric in metrics:
        return OWN_TASKS[task].metric
    return next((metric for metric in MAIN_METRICS if metric in metrics), metrics[0])


def by_task(results: Results) -> dict[str, float]:
    """`<task>` for its main metric and `<task>_<metric>` for the others, without standard errors and needle cells."""
    summary: dict[str, float] = {}
    for task, metrics in _metrics_of(results).items():
        main = main_metric(task, list(metrics))
        summary[task] = metrics[main]
        beside = [name for name in metrics if name != main and not is_cell(name) and not name.endswith(STDERR)]
        summary |= {f"{task}_{name}": metrics[name] for name in beside}
    return summary


def is_cell(metric: str) -> bool:
    """Whether a metric is one length and depth of a needle, or the standard error of one."""
    return _CELL.match(metric) is not None


def grid(metrics: Mapping[str, float]) -> dict[tuple[int, int], float]:
    """Share found by (length in tokens, depth in percent), of a needle's metrics."""
    matched = [(_CELL.fullmatch(name), value) for name, value in metrics.items()]
    return {(int(match[1]), int(match[2])): value for match, value in matched if match is not None}


def show(title: str, models: Mapping[str, Results], beside: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of tasks and metrics by models, each value with its standard error, then each model's needle grid.

    beside: figures by model that are no task's.
    """
    found = {name: _metrics_of(results) for name, results in models.items()}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, tasks in found.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                if not metric.endswith(STDERR) and not is_cell(metric):
                    error = metrics.get(metric + STDERR)
                    rows.setdefault((task, metric), {})[name] = _cell(f"{task}_{metric}", value, error)
        for key, value in beside[name].items():
            rows.setdefault((words(key), ""), {})[name] = figure(key, value)
    table = [[task, words(metric), *(row.get(name, "") for name in models)] for (task, metric), row in rows.items()]
    console.table(title, ["task", "metric", *models], table)
    for name, tasks in found.items():
        for task, metrics in tasks.items():
            if cells := grid(metrics):
                _show_grid(f"{name}: {task}, share found by depth and length", cells)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, what lm-eval's results hold beyond JSON (numpy numbers, sets) made plain."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """JSON lines, as `write_json`."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _metrics_of(results: Results) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for task, metric, value in figures(results):
        found.setdefault(task, {})[metric] = value
    return found


def _cell(key: str, value: float, error: float | None) -> str:
    text = figure(key, value)
    if error is None:
        return text
    return f"{text} ± {100 * error:.1f}" if text.endswith("%") else f"{text} ± {console.number(error)}"


def _show_grid(title: str, cells: Mapping[tuple[int, int], float]) -> None:
    lengths, depths = sorted({length for length, _ in cells}), sorted({depth for _, depth in cells})
    rows = [[f"{depth}%", *(f"{cells[length, depth]:.0%}" for length in lengths)] for depth in depths]
    console.table(title, ["depth", *(f"{length} tokens" for length in lengths)], rows)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
