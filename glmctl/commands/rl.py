"""`glmctl rl`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def rl(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    processes: stage.ProcessesOption = 1,
) -> None:
    """Train a model by GRPO on verifiable rewards, with rollouts from our own engine."""
    stage.run_stage("rl", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes)
