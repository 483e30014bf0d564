"""`glmctl data`: text to tokens."""

from __future__ import annotations

import typer

from glmctl.cli import CommandGroup
from glmctl.commands import _stage as stage

app = typer.Typer(cls=CommandGroup, help="Prepare text: a tokenizer, token shards, verifiable problems.", **stage.PLAIN)


@app.command()
def prepare(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Turn text, JSON lines and source trees into token shards with a manifest."""
    stage.run_stage("data", recipe, overrides, run, fresh=fresh, dry_run=dry_run)


@app.command()
def tokenizer(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Train a byte-level BPE that carries GLM's special tokens."""
    stage.run_stage("tokenizer", recipe, overrides, run, fresh=fresh, dry_run=dry_run)


@app.command()
def problems(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Generate verifiable problems: training, held-out, and demonstrations for the cold start."""
    stage.run_stage("problems", recipe, overrides, run, fresh=fresh, dry_run=dry_run)
