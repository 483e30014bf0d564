"""What came out of an ablation, for people: a table with spread, the curves, and the settings that were tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from glmctl.console import number
from glmctl.run.charts import Point, Series, line_chart
from glmctl.run.headline import words
from glmctl.run.metrics import MetricsLog, finite


@dataclass(frozen=True)
class Trial:
    """One run of one variant."""

    path: Path
    setting: dict[str, Any]
    seed: int
    figure: float
    """infinite when it diverged"""
    summary: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One variant."""

    name: str
    chosen: list[Trial]
    """its best setting, one trial a seed"""
    searched: list[Trial]
    """every setting on the first seed"""
    parameters: int
    active: int
    """parameters one token passes, without embedding, output matrix and MTP"""
    tokens: int

    @property
    def trials(self) -> list[Trial]:
        """Every trial once."""
        return [*self.searched, *self.chosen[1:]]

    @property
    def figures(self) -> list[float]:
        """The figure of each seed."""
        return [trial.figure for trial in self.chosen]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.figures)

    def as_json(self) -> dict[str, Any]:
        """Everything, with paths as trial names."""

        def told(trial: Trial) -> dict[str, Any]:
            figure = finite(trial.figure)
            return {"trial": trial.path.name, "setting": trial.setting, "seed": trial.seed, "figure": figure}

        body = {"name": self.name, "parameters": self.parameters, "active": self.active, "tokens": self.tokens}
        return {**body, "chosen": [told(t) for t in self.chosen], "searched": [told(t) for t in self.searched]}


def table(outcomes: Sequence[Outcome], figure: str) -> str:
    """Markdown: each variant's figure with its range over the seeds, and what its search found."""
    first = outcomes[0]
    seeds = len(first.chosen)
    caption = f"{number(first.tokens)} tokens each, {seeds} seed{'s' if seeds > 1 else ''}.\n"
    parts = [_markdown(*_main_table(outcomes, figure)), caption]
    if any(len(one.searched) > 1 for one in outcomes):
        parts += ["Every setting on the first seed:\n", _markdown(*_search_table(outcomes, figure))]
    return "\n".join(parts)


def page(name: str, outcomes: Sequence[Outcome], figure: str) -> str:
    """One self-contained page: curves (the mean of the seeds) and both tables."""
    seeds, tokens = len(outcomes[0].chosen), number(outcomes[0].tokens)
    body = (
        f"<header><h1>{escape(name)}</h1><p>{len(outcomes)} variants, {seeds} seeds each, {tokens} tokens</p></header>"
        f'<div class="card wide">{chart(outcomes, figure)}</div>'
        f'<h2>Variants</h2><div class="card scroll">{_html(*_main_table(outcomes, figure))}</div>'
        f'<h2>Settings on the first seed</h2><div class="card scroll">{_html(*_search_table(outcomes, figure))}</div>'
    )
    template = Template(resources.files("glmctl.run").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"{name} · glmctl"), body=body)


def _main_table(outcomes: Sequence[Outcome], figure: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows. Differences are paired: in two variants the same seed draws the same order of data."""
    first = outcomes[0]
    head = ["variant", "setting", "parameters", "active", f"{words(figure)}, mean (range)", f"minus {first.name}"]
    rows = []
    for one in outcomes:
        gaps = [a - b for a, b in zip(one.figures, first.figures, strict=True)]
        gap = "" if one is first else f"{statistics.fmean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
        spread = f"{one.mean:.3f} ({min(one.figures):.3f} to {max(one.figures):.3f})"
        sizes = [number(one.parameters), number(one.active)]
        rows.append([one.name, setting_words(one.chosen[0].setting), *sizes, spread, gap])
    return head, rows


def _search_table(outcomes: Sequence[Outcome], figure: str) -> tuple[list[str], list[list[str]]]:
    rows = [
        [one.name, setting_words(trial.setting), f"{trial.figure:.3f}" if math.isfinite(trial.figure) else "diverged"]
        for one in outcomes
        for trial in one.searched
    ]
    return ["variant", "setting", words(figure)], rows


def chart(outcomes: Sequence[Outcome], figure: str) -> str:
    """The figure over tokens, the mean of the seeds, as far as runs record it step by step."""
    series = [
        Series(f"{one.name} ({setting_words(one.chosen[0].setting)})", _mean_curve(one, figure)) for one in outcomes
    ]
    drawn = [one for one in series if one.points]
    return line_chart(drawn, title=words(figure), x_label="tokens", width=1080, height=420)


def setting_words(setting: Mapping[str, Any]) -> str:
    """`peak_lr 0.01`: the last words of its keys with their values."""
    return ", ".join(f"{key.rpartition('.')[2]} {number(value)}" for key, value in setting.items())


def _mean_curve(one: Outcome, figure: str) -> list[Point]:
    curves = []
    for trial in one.chosen:
        rows = MetricsLog(trial.path / "metrics.jsonl").rows()
        curves.append({int(row["tokens"]): float(row[figure]) for row in rows if row.get(figure) is not None})
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(float(at), statistics.fmean(curve[at] for curve in curves)) for at in common]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"
