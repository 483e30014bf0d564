"""The report's part on reward models, on-policy and logit distillation."""

from __future__ import annotations

from glmctl.run.charts import Series, line_chart
from glmctl.run.report_charts import column, section, window
from glmctl.run.view import StageView


def reward_section(stages: list[StageView]) -> str:
    """Loss of the pairs, and how many of them were in order, trained and held out."""
    charts = []
    for stage in stages:
        loss = column(stage.rows, "step", "loss")
        if not loss:
            continue
        charts.append(
            line_chart([Series(stage.name, loss, smooth=window(loss))], title="Loss of a pair", y_label="nats")
        )
        trained, heldout = (column(stage.rows, "step", name) for name in ("accuracy", "heldout_accuracy"))
        lines = [
            Series("trained pairs", trained, smooth=window(trained)),
            Series("held-out pairs", heldout, markers=True, color=1),
        ]
        charts.append(line_chart(lines, title="Pairs in order", y_label="share of 1", zero=True))
    text = "A conversation's score is read off its last token; the better one of a pair is to score higher."
    return section("Reward model", text, charts)


def on_policy_section(stages: list[StageView]) -> str:
    """Reverse KL to the teachers, and the student's held-out accuracy beside each teacher's."""
    charts = []
    for stage in stages:
        divergence = column(stage.rows, "step", "loss")
        if not divergence:
            continue
        line = Series(stage.name, divergence, smooth=window(divergence))
        charts.append(line_chart([line], title="Reverse KL on the student's samples", y_label="nats/token", zero=True))
        names = [key.removesuffix("_teacher") for key in stage.summary if key.endswith("_teacher")]
        lines = []
        for number, name in enumerate(names):
            points = column(stage.rows, "step", f"{name}_student")
            level = [(points[0][0], float(stage.summary[f"{name}_teacher"]))] if points else []
            level += [(points[-1][0], level[0][1])] if points else []
            lines.append(Series(f"{name}, student", points, markers=True, color=2 * number))
            lines.append(Series(f"{name}, teacher", level, color=2 * number + 1))
        if lines:
            charts.append(line_chart(lines, title="Held-out accuracy", y_label="share of 1", zero=True))
    text = "The student answers, the teacher says how likely it would have written each of those tokens."
    return section("On-policy distillation", text, charts)


def logit_section(stages: list[StageView]) -> str:
    """The divergence from the teacher on given text."""
    losses = [(stage.name, column(stage.rows, "step", "loss")) for stage in stages]
    lines = [Series(name, points, smooth=window(points)) for name, points in losses if points]
    charts = [line_chart(lines, title="KL to the teacher", y_label="nats/token", zero=True)] if lines else []
    return section("Logit distillation", "The whole distribution over each next token is taught.", charts)
