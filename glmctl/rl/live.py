"""A run to look at while it goes: a table of the latest steps on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from glmctl import console

SHOWN = 12
"""steps in the table"""


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """What is shown of one step's metrics, by column."""
    by_task = row.get("reward_by_task") or {}
    sources = " ".join(f"{task} {reward:.3f}" for task, reward in by_task.items())
    found = {
        "step": str(row["step"]),
        "reward": sources if by_task else f"{row['reward_mean']:.3f}",
        "solved": f"{row['pass_rate']:.0%}",
        "tokens": f"{row['tokens_mean']:.0f}",
        "entropy": _figure(row.get("entropy"), ".3f"),
        "clipped": _figure(row.get("clip_fraction"), ".1%"),
        "gap": _figure(row.get("logprob_gap"), ".1e"),
        "stale": str(row.get("staleness", 0)),
        "T": f"{row['temperature']:g}",
        "tok/s": "/".join(_rate(row, part) for part in ("generate", "reward", "train")),
        "held out": _figure(row.get("heldout"), ".1%"),
    }
    if "stage" in row:
        found["stage"] = f"{row['stage']} ({row['pool']})"
    return found


@contextmanager
def live(label: str, total: int, start: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what is called with each step's metrics row."""
    if sys.stderr.isatty() and not console.is_quiet():
        with _table(label, total) as show:
            yield show
        return
    with console.progress(label, total, start=start) as progress:

        def say(row: Mapping[str, Any]) -> None:
            shown: dict[str, float | str] = {k: v for k, v in cells(row).items() if k != "step" and v != "-"}
            progress.advance(1, **shown)

        yield say


@contextmanager
def _table(label: str, total: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    rows: deque[dict[str, str]] = deque(maxlen=SHOWN)
    title = f"{label}: tokens/s are those generated / judged / trained"

    def drawn() -> Table:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(*columns, title=title, title_justify="left", title_style="bold", header_style="bold")
        for row in rows:
            table.add_row(*(row.get(name, "-").replace("[", r"\[") for name in columns))
        return table

    with Live(drawn(), console=Console(stderr=True, highlight=False), auto_refresh=False) as screen:

        def show(row: Mapping[str, Any]) -> None:
            rows.append(cells(row))
            rows[-1]["step"] += f"/{total}"
            screen.update(drawn(), refresh=True)

        yield show


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(row: Mapping[str, Any], part: str) -> str:
    seconds = row.get(f"seconds_{part}", 0.0)
    tokens = row.get("tokens_trained" if part == "train" else "tokens_generated", 0)
    return f"{tokens / seconds:,.0f}" if seconds > 1e-3 else "-"
