"""The report's charts: from each stage's metrics rows and summary to a section of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from glmctl.run.charts import Mark, Point, Series, bar_chart, heat_map, line_chart
from glmctl.run.headline import BESIDE, figure, words
from glmctl.run.view import StageView

Rows = list[dict[str, Any]]


def section(title: str, text: str, charts: Iterable[str]) -> str:
    """A heading, a sentence and a grid of chart cards; nothing when there is no chart."""
    cards = "".join(
        chart if chart.startswith("<div") else f'<div class="card">{chart}</div>' for chart in charts if chart
    )
    return f'<h2>{escape(title)}</h2><p>{escape(text)}</p><div class="grid">{cards}</div>' if cards else ""


def column(rows: Rows, x: str, name: str) -> list[Point]:
    """Points (row[x], row[name]) of the rows that have both."""
    return [
        (float(row[x]), float(row[name]))
        for row in rows
        if isinstance(row.get(x), int | float) and isinstance(row.get(name), int | float)
    ]


def window(points: Sequence[Point]) -> int:
    """How many points the bold line is the mean of: about a twenty-fifth of all."""
    return max(len(points) // 25, 2) if len(points) >= 40 else 0


def _has(*points: Sequence[Point]) -> bool:
    return any(points)


# ----------------------------------------------------------------------------- pretraining


def pretrain_section(stage: StageView) -> str:
    """Loss with the unigram line, MTP loss, rate, balance, and the load of every expert."""
    rows = stage.rows
    x = "tokens" if any("tokens" in row for row in rows) else "step"
    train = column(rows, x, "loss")
    validation = _validation(rows, x)
    if not validation and "validation_loss" in stage.summary and train:
        validation = [("validation", [(train[-1][0], float(stage.summary["validation_loss"]))])]
    unigram = stage.summary.get("unigram_entropy")
    floor = [Mark(float(unigram), f"unigram entropy {float(unigram):.2f}")] if unigram is not None else []
    borders = stage_borders(rows, x)
    mtp, mtp_validation = column(rows, x, "mtp_loss"), column(rows, x, "validation_mtp_loss")
    violation, rate = column(rows, x, "max_vio"), column(rows, x, "lr")
    norm = column(rows, x, "grad_norm")
    charts: list[str] = []
    if train or validation:
        lines = [
            Series("train", train, smooth=window(train)),
            *(Series(name, points, markers=len(points) <= 40) for name, points in validation),
        ]
        loss = line_chart(
            lines,
            title="Loss",
            x_label=x,
            y_label="nats/token",
            references=floor,
            borders=borders,
            width=1100,
            height=330,
        )
        charts.append(f'<div class="card wide">{loss}</div>')
    if _has(mtp, mtp_validation):
        lines = [
            Series("train", mtp, smooth=window(mtp), color=2),
            Series("validation", mtp_validation, markers=True, color=3),
        ]
        charts.append(
            line_chart(lines, title="Second-next token (MTP) loss", x_label=x, y_label="nats/token", borders=borders)
        )
    if rate:
        charts.append(
            line_chart([Series("lr", rate, color=4)], title="Learning rate", x_label=x, zero=True, borders=borders)
        )
    if violation:
        charts.append(
            line_chart(
                [Series("MaxVio", violation, smooth=window(violation), color=5)],
                title="Load imbalance (MaxVio)",
                x_label=x,
                y_label="max load / mean load - 1",
                zero=True,
                borders=borders,
            )
        )
    if norm:
        charts.append(
            line_chart(
                [Series("norm", norm, smooth=window(norm), color=6)], title="Gradient norm", x_label=x, log_y=True
            )
        )
    maps = load_maps(rows, stage.recipe.get("model") or {})
    if maps:
        charts.append(f'<div class="card wide"><div class="grid">{"".join(maps)}</div></div>')
    text = (
        "Training and held-out loss over tokens. The dashed line is what knowing only the frequency of each token "
        "would cost; bias updates, not a loss, keep the experts evenly used."
    )
    return section(f"Pretraining ({stage.name})" if stage.name != "pretrain" else "Pretraining", text, charts)


def stage_borders(rows: Rows, x: str) -> list[Mark]:
    """Where a row's `stage` differs from the row before, the first stage not marked."""
    marks: list[Mark] = []
    before: Any = None
    for row in rows:
        now = row.get("stage")
        if now is None or x not in row:
            continue
        if before is not None and now != before:
            marks.append(Mark(float(row[x]), str(now)))
        before = now
    return marks


def _validation(rows: Rows, x: str) -> list[tuple[str, list[Point]]]:
    """Validation loss as one line for each training stage: every stage has a held-out text of its own."""
    names = list(dict.fromkeys(str(row.get("stage", "")) for row in rows if "validation_loss" in row))
    return [
        (
            f"validation, {name}" if name and len(names) > 1 else "validation",
            column([row for row in rows if str(row.get("stage", "")) == name], x, "validation_loss"),
        )
        for name in names
    ]


def load_maps(rows: Rows, model: Mapping[str, Any]) -> list[str]:
    """Expert load as a multiple of the even share: the first row that has it, and the mean of the last ones."""
    loads = [row["expert_load"] for row in rows if _is_matrix(row.get("expert_load"))]
    if not loads:
        return []
    shape = _shape(loads[-1])
    alike = [load for load in loads if _shape(load) == shape]
    last = alike[-min(10, max(len(alike) // 4, 1)) :]
    mean = [[sum(load[row][col] for load in last) / len(last) for col in range(shape[1])] for row in range(shape[0])]
    first = int(model.get("first_k_dense_replace", 0))
    names = [f"layer {first + index}" for index in range(shape[0])]
    if first + shape[0] > int(model.get("num_hidden_layers", shape[0] + first)):
        # the MTP layer's router comes after the decoder's
        names[-1] = "MTP"
    pictures = [("Expert load at the end", mean)]
    if len(alike) > 1:
        pictures.insert(0, ("Expert load in the first steps", alike[0]))
    return [heat_map(_relative(load), title=title, row_names=names) for title, load in pictures]


def _relative(load_LE: list[list[float]]) -> list[list[float]]:
    return [[value * len(row) / (sum(row) or 1.0) for value in row] for row in load_LE]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)


def _shape(load: list[list[float]]) -> tuple[int, int]:
    return len(load), min(len(row) for row in load)


# ----------------------------------------------------------------------------- after pretraining


def sft_section(stages: list[StageView]) -> str:
    """One loss curve for each SFT stage, together, and their MTP losses."""
    losses = [(stage.name, column(stage.rows, "step", "loss")) for stage in stages]
    mtp = [(stage.name, column(stage.rows, "step", "mtp_loss")) for stage in stages]
    charts = []
    if any(points for _, points in losses):
        lines = [Series(name, points, smooth=window(points)) for name, points in losses]
        charts.append(line_chart(lines, title="SFT loss", y_label="nats/token", log_y=True))
    if any(points for _, points in mtp):
        lines = [Series(name, points, smooth=window(points)) for name, points in mtp]
        charts.append(line_chart(lines, title="SFT second-next token (MTP) loss", y_label="nats/token", log_y=True))
    text = "Loss on assistant tokens and the closing role token only; prompts and tool results are masked."
    return section("Supervised fine-tuning", text, charts)


def rl_section(stages: list[StageView]) -> str:
    """Reward of the rollouts, held-out accuracy, and how the policy behaves."""
    charts: list[str] = []
    for stage in stages:
        tail = f" ({stage.name})" if len(stages) > 1 else ""
        reward = column(stage.rows, "step", "reward_mean")
        heldout = column(stage.rows, "step", "heldout")
        if not heldout and {"heldout_start", "heldout_end"} <= stage.summary.keys():
            end = reward[-1][0] if reward else 1.0
            heldout = [(0.0, float(stage.summary["heldout_start"])), (end, float(stage.summary["heldout_end"]))]
        if _has(reward, heldout):
            lines = [
                Series("rollout reward", reward, smooth=window(reward)),
                Series("held-out accuracy", heldout, markers=True, color=1),
            ]
            title = f"Reward and held-out accuracy{tail}"
            picture = line_chart(lines, title=title, y_label="share of 1", zero=True, width=1100, height=300)
            charts.append(f'<div class="card wide">{picture}</div>')
        for name, title, color in (
            ("entropy", "Entropy of the policy", 2),
            ("tokens_mean", "Tokens in an episode", 3),
            ("clip_fraction", "Clipped share of tokens", 4),
            ("logprob_gap", "Gap between engine and trainer log-probs", 5),
        ):
            points = column(stage.rows, "step", name)
            if any(y for _, y in points):
                line = Series(words(name), points, smooth=window(points), color=color)
                charts.append(line_chart([line], title=f"{title}{tail}", zero=True))
    text = "Groups of samples are rewarded by a verifier and compared within the group (GRPO, no KL term)."
    return section("Reinforcement learning", text, charts)


def eval_section(stages: list[StageView]) -> str:
    """The `<model>/<task>` figures as a table of tasks by models, MTP acceptance among them."""
    cards: list[str] = []
    for stage in stages:
        table: dict[str, dict[str, Any]] = {}
        for key, value in stage.summary.items():
            model, _, task = key.partition("/")
            if task and isinstance(value, bool | int | float):
                table.setdefault(task, {})[model] = value
        if table:
            cards.append(f'<div class="card wide scroll">{_matrix(table)}</div>')
        acceptance = {m: float(v) for m, v in table.get("mtp_acceptance", {}).items()}
        if acceptance:
            bars = [("accepted", list(acceptance.values()))]
            cards.append(bar_chart(list(acceptance), bars, title="MTP drafts accepted, greedy decoding", percent=True))
        main = {task: row for task, row in table.items() if _is_score(task, row)}
        if main:
            models = list(dict.fromkeys(model for row in main.values() for model in row))
            series = [(model, [float(row.get(model, "nan")) for row in main.values()]) for model in models]
            cards.append(bar_chart(list(main), series, title="Scores", percent=True))
    text = "Every model on the same held-out problems, through lm-eval and through our own verifiers."
    return section("Evaluation", text, cards)


def _matrix(table: dict[str, dict[str, Any]]) -> str:
    models = list(dict.fromkeys(model for row in table.values() for model in row))
    head = "".join(f'<th class="num">{escape(model)}</th>' for model in models)
    rows = "".join(
        f"<tr><td>{escape(words(task))}</td>"
        + "".join(
            f'<td class="num">{escape(figure(task, row[model])) if model in row else ""}</td>' for model in models
        )
        + "</tr>"
        for task, row in table.items()
    )
    return f"<table><tr><th>Task</th>{head}</tr>{rows}</table>"


def _is_score(task: str, row: dict[str, Any]) -> bool:
    """Main figures that are shares; what stands beside them (`..._well_formed`) is in the table only."""
    return not task.endswith((*BESIDE, "mtp_acceptance", "mtp_identical")) and all(
        0 <= value <= 1 for value in row.values()
    )
