"""`glmctl convert`: run checkpoint to Hugging Face folder, or back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError

app = typer.Typer(**stage.PLAIN)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC|RECIPE",
            help="A run directory, a checkpoint, a model folder, or a recipe.",
            autocompletion=stage.names.complete,
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DST]", help="The folder to write.", show_default=False)
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="hf (default) or checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or keep (default).")] = None,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Convert between run checkpoints and Hugging Face folders; every tensor is read back and compared."""
    options: dict[str, tuple[str, Any]] = {"to": ("--to", to), "dtype": ("--dtype", dtype)}
    if stage.names.looks_like_recipe(source):
        if destination is not None:
            raise GlmctlError(f"'{source}' is a recipe; its result goes to the run directory, which --run names")
        words = [f"{key}={value}" for key, (_, value) in options.items() if value is not None]
        stage.run_stage("convert", source, words + (overrides or []), run, fresh=fresh, dry_run=dry_run)
        return
    if destination is None:
        raise GlmctlError("missing argument 'DST': the folder to write", hint="`glmctl convert --help`")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise GlmctlError(f"{destination}: exists already; convert writes a new folder")
