"""`glmctl rl`."""

from __future__ import annotations

from typing import Annotated

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
    unsafe_no_sandbox: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Run code that the model writes without isolation.")
    ] = False,
) -> None:
    """Train a model by GRPO on verifiable rewards, with rollouts from our own engine."""
    if unsafe_no_sandbox:
        overrides = [*(overrides or []), "sandbox.level=unsafe-none"]
    stage.run_stage("rl", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes)
