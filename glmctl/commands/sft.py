"""`glmctl sft`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


@app.command()
def sft(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    processes: stage.ProcessesOption = 1,
) -> None:
    """Fine-tune a model on conversations; loss falls on assistant tokens only."""
    stage.run_stage("sft", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes)
