"""`glmctl reward`."""

from __future__ import annotations

import typer

from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


stage.add_command(app, "reward", "reward", "Train a reward model on pairs of a better and a worse conversation.")
