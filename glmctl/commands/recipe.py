"""`glmctl recipe`: what can be run, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glmctl import console
from glmctl.cli import CommandGroup
from glmctl.commands import _stage as stage
from glmctl.errors import RecipeError
from glmctl.recipe import names

app = typer.Typer(cls=CommandGroup, help="List, show and check recipes.", **stage.PLAIN)


@app.command("list")
def list_(kind: Annotated[str | None, typer.Option("--type", help="Only recipes of this type.")] = None) -> None:
    """List the shipped recipes."""
    from glmctl.errors import unknown
    from glmctl.recipe.load import list_recipes

    if kind is not None and kind not in names.COMMANDS:
        raise unknown("recipe type", kind, names.COMMANDS)
    entries = [entry for entry in list_recipes() if kind in (None, entry.type)]
    console.table("", ["name", "type", "what"], [[e.name, e.type, e.description] for e in entries])
    body = [{"name": e.name, "type": e.type, "description": e.description, "path": str(e.path)} for e in entries]
    console.result({"recipes": body}, text="")


@app.command()
def show(recipe: stage.RecipeArgument, overrides: stage.SetOption = None) -> None:
    """Print a recipe as resolved (extends, presets, --set), with what follows from it."""
    from glmctl.recipe.load import load

    resolved = load(recipe, overrides or ())
    stage.show(resolved, stage.default_path(resolved.name))


@app.command()
def check(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...", help="Names or .yaml paths.", autocompletion=names.complete, show_default=False
        ),
    ],
) -> None:
    """Check recipes; every faulty one gets its line on stderr."""
    from glmctl.recipe.load import load
    from glmctl.recipe.schema import PipelineRecipe

    faults: list[RecipeError] = []
    for name in recipes:
        try:
            loaded = load(name)
            if isinstance(loaded, PipelineRecipe):
                # nothing is run or written: placeholders are checked against the names of earlier stages
                from glmctl.run.pipeline import resolve

                resolve(loaded, Path("."), load)
        except RecipeError as error:
            faults.append(error)
    for fault in faults[:-1]:
        console.error(fault.kind, fault.message, fault.hint, fault.exit_code, final=False)
    if faults:
        raise faults[-1]
    console.result({"checked": recipes}, text=f"{len(recipes)} ok")


@app.command()
def schema(kind: Annotated[str | None, typer.Argument(metavar="[TYPE]", show_default=False)] = None) -> None:
    """Print the JSON Schema of one recipe type, or of all, for your editor."""
    from glmctl.recipe.load import schema_json

    print(schema_json(kind))
