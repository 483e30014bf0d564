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
    """Make one model out of experts: by rejection sampling, on the student's own samples, or from logits.

    The recipe's type says which: distill, on_policy_distill or logit_distill.
    """
    also = ("on_policy_distill", "logit_distill")
    stage.run_stage("distill", recipe, overrides, run, fresh=fresh, dry_run=dry_run, processes=processes, also=also)
