"""What came out of a study: its figures, and one self-contained page with bars, curves and paired differences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from statistics import fmean, stdev
from string import Template
from typing import Any

from glmctl.recipe.schema import StudyRecipe
from glmctl.run.charts import Series, bar_chart, line_chart

Found = dict[str, dict[str, list[float]]]
"""metric -> arm -> one value a seed"""
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Trial:
    """One searched setting of an arm on the first seed."""

    setting: dict[str, Any]
    value: float | None
    """of `choose.metric`; None when a stage diverged"""


@dataclass(frozen=True)
class Outcome:
    """What a study found."""

    found: Found
    trials: dict[str, list[Trial]]
    """arm -> its searched settings, in their order"""
    places: dict[str, int]
    """arm -> which of them is the best"""
    curves: dict[str, dict[str, Points]]
    """label -> arm -> the mean over the seeds"""

    def as_json(self, recipe: StudyRecipe) -> dict[str, Any]:
        """By metric and arm `values` (one a seed), `mean`, `std` (of the sample; 0 for one seed), and every trial."""
        metrics = {
            metric: {arm: {"values": values, **moments(values)} for arm, values in arms.items()}
            for metric, arms in self.found.items()
        }
        search = {
            arm: {"best": self.places[arm], "trials": [{"setting": one.setting, "value": one.value} for one in tried]}
            for arm, tried in self.trials.items()
        }
        return {"name": recipe.name, "seeds": recipe.seeds, "metrics": metrics, "search": search}


def plots(recipe: StudyRecipe, outcome: Outcome) -> dict[str, str]:
    """The pictures by file name: the bars of every metric, then every curve."""
    found = {f"{_slug(metric)}.svg": _bars(recipe, metric, arms) for metric, arms in outcome.found.items()}
    for label, arms in outcome.curves.items():
        series = [Series(arm, points) for arm, points in arms.items() if points]
        chart = line_chart(series, title=f"{label}, mean of the seeds", x_label="tokens")
        found[f"{_slug(label)}-curve.svg"] = chart
    return found


def page(recipe: StudyRecipe, outcome: Outcome) -> str:
    """The whole page."""
    grid = "".join(f'<div class="card">{card}</div>' for card in plots(recipe, outcome).values())
    changes = "".join(
        f"<li><b>{escape(arm)}</b>: {escape(_settings(recipe, outcome, arm))}</li>" for arm in recipe.arms
    )
    body = (
        f"<header><h1>{escape(recipe.name)}</h1><p>{len(recipe.arms)} settings, {len(recipe.seeds)} seeds each. "
        'The stages themselves: <a href="report.html">report.html</a></p></header>'
        f'<div class="grid">{grid}</div>'
        f"<h2>Mean and deviation</h2>{_means(recipe, outcome)}"
        f"{_differences(recipe, outcome)}<h2>Settings</h2><ul>{changes}</ul>{_search(outcome)}"
    )
    frame = Template(resources.files("glmctl.run").joinpath("report.html").read_text(encoding="utf-8"))
    return frame.substitute(title=escape(f"{recipe.name} · glmctl"), body=body)


def shown(values: Sequence[float]) -> str:
    """Mean and deviation, as shares when all values are ones."""
    found = moments(values)
    if _shares(values):
        return f"{found['mean']:.1%} ± {found['std']:.1%}"
    return f"{found['mean']:.4g} ± {found['std']:.2g}"


def moments(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the sample's standard deviation (0 for one value)."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def setting_words(setting: Mapping[str, Any]) -> str:
    """`peak_lr 0.01, final_lr 0.001`: the last words of its keys with their values."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in setting.items())


def _slug(label: str) -> str:
    """A file's name of a label: letters and digits, the rest dashes."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def _shares(values: Sequence[float]) -> bool:
    return all(0.0 <= value <= 1.0 for value in values)


def _bars(recipe: StudyRecipe, metric: str, arms: dict[str, list[float]]) -> str:
    share = all(_shares(values) for values in arms.values())
    seeds = [f"seed {seed}" for seed in recipe.seeds]
    series = [(arm, [*values, fmean(values)]) for arm, values in arms.items()]
    return bar_chart([*seeds, "mean"], series, title=metric, percent=share)


def _means(recipe: StudyRecipe, outcome: Outcome) -> str:
    rows = [[metric, *(shown(values) for values in arms.values())] for metric, arms in outcome.found.items()]
    return _table(["", *recipe.arms], rows)


def _differences(recipe: StudyRecipe, outcome: Outcome) -> str:
    """Of each later arm to the first, paired: the same seed draws the same order of data in both."""
    first, *others = recipe.arms
    if not others:
        return ""
    rows = []
    for metric, arms in outcome.found.items():
        cells = [metric]
        for arm in others:
            gaps = [a - b for a, b in zip(arms[arm], arms[first], strict=True)]
            cells.append(f"{fmean(gaps):+.4g} ({min(gaps):+.4g} to {max(gaps):+.4g})")
        rows.append(cells)
    return f"<h2>Against {escape(first)}, seed by seed</h2>{_table(['', *others], rows)}"


def _settings(recipe: StudyRecipe, outcome: Outcome, arm: str) -> str:
    settings = dict(recipe.arms[arm])
    if arm in outcome.places:
        settings |= recipe.search[arm][outcome.places[arm]]
    return ", ".join(f"{key} = {value}" for key, value in settings.items()) or "as it is"


def _search(outcome: Outcome) -> str:
    rows = []
    for arm, trials in outcome.trials.items():
        for place, one in enumerate(trials):
            value = "diverged" if one.value is None else f"{one.value:.4g}"
            rows.append([arm, setting_words(one.setting), value + (" (best)" if place == outcome.places[arm] else "")])
    return f"<h2>Searched on the first seed</h2>{_table(['arm', 'setting', ''], rows)}" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = f"<th>{escape(head[0])}</th>" + "".join(f'<th class="num">{escape(cell)}</th>' for cell in head[1:])
    body = "".join(
        f'<tr><td class="name">{escape(row[0])}</td>'
        + "".join(f'<td class="num">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="card scroll"><table><tr>{top}</tr>{body}</table></div>'
