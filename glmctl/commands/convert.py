"""`glmctl convert`: run checkpoint to Hugging Face folder, or back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError
from glmctl.recipe import names

app = typer.Typer(**stage.PLAIN)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC|RECIPE",
            help="A run directory, a checkpoint, a model folder, or a recipe.",
            autocompletion=names.complete,
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The folder to write.", show_default=False)
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
    if names.looks_like_recipe(source):
        if destination is not None:
            raise GlmctlError(f"'{source}' is a recipe; its result goes to the run directory, which --run names")
        words = [f"{key}={value}" for key, (_, value) in options.items() if value is not None]
        stage.run_stage("convert", source, words + (overrides or []), run, fresh=fresh, dry_run=dry_run)
        return
    if destination is None:
        raise GlmctlError("missing argument 'DST': the folder to write", hint="`glmctl convert --help`")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise GlmctlError(f"{destination}: exists already; convert writes a new folder")
    stage.require_artifact(source)
    from glmctl.recipe.build import build, run_name

    given = {key: value for key, (_, value) in options.items() if value is not None}
    name = run_name("convert", source, given, overrides)
    recipe = build("convert", {**options, "name": ("name", name), "source": ("SRC", source)}, overrides)
    path = run or stage.default_path(name)
    if dry_run:
        stage.show(recipe, path)
        return
    summary = stage.execute(recipe, path, fresh=fresh)
    _place(path / "export", destination)
    body = {"name": name, "type": "convert", "destination": str(destination), "run": str(path), "summary": summary}
    shown = console.pairs({"written": str(destination), **summary})
    console.result(body, text=shown, next_command=f"glmctl serve {destination}" if to != "checkpoint" else None)


def _place(export: Path, destination: Path) -> None:
    """Give the run's export the name that was asked for, at once. Weights are shared with the run, not copied."""
    from glmctl.run import atomic

    with atomic.publish(destination) as folder:
        for file in sorted(path for path in export.rglob("*") if path.is_file()):
            target = folder / file.relative_to(export)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors" and file.stat().st_dev == folder.stat().st_dev:
                os.link(file, target)
            else:
                shutil.copyfile(file, target)
