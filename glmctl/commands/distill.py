"""`glmctl distill`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def distill(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    processes: stage.ProcessesOption = 1,
) -> None:
    """Rejection-sample experts and train one hybrid model on what they got right."""
    stage.run_stage("distill", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes)
