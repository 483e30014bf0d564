"""What a run shows while it goes."""

from __future__ import annotations

import io

import rich.console

from glmctl import console
from glmctl.rl import live

ROW = {
    "step": 7, "reward_mean": 0.5, "reward_by_task": {"arithmetic": 0.25, "code": 0.75}, "pass_rate": 0.8,
    "tokens_mean": 31.6, "entropy": 0.4321, "clip_fraction": 0.0123, "logprob_gap": 2.5e-6, "staleness": 1,
    "temperature": 1.2, "tokens_generated": 4000, "tokens_trained": 6000, "seconds_generate": 2.0,
    "seconds_reward": 0.5, "seconds_train": 3.0, "heldout": 0.615, "stage": "hard", "pool": 42,
}  # fmt: skip

CELLS = {
    "step": "7", "reward": "arithmetic 0.250 code 0.750", "solved": "80%", "tokens": "32", "entropy": "0.432",
    "clipped": "1.2%", "gap": "2.5e-06", "stale": "1", "T": "1.2", "tok/s": "2,000/8,000/2,000", "held out": "61.5%",
    "stage": "hard (42)",
}  # fmt: skip


def test_a_steps_figures() -> None:
    assert live.cells(ROW) == CELLS
    without = {key: value for key, value in ROW.items() if key not in ("entropy", "clip_fraction", "heldout", "stage")}
    shown = live.cells(without | {"seconds_reward": 0.0})
    assert (shown["entropy"], shown["clipped"], shown["held out"], shown["tok/s"]) == ("-", "-", "-", "2,000/-/2,000")
    assert "stage" not in shown


def test_lines_where_nobody_looks(capsys, monkeypatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with live.live("rl", 10, 6) as show:
        show(ROW)
    said = capsys.readouterr().err
    assert "7/10" in said
    assert "reward arithmetic 0.250 code 0.750" in said
    assert "stage hard (42)" in said


def test_a_table_of_the_latest_steps_on_a_terminal(monkeypatch) -> None:
    screen = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda **_: real(file=screen, force_terminal=True, width=160, highlight=False)
    )
    with live._table("run", 50) as show:
        for step in range(1, 20):
            show(ROW | {"step": step})
    last = screen.getvalue().split("held out")[-1]
    assert "19/50" in last
    assert "8/50" in last
    assert "7/50" not in last.replace("17/50", "")
