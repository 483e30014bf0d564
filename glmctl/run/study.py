"""A study: stages repeated for every arm and seed, as one pipeline, and what came out of it side by side.

`before` runs once. Each of `stages` runs as `<stage>-<arm>-<seed>`; where its `set` names another repeated `${stage}`,
that of the same arm and seed is meant. The result is `study.json` and `study.html` beside the pipeline's own files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any

from glmctl import console
from glmctl.errors import DataError
from glmctl.recipe.schema import PipelineRecipe, PipelineStage, StudyRecipe
from glmctl.run import atomic
from glmctl.run.charts import bar_chart
from glmctl.run.pipeline import PLACEHOLDER, Execute, Load, run_pipeline

Found = dict[str, dict[str, list[float]]]
"""metric -> arm -> one value a seed"""


def run_study(recipe: StudyRecipe, root: Path, load: Load, execute: Execute, fresh: bool = False) -> dict[str, Any]:
    """Bring the whole study up to date (see `run_pipeline`) and write and return `study.json`.

    By metric and arm: `values` (one a seed), `mean`, `std` (of the sample; 0 for one seed). DataError when a stage has
    none of the summary keys that a metric names.
    """
    summary = run_pipeline(pipeline_of(recipe), root, load, execute, fresh=fresh)
    found = collect(recipe, summary["stages"])
    body = {
        "name": recipe.name,
        "seeds": recipe.seeds,
        "metrics": {
            metric: {arm: {"values": values, **_moments(values)} for arm, values in arms.items()}
            for metric, arms in found.items()
        },
    }
    atomic.write_json(root / "study.json", body)
    atomic.write_text(root / "study.html", page(recipe, found))
    rows = [[metric, *(_shown(values) for values in arms.values())] for metric, arms in found.items()]
    console.table(f"{recipe.name}: mean and deviation over {len(recipe.seeds)} seeds", ["metric", *recipe.arms], rows)
    console.note(f"plots: {root / 'study.html'}")
    return body


def pipeline_of(recipe: StudyRecipe) -> PipelineRecipe:
    """The study as a plain pipeline."""
    repeated = {stage.name for stage in recipe.stages}
    stages = list(recipe.before)
    for arm, changes in recipe.arms.items():
        for seed in recipe.seeds:
            for stage in recipe.stages:
                own = {key.partition(".")[2]: value for key, value in changes.items() if _of(key) == stage.name}
                settings = {**stage.set, **own, "seed": seed}
                name = settings.pop("recipe", stage.recipe)
                renamed = {key: _renamed(value, repeated, f"{arm}-{seed}") for key, value in settings.items()}
                stages.append(PipelineStage(name=f"{stage.name}-{arm}-{seed}", recipe=name, set=renamed))
    return PipelineRecipe(name=recipe.name, seed=recipe.seed, stages=stages)


def collect(recipe: StudyRecipe, stages: Mapping[str, Any]) -> Found:
    """Every metric of every arm and seed from the stages' summaries."""
    found: Found = {}
    for metric, keys in recipe.metrics.items():
        for arm in recipe.arms:
            for seed in recipe.seeds:
                values = [stages[f"{_of(key)}-{arm}-{seed}"]["summary"].get(key.partition(".")[2]) for key in keys]
                value = next((one for one in values if one is not None), None)
                if value is None:
                    raise DataError(f"{recipe.name}: arm '{arm}' has no {' or '.join(keys)} in its summaries")
                found.setdefault(metric, {}).setdefault(arm, []).append(float(value))
    return found


def page(recipe: StudyRecipe, found: Found) -> str:
    """One self-contained page: means as bars with every seed in the table below, and what the arms set."""
    cards = []
    for metric, arms in found.items():
        share = all(0.0 <= value <= 1.0 for values in arms.values() for value in values)
        seeds = [f"seed {seed}" for seed in recipe.seeds]
        series = [(arm, [*values, fmean(values)]) for arm, values in arms.items()]
        cards.append(f'<div class="card">{bar_chart([*seeds, "mean"], series, title=metric, percent=share)}</div>')
    head = "".join(f'<th class="num">{escape(arm)}</th>' for arm in recipe.arms)
    rows = "".join(
        f'<tr><td class="name">{escape(metric)}</td>'
        + "".join(f'<td class="num">{escape(_shown(values))}</td>' for values in arms.values())
        + "</tr>"
        for metric, arms in found.items()
    )
    changes = "".join(
        f"<li><b>{escape(arm)}</b>: {escape(', '.join(f'{k} = {v}' for k, v in settings.items()) or 'as it is')}</li>"
        for arm, settings in recipe.arms.items()
    )
    body = (
        f"<header><h1>{escape(recipe.name)}</h1><p>{len(recipe.arms)} settings, {len(recipe.seeds)} seeds each. "
        'The stages themselves: <a href="report.html">report.html</a></p></header>'
        f'<div class="grid">{"".join(cards)}</div><h2>Mean and deviation</h2>'
        f'<div class="card scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'
        f"<h2>Settings</h2><ul>{changes}</ul>"
    )
    frame = Template(resources.files("glmctl.run").joinpath("report.html").read_text(encoding="utf-8"))
    return frame.substitute(title=escape(f"{recipe.name} · glmctl"), body=body)


def _moments(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def _shown(values: Sequence[float]) -> str:
    moments = _moments(values)
    if all(0.0 <= value <= 1.0 for value in values):
        return f"{moments['mean']:.1%} ± {moments['std']:.1%}"
    return f"{moments['mean']:.4g} ± {moments['std']:.2g}"


def _of(key: str) -> str:
    """The stage that a key names."""
    return key.partition(".")[0]


def _renamed(value: Any, names: set[str], ending: str) -> Any:
    """`${name}` of a repeated stage as the one of this arm and seed, in every string of `value`."""
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda found: _place(found, names, ending), value)
    if isinstance(value, Mapping):
        return {key: _renamed(one, names, ending) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(one, names, ending) for one in value]
    return value


def _place(found: re.Match[str], names: set[str], ending: str) -> str:
    return f"${{{found[1]}-{ending}}}" if found[1] in names else found[0]
