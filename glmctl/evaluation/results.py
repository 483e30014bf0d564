"""lm-eval's results: our multi-turn scores beside them, the JSON that lm-eval writes, and the figures to show."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glmctl import __version__
from glmctl.evaluation.catalog import OWN_TASKS

Results = dict[str, Any]

COUNTS = ("sample_len", "sample_count")
"""entries of lm-eval's results that are no figures of a model"""
MAIN_METRICS = ("exact_match", "acc", "accuracy", "f1", "obeyed", "byte_perplexity", "word_perplexity", "perplexity")


def document(results: Results, config: Mapping[str, Any], started: float) -> Results:
    """The results without samples, in the layout of lm-eval's `results_*.json`."""
    body = {key: value for key, value in results.items() if key != "samples"}
    return {
        **body,
        "config": {"model": "glmctl", **config},
        "date": started,
        "total_evaluation_time_seconds": str(time.time() - started),
        "lm_eval_version": version("lm_eval"),
        "glmctl_version": __version__,
    }


def add_verified(results: Results, name: str, figures: Mapping[str, float], problems: int) -> None:
    """Put a multi-turn score beside lm-eval's, in the same shape: `<metric>,none`."""
    entry = {"alias": name, **{f"{metric},none": value for metric, value in figures.items()}}
    results.setdefault("results", {})[name] = entry
    results.setdefault("group_subtasks", {})[name] = []
    results.setdefault("versions", {})[name] = 1.0
    results.setdefault("n-shot", {})[name] = 0
    results.setdefault("higher_is_better", {})[name] = {m: True for m in figures if m != "mean_tokens"}
    results.setdefault("n-samples", {})[name] = {"original": problems, "effective": problems}
    results.setdefault("configs", {})[name] = {"task": name, "output_type": "multi_turn"}


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
    """`<task>` for its main metric and `<task>_<metric>` for the others."""
    metrics_of: dict[str, dict[str, float]] = {}
    for task, metric, value in figures(results):
        metrics_of.setdefault(task, {})[metric] = value
    summary: dict[str, float] = {}
    for task, metrics in metrics_of.items():
        main = main_metric(task, list(metrics))
        summary[task] = metrics.pop(main)
        summary |= {f"{task}_{metric}": value for metric, value in metrics.items()}
    return summary


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, what lm-eval's results hold beyond JSON (numpy numbers, sets) made plain."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """JSON lines, as `write_json`."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
