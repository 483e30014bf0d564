"""Two evaluated models document by document: which is better, and whether that could be chance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.errors import DataError, RecipeError, unknown
from glmctl.evaluation.results import main_metric
from glmctl.evaluation.statistics import Paired, holm, paired

PREFIX = "samples_"


def compare(first: Path, second: Path, *, seed: int = 0) -> dict[str, Paired]:
    """Every task that both folders (`<run>/export/<model>`, written by `glmctl eval`) have samples of.

    Documents are paired by what was asked, not by their place. Raises RecipeError when a folder holds no samples or no
    task is in both, DataError when the two were asked different documents or a file cannot be read.
    """
    shared = _shared(first, second)
    results = {}
    for task, paths in shared.items():
        scores = [_scores(task, path) for path in paths]
        if scores[0].keys() != scores[1].keys():
            odd = len(scores[0].keys() ^ scores[1].keys())
            raise DataError(f"{paths[1]}: {odd} documents of '{task}' are not in both; same --limit and problems?")
        order = list(scores[0])
        results[task] = paired([scores[0][key] for key in order], [scores[1][key] for key in order], seed=seed)
    return results


def show(first: Path, second: Path, results: dict[str, Paired]) -> None:
    """The comparison as a table."""
    columns = ["task", "documents", first.name, second.name, "difference", "95%", "win/tie/loss", "p", "p (Holm)"]
    adjusted = holm([one.p_value for one in results.values()])
    rows = [
        [
            task,
            str(one.documents),
            f"{one.first:.3f}",
            f"{one.second:.3f}",
            f"{one.difference:+.3f}",
            f"{one.low:+.3f} .. {one.high:+.3f}",
            f"{one.wins}/{one.ties}/{one.losses}",
            f"{one.p_value:.2g}",
            f"{among_all:.2g}",
        ]
        for (task, one), among_all in zip(results.items(), adjusted, strict=True)
    ]
    console.table(f"{second.name} against {first.name}", columns, rows)


def shared_tasks(first: Path, second: Path, task: str) -> tuple[Path, Path]:
    """The two folders' samples of `task`. RecipeError, with what both have, when it is not in both."""
    shared = _shared(first, second)
    if task not in shared:
        raise unknown("task", task, shared, where=f"{first} and {second}")
    return shared[task]


def read_samples(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a samples file. DataError for a line that is no JSON object."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a sample of `glmctl eval`")
        yield number, row


def _shared(first: Path, second: Path) -> dict[str, tuple[Path, Path]]:
    tasks = [_tasks(folder) for folder in (first, second)]
    shared = {task: (path, tasks[1][task]) for task, path in tasks[0].items() if task in tasks[1]}
    if not shared:
        raise RecipeError(
            f"no task is in both {first} and {second}: {', '.join(tasks[0])} against {', '.join(tasks[1])}"
        )
    return shared


def _tasks(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder", hint="name <run>/export/<model> of a finished `glmctl eval`")
    found = {path.stem.removeprefix(PREFIX): path for path in sorted(folder.glob(f"{PREFIX}*.jsonl"))}
    if not found:
        inside = [path.parent.name for path in folder.glob(f"*/{PREFIX}*.jsonl")]
        hint = f"there are models in it: {', '.join(sorted(set(inside)))}" if inside else None
        raise RecipeError(f"{folder}: no {PREFIX}<task>.jsonl in it", hint=hint)
    return found


def _scores(task: str, path: Path) -> dict[str, float]:
    """Document -> score: the mean reward of a problem's samples, or the main metric of an lm-eval task."""
    found: dict[str, list[float]] = {}
    for number, row in read_samples(path):
        try:
            key, score = _row(task, row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a sample of `glmctl eval`: {error!r}") from error
        if score is not None:
            found.setdefault(key, []).append(score)
    return {key: sum(scores) / len(scores) for key, scores in found.items()}


def _row(task: str, row: dict[str, Any]) -> tuple[str, float | None]:
    if "metrics" in row:
        metric = main_metric(task, row["metrics"])
        return str(row["doc_hash"]), _number(metric, row[metric])
    reward = row["reward"]
    # an episode that infrastructure failed has no reward and says nothing about the model
    return str(row["prompt"]), None if reward is None else float(reward)


def _number(metric: str, value: Any) -> float:
    """A document's figure; of a perplexity the mean log-likelihood of a word or byte, so that more is better."""
    of_text = metric == "bits_per_byte" or metric.endswith("perplexity")
    if of_text and isinstance(value, list) and len(value) == 2 and value[1]:
        return float(value[0]) / float(value[1])
    if not isinstance(value, int | float):
        raise ValueError(f"'{metric}' is a figure of the whole task, not of a document")
    return float(value)
