"""The report's rollouts: what the policy wrote in training, and what became of each reward."""

from __future__ import annotations

from html import escape
from typing import Any

from glmctl.run.metrics import MetricsLog
from glmctl.run.report_samples import marked, row_prompt
from glmctl.run.view import StageView, of_kind

FIRST_AND_LAST = 3
"""rollouts shown of the first and of the last step that has some"""


def rollout_section(stages: list[StageView]) -> str:
    """For each RL stage a card with a few rollouts of its first and last sampled steps."""
    cards = []
    for stage in of_kind(stages, "rl"):
        rows = MetricsLog(stage.path / "trajectories.jsonl").rows()
        steps = sorted({row["step"] for row in rows})
        shown = [row for step in dict.fromkeys(steps[:1] + steps[-1:]) for row in _of_step(rows, step)]
        if shown:
            body = "".join(_rollout(row) for row in shown)
            cards.append(f'<div class="card wide"><h3>{escape(stage.name)}</h3>{body}</div>')
    if not cards:
        return ""
    text = (
        "The first rollouts of the first and the last sampled step. A reward is what the verifier gave, less the "
        "penalty for length; the advantage is what it comes to beside the other samples of its prompt."
    )
    return f'<h2>Rollouts and their rewards</h2><p>{text}</p><div class="grid">{"".join(cards)}</div>'


def _of_step(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["step"] == step][:FIRST_AND_LAST]


def _rollout(row: dict[str, Any]) -> str:
    who = f"step {row['step']} · {row['task']} · {row['stop_reason']}"
    parts = {"reward": row.get("reward"), **(row.get("breakdown") or {}), **(row.get("info") or {})}
    figures = "".join(
        f'<span class="kv"><i>{escape(key)}</i>{escape(_figure(value))}</span>' for key, value in parts.items()
    )
    return (
        f'<div class="sample one"><div class="ask"><span class="who">{escape(who)}</span>'
        f'<div class="text">{escape(row_prompt(row))}</div></div>'
        f'<div><div class="text">{marked(str(row.get("reply", "")))}</div>'
        f"<table><tr><td>{figures}</td></tr></table></div></div>"
    )


def _figure(value: Any) -> str:
    if value is None:
        return "masked"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
