"""`glmctl ablate`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def ablate(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    processes: stage.ProcessesOption = 1,
) -> None:
    """Compare variants of a pretraining at equal tokens, each at its own best setting, over several seeds."""
    stage.run_stage("ablation", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes)
