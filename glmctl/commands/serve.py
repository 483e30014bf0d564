"""`glmctl serve`: a model folder, a run directory or a recipe behind an OpenAI-compatible API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError
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
    speculative: Annotated[int | None, typer.Option("--speculative", help="MTP drafts per step, 0 to 3.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Prompt plus answer, in tokens.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Refuse request fields that nobody knows.")] = None,
    api_key_file: Annotated[str | None, typer.Option("--api-key-file", help="Mode 0600; else GLMCTL_API_KEY.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="glmctl, or vllm or sglang where installed.")] = "glmctl",
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
        "max_length": ("--max-length", max_length),
        "strict": ("--strict", strict or None),
        "api_key_file": ("--api-key-file", api_key_file),
    }
    if engine != "glmctl":
        if names.looks_like_recipe(target):
            raise GlmctlError(f"--engine {engine} serves a run directory or a model folder, not a recipe")
        stage.require_artifact(target)
        _other_engine(engine, target, options, overrides, dry_run)
        return
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


def _other_engine(
    engine: str, target: str, options: dict[str, tuple[str, Any]], overrides: list[str] | None, dry_run: bool
) -> None:
    """Print the other engine's command line, and become it unless this is a dry run."""
    import os
    import shlex

    from glmctl import console
    from glmctl.recipe.build import build
    from glmctl.recipe.schema import ServeRecipe
    from glmctl.serving.external import command, environment

    recipe = build("serve", {**options, "name": ("name", "serve"), "model": ("MODEL", target)}, overrides)
    assert isinstance(recipe, ServeRecipe)
    words = command(engine, recipe)
    console.result({"command": words}, text=shlex.join(words))
    if not dry_run:
        try:
            os.execvpe(words[0], words, environment(engine, recipe))
        except OSError as error:
            raise GlmctlError(f"{words[0]}: {error.strerror}", hint=f"install {engine}, or see --dry-run") from error
