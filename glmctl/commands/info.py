"""`glmctl info`: architectures side by side, every figure computed from the configs."""

from __future__ import annotations

from typing import Annotated

import typer

from glmctl import console
from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)


def _complete(incomplete: str) -> list[str]:
    from glmctl.recipe import names
    from glmctl.recipe.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)] + names.complete(incomplete)


@app.command()
def info(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Presets (glm-4.5, glm-4.5-air, step-3, kimi-k2, ...), recipes, run directories or model folders.",
            autocompletion=_complete,
            show_default=False,
        ),
    ],
    context: Annotated[
        int, typer.Option("--context", metavar="N", min=1, help="Context length of the FLOPs and the cache.")
    ] = 131072,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """Compare architectures: sizes, attention, experts, FLOPs a token and cache at a context length."""
    from glmctl.recipe import comparison

    figures = {name: comparison.describe(comparison.find_config(name), context) for name in models}
    notes = {name: comparison.NOTES[name] for name in figures if name in comparison.NOTES}
    rows = comparison.table(figures)
    if markdown:
        console.out(comparison.markdown(rows))
    else:
        console.table(f"at a context of {context:,} tokens", rows[0], rows[1:])
    text = "\n".join(["", *(f"{name}: {note}" for name, note in notes.items())]) if notes else ""
    console.result({"context": context, "models": figures, "notes": notes}, text=text)
