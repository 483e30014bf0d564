"""The report's part on distillation: every model on every domain, what was rejected and why, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from glmctl.console import duration, number
from glmctl.run.charts import Series, bar_chart, line_chart
from glmctl.run.report_charts import column, section, window
from glmctl.run.report_samples import marked
from glmctl.run.view import StageView, read_json

SHOWN = 400
"""characters of a rejected answer"""


def distill_section(stages: list[StageView]) -> str:
    """The comparison as table and bars, obedience to the switch, rejections with an example each, cost, the loss."""
    cards: list[str] = []
    for stage in stages:
        comparison = stage.summary.get("comparison")
        if comparison:
            cards += [_wide(accuracy_table(comparison)), _wide(accuracy_bars(comparison))]
        cards += [_wide(rejection_table(stage)), _wide(cost_table(stage.summary.get("cost") or {}))]
        obeyed = [
            (name, float(stage.summary[key]))
            for name, key in (("told to think", "thinking_obeyed"), ("told not to", "direct_obeyed"))
            if key in stage.summary
        ]
        if obeyed:
            bars = [("obeyed", [share for _, share in obeyed])]
            cards.append(bar_chart([name for name, _ in obeyed], bars, title="One model, two modes", percent=True))
        loss = column(stage.rows, "step", "loss")
        if loss:
            line = Series("student", loss, smooth=window(loss))
            cards.append(line_chart([line], title="Student's SFT loss", y_label="nats/token", log_y=True))
    text = (
        "The experts' verified answers teach one model, from the base, to think or, on /nothink, to answer at once. "
        "Accuracy is greedy, on problems that nobody was trained on."
    )
    return section("Distillation into one hybrid model", text, cards)


def accuracy_table(comparison: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One row a model, one column a domain: accuracy, and below it how often it thought and how much it wrote."""
    domains = list(dict.fromkeys(domain for row in comparison.values() for domain in row))
    head = "".join(f'<th class="num">{escape(domain)}</th>' for domain in domains)
    rows = "".join(
        f'<tr><td class="name">{escape(model)}</td>'
        + "".join(f'<td class="num">{_cell(row[domain]) if domain in row else ""}</td>' for domain in domains)
        + "</tr>"
        for model, row in comparison.items()
    )
    return f"<h3>Held-out accuracy</h3><table><tr><th>Model</th>{head}</tr>{rows}</table>"


def _cell(cell: Mapping[str, float]) -> str:
    beside = f"{cell['thinking']:.0%} thought, {cell['tokens']:.0f} tokens"
    return f'<b>{cell["accuracy"]:.1%}</b><br><span class="kv"><i>{beside}</i></span>'


def accuracy_bars(comparison: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Domains as groups, models as bars."""
    domains = list(dict.fromkeys(domain for row in comparison.values() for domain in row))
    series = [
        (model, [float(row[domain]["accuracy"]) if domain in row else float("nan") for domain in domains])
        for model, row in comparison.items()
    ]
    return bar_chart(domains, series, title="Held-out accuracy by domain", percent=True, width=1100, height=300)


def rejection_table(stage: StageView) -> str:
    """Teacher, filter, how many samples it refused, and one of them."""
    rows = []
    for path in sorted(stage.path.glob("rejections-*.json")):
        teacher = path.stem.removeprefix("rejections-")
        for name, found in read_json(path).items():
            one = found["example"]
            why = f" ({one['detail']})" if one["detail"] else ""
            text = one["reply"] if len(one["reply"]) <= SHOWN else one["reply"][:SHOWN] + " …"
            rows.append(
                f'<tr><td class="name">{escape(teacher)}</td><td>{escape(name.replace("_", " "))}</td>'
                f'<td class="num">{found["count"]}</td><td>{escape(one["prompt"][:SHOWN])}{escape(why)}'
                f'<div class="text">{marked(text)}</div></td></tr>'
            )
    if not rows:
        return ""
    head = '<tr><th>Teacher</th><th>Filter</th><th class="num">Refused</th><th>For example</th></tr>'
    return f"<h3>Rejected samples, in the order of the filters</h3><table>{head}{''.join(rows)}</table>"


def cost_table(cost: Mapping[str, Mapping[str, Any]]) -> str:
    """What sampling each teacher took, over all restarts."""
    rows = "".join(
        f'<tr><td class="name">{escape(teacher)}</td><td class="num">{one["samples"]}</td>'
        f'<td class="num">{number(one["prompt_tokens"])}</td><td class="num">{number(one["tokens"])}</td>'
        f'<td class="num">{duration(one["seconds"])}</td>'
        f'<td class="num">{number(one["tokens_per_second"])}</td></tr>'
        for teacher, one in cost.items()
    )
    titles = ("Samples", "Tokens read", "Tokens written", "Time", "Written a second")
    head = "".join(f'<th class="num">{title}</th>' for title in titles)
    return f"<h3>What sampling took</h3><table><tr><th>Teacher</th>{head}</tr>{rows}</table>" if rows else ""


def _wide(inside: str) -> str:
    return f'<div class="card wide scroll">{inside}</div>' if inside else ""
