"""Runs side by side: what the registry lists, and that curves are drawn where their numbers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmctl.errors import DataError, RecipeError
from glmctl.run.compare import (
    MAX_COLUMNS,
    ROWS,
    curve,
    find_runs,
    html_page,
    named,
    open_run,
    recipe_differences,
    summary_rows,
    terminal_chart,
)


def make(path: Path, losses: list[float], lr: float = 0.01) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(f"type: pretrain\nname: {path.name}\nschedule: {{peak_lr: {lr}}}\n")
    summary = {"validation_loss": losses[-1] if losses else 0.0}
    (path / "status.json").write_text(json.dumps({"state": "finished", "summary": summary, "seconds": 5.0}))
    rows = [{"step": i + 1, "tokens": 100 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_registry_lists_runs_and_stages_but_nothing_moved_aside(tmp_path: Path) -> None:
    make(tmp_path / "a", [1.0])
    make(tmp_path / "demo" / "pretrain", [1.0])
    make(tmp_path / "a.old-1", [1.0])
    assert [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)] == ["a", "demo/pretrain"]
    assert find_runs(tmp_path / "absent") == []
    assert open_run("demo/pretrain", tmp_path).name == "pretrain"
    assert open_run(str(tmp_path / "a"), Path("elsewhere")).name == "a"
    with pytest.raises(RecipeError, match="did you mean 'demo/pretrain'"):
        open_run("demo/pretrian", tmp_path)


def test_curves_share_one_scale(tmp_path: Path) -> None:
    """A falling line touches the top left and the bottom right; a flat low one stays at the bottom."""
    falling, flat = [3.0 - 2.0 * i / 199 for i in range(200)], [1.0] * 200
    views = [open_run(str(make(tmp_path / n, v)), tmp_path) for n, v in (("falling", falling), ("flat", flat))]
    curves = {name: curve(view, "loss", "tokens") for name, view in named(views).items()}
    assert curves["falling"][0] == (100.0, 3.0)
    first, second = terminal_chart(curves, x_label="tokens", y_label="loss", width=80).split("\n\n")
    rows = [line.split("|", 1)[1] for line in first.splitlines()[1 : ROWS + 1]]
    assert all(len(row) == MAX_COLUMNS for row in rows)
    assert rows[0][0] != "\u2800"
    assert rows[-1][-1] != "\u2800"
    assert rows[0][-1] == rows[-1][0] == "\u2800"
    assert all(set(line.split("|", 1)[1]) == {"\u2800"} for line in second.splitlines()[1:ROWS])
    # where there is room, the same frames side by side
    for width, abreast in ((100, 2), (300, 2), (81, 2), (80, 1)):
        lines = terminal_chart(curves, x_label="tokens", y_label="loss", width=width).splitlines()
        assert lines[1].count("|") == abreast
        assert max(map(len, lines)) <= width
    assert "flat: loss over tokens, last 1" in terminal_chart(curves, x_label="tokens", y_label="loss", width=100)
    with pytest.raises(DataError, match="loss, step, tokens"):
        curve(views[0], "los", "step")


def test_figures_recipes_and_page(tmp_path: Path) -> None:
    views = [
        open_run(str(make(tmp_path / n, [2.0, v], lr)), tmp_path) for n, v, lr in (("a", 1.5, 0.1), ("b", 1.25, 0.2))
    ]
    assert summary_rows(views) == [["validation loss", "1.5", "1.25"]]
    assert recipe_differences(views) == ["b: schedule.peak_lr: 0.1 -> 0.2"]
    page = html_page(views, {v.name: curve(v, "loss", "step") for v in views}, "loss", "step")
    assert page.count("<svg") == 1
    assert "schedule.peak_lr" in page
    assert "http" not in page.replace("http://www.w3.org/", "")
