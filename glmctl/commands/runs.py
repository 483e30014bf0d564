"""`glmctl runs`: what has been run, and runs side by side."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from glmctl import console
from glmctl.cli import CommandGroup
from glmctl.commands import _stage as stage

app = typer.Typer(cls=CommandGroup, help="List, show and compare runs.", **stage.PLAIN)

RootOption = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Where runs lie; default runs (GLMCTL_RUNS).")
]


@app.command("list")
def list_(root: RootOption = None) -> None:
    """List the runs, stages of pipelines included; one that cannot be read is listed as damaged."""
    from glmctl.run.compare import find_runs, overview
    from glmctl.run.headline import sentence

    base = root or stage.default_path("")
    views = [overview(path) for path in find_runs(base)]
    rows, bodies = [], []
    for view, step in views:
        words = "" if view.error else sentence(view.kind, view.summary, 2)
        rows.append([str(view.path.relative_to(base)), view.kind, view.state, console.duration(view.seconds), words])
        body = {"run": str(view.path), "type": view.kind, "state": view.state, "seconds": view.seconds}
        bodies.append({**body, "step": step, "summary": view.summary, **({"error": view.error} if view.error else {})})
    console.table("", ["run", "type", "state", "time", "result"], rows)
    console.result({"runs": bodies}, text="" if views else f"no runs in {base}")


@app.command()
def show(run: str, root: RootOption = None) -> None:
    """Show one run: state, time, figures, last row of its metrics."""
    from glmctl.run.compare import as_json, open_run

    view = open_run(run, root or stage.default_path(""))
    last = {key: value for key, value in (view.rows[-1] if view.rows else {}).items() if not isinstance(value, list)}
    body = {**as_json(view), "last_row": last}
    console.result(body, text=console.pairs(body))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", show_default=False)],
    metric: Annotated[str, typer.Option("--metric", help="Column of metrics.jsonl.")] = "loss",
    x: Annotated[str, typer.Option("--over", help="Column of the horizontal axis, such as tokens.")] = "step",
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
    root: RootOption = None,
) -> None:
    """Draw one metric of several runs on one scale, beside their figures and what their recipes set otherwise."""
    from glmctl.run import atomic
    from glmctl.run import compare as sides

    base = root or stage.default_path("")
    views = sides.named([sides.open_run(name, base) for name in dict.fromkeys(runs)])
    found = list(views.values())
    curves = {name: sides.curve(view, metric, x) for name, view in views.items()}
    if not console.is_json():
        width = shutil.get_terminal_size().columns
        console.out(sides.terminal_chart(curves, x_label=x, y_label=metric, width=width) + "\n")
    console.table("", ["", *views], sides.summary_rows(found))
    changed = sides.recipe_differences(found)
    if html is not None:
        atomic.write_text(html, sides.html_page(found, curves, metric, x))
    body: dict[str, Any] = {"metric": metric, "over": x, "runs": [sides.as_json(v) for v in found], "curves": curves}
    body |= {"recipes_differ": changed, "html": None if html is None else str(html)}
    console.result(body, text="\n".join(changed))
