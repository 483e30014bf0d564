"""`glmctl serve`: a model folder, a run directory or a recipe behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glmctl.commands import _stage as stage
from glmctl.recipe import names

app = typer.Typer(**stage.PLAIN)


@app.command()
def serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A run directory, a model folder, or a recipe.",
            autocompletion=names.complete,
            show_default=False,
        ),
    ],
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port; default 8000, 0 = any free one.")] = None,
    served_name: Annotated[str | None, typer.Option("--served-name", help="The model's name in the API.")] = None,
    max_slots: Annotated[int | None, typer.Option("--max-slots", help="Requests computed at once.")] = None,
    max_queue: Annotated[int | None, typer.Option("--max-queue", help="Requests waiting; more get 429.")] = None,
    speculative: Annotated[int | None, typer.Option("--speculative", help="MTP drafts per step, 0 or 1.")] = None,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Serve a model until Ctrl-C; a recipe with `ask` answers its questions and stops."""
    options: dict[str, tuple[str, Any]] = {
        "host": ("--host", host),
        "port": ("--port", port),
        "served_name": ("--served-name", served_name),
        "max_slots": ("--max-slots", max_slots),
        "max_queue": ("--max-queue", max_queue),
        "speculative": ("--speculative", speculative),
    }
    if names.looks_like_recipe(target):
        words = [f"{key}={value}" for key, (_, value) in options.items() if value is not None]
        stage.run_stage("serve", target, words + (overrides or []), run, fresh=fresh, dry_run=dry_run)
        return
    stage.require_artifact(target)
    from glmctl.recipe.build import build, run_name

    given = {key: value for key, (_, value) in options.items() if value is not None}
    # servers of one model on several ports are several runs
    name = run_name("serve", target, given, overrides)
    recipe = build("serve", {**options, "name": ("name", name), "model": ("MODEL", target)}, overrides)
    stage.drive(recipe, run or stage.default_path(name), fresh=fresh, dry_run=dry_run)
