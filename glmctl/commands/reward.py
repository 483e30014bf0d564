"""`glmctl reward`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def reward(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Train a reward model on pairs of a better and a worse conversation."""
    stage.run_stage("reward", recipe, overrides, run, fresh=fresh, dry_run=dry_run)
