"""`glmctl study`."""

from __future__ import annotations

import typer

from glmctl import console
from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def study(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Run stages under several settings and seeds and compare them; an interrupted study continues.

    The result is study.html (its plots also as plots/*.svg), study.json, and
    report.html of all stages.
    """
    from glmctl.recipe.load import load
    from glmctl.recipe.schema import StudyRecipe
    from glmctl.run.pipeline import resolve
    from glmctl.run.study import pipeline_of, run_study

    loaded = load(recipe, overrides or (), expect="study")
    assert isinstance(loaded, StudyRecipe)
    path = run or stage.default_path(loaded.name)
    if dry_run:
        stages = resolve(pipeline_of(loaded), path, load)
        rows = [[one.name, one.kind, one.recipe_name] for one in stages]
        console.table(f"{loaded.name}: {len(rows)} stages in {path}", ["stage", "type", "recipe"], rows)
        console.result({"name": loaded.name, "run": str(path), "stages": [one.name for one in stages]}, text="")
        return
    run_study(loaded, path, load, stage.execute, fresh=fresh)
