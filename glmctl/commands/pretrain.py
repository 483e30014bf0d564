"""`glmctl pretrain`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def pretrain(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    processes: stage.ProcessesOption = 1,
) -> None:
    """Pretrain (and mid-train) a model from token shards; an interrupted run continues exactly where it was."""
    stage.run_stage("pretrain", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes)
