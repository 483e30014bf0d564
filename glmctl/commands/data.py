"""`glmctl data`: text to tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmctl import console
from glmctl.cli import CommandGroup
from glmctl.commands import _stage as stage
from glmctl.errors import DataError, RecipeError

if TYPE_CHECKING:
    from glmctl.data.token_view import Row
    from glmctl.data.tokenizer import Tokenizer
    from glmctl.recipe.schema import ConversationFiles, DataRecipe, PretrainRecipe

app = typer.Typer(cls=CommandGroup, help="Prepare text: a tokenizer, token shards, verifiable problems.", **stage.PLAIN)


class Format(StrEnum):
    """Formats of rows that hold a conversation."""

    auto = "auto"
    messages = "messages"
    prompt_completion = "prompt_completion"
    sharegpt = "sharegpt"
    alpaca = "alpaca"


class LossOn(StrEnum):
    """Which of the assistant's messages are learnt."""

    last_message = "last_message"
    last_turn = "last_turn"
    all_turns = "all_turns"


class Packing(StrEnum):
    """How documents are laid into rows."""

    concat = "concat"
    best_fit = "best_fit"


@app.command()
def prepare(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, help="Processes; default one a core. The shards do not differ."),
    ] = None,
) -> None:
    """Turn text, rows and source trees into token shards: filtered, deduplicated, up-sampled, with a manifest."""
    if workers is not None:
        os.environ["GLMCTL_WORKERS"] = str(workers)
    stage.run_stage("data", recipe, overrides, run, fresh=fresh, dry_run=dry_run)


FormatOption = Annotated[
    Format, typer.Option("--format", help="The rows' format; auto goes by the columns of the first.")
]
ConversationSplit = Annotated[str, typer.Option("--split", help="The split that is read, where there are several.")]


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A data run; a pretrain run; or conversations: a file, a folder, hf:NAME.",
            show_default=False,
        ),
    ],
    find: Annotated[
        str | None, typer.Option("--find", metavar="TEXT", help="Show the way of documents with this in path or text.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most documents that --find shows.")] = 5,
    row: Annotated[
        int,
        typer.Option(
            "--row", min=0, help="The row (or conversation) whose tokens are shown; of a pretrain run: as it trained."
        ),
    ] = 0,
    pretrain_stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="For a pretrain run: the stage that --row counts in.")
    ] = None,
    split: ConversationSplit = "train",
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="For a data run: tokens in a row. Default 512.")
    ] = None,
    packing: Annotated[
        Packing | None, typer.Option("--packing", help="For a data run: how rows are packed. Default concat.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="For conversations: tokenizer and template.")
    ] = None,
    form: FormatOption = Format.auto,
    loss_on: Annotated[LossOn, typer.Option("--loss-on", help="What of a conversation is learnt.")] = LossOn.last_turn,
) -> None:
    """Show why a document was kept or dropped (--find), or a row: its text, tokens, loss mask and borders."""
    if find is not None:
        _show_ways(Path(target), find, limit)
        return
    from glmctl.data import token_view

    if (Path(target) / "recipe.yaml").is_file() or not (tokenizer or Path(target).is_file()):
        recipe = _recipe(Path(target), also=("pretrain",))
        if recipe.type == "pretrain":
            if split != "train" or length is not None or packing is not None:
                raise RecipeError(f"{target}: a pretrain run has its own --split, --length and --packing")
            _show_row(*token_view.row_of_stage(recipe, pretrain_stage, row))
            return
        if pretrain_stage is not None:
            raise RecipeError(f"{target}: --stage is for pretrain runs", hint="name the run that trained on this data")
        packed = token_view.PACKINGS[(packing or Packing.concat).value]
        _show_row(*token_view.row_of_shards(recipe, Path(target), row, split, length or 512, packed))
        return
    if tokenizer is None:
        raise RecipeError(f"{target}: conversations need --tokenizer")
    source = _source(target, split, form)
    _show_row(*token_view.row_of_conversations(source, row, tokenizer, loss_on.value))


@app.command()
def conversations(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Files, datasets folders, hf:NAME.", show_default=False)
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Write the good rows as JSON lines in the one form.")
    ] = None,
    split: ConversationSplit = "train",
    form: FormatOption = Format.auto,
) -> None:
    """Check conversations of any known format: every unusable row with its line, and counts. Exit 3 if there is one."""
    from glmctl.data import conversation_check

    counts, complaints = conversation_check.check([_source(one, split, form) for one in sources], to)
    console.result({**counts, "complaints": complaints}, text="\n".join([*complaints, console.pairs(counts)]))
    if counts["unusable"]:
        raise DataError(f"{counts['unusable']} of {counts['rows']} rows are no conversations")


@app.command()
def stats(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished data run.", show_default=False)],
) -> None:
    """Tokens by domain, lengths of documents, duplicates, and why documents were left out."""
    from glmctl.data import stats as figures

    found = figures.summary(figures.read(run))
    figures.show(found)
    console.result(found, text="")


stage.add_command(
    app,
    "reason",
    "reasoning",
    "Mine questions from text and keep a teacher's reasoning where it ends in the right answer.",
)
stage.add_command(app, "tokenizer", "tokenizer", "Train a byte-level BPE that carries GLM's special tokens.")
stage.add_command(
    app,
    "agentic",
    "agentic",
    "Make agentic SFT data: collect tools, make tasks, play trajectories, keep what all judges pass.",
)
stage.add_command(
    app,
    "problems",
    "problems",
    "Generate verifiable problems: training, held-out, and demonstrations for the cold start.",
)


def _show_ways(run: Path, text: str, limit: int) -> None:
    from glmctl.data.way import Ways, render

    recipe = _recipe(run)
    assert recipe.type == "data", "load has checked the type"
    found = list(Ways(recipe, run / "export").find(text, limit))
    body = {"documents": [asdict(way) for way in found]}
    console.result(body, text=render(found) or f"no document has '{text}' in its path or text")


def _source(given: str, split: str, form: Format) -> ConversationFiles:
    """What the words of a command line name: a path, or a data set of the hub as hf:NAME."""
    from glmctl.recipe.schema import ConversationFiles

    path, dataset = (None, given[3:]) if given.startswith("hf:") else (given, None)
    return ConversationFiles(path=path, dataset=dataset, split=split, format=form.value)


def _recipe(run: Path, also: Sequence[str] = ()) -> DataRecipe | PretrainRecipe:
    """The recipe of a data run, or of a run of the types `also`."""
    from glmctl.recipe.load import load

    file = run / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(
            f"{run}: not a data run (no recipe.yaml)", hint="name the run that `glmctl data prepare` made"
        )
    recipe = load(str(file), expect="data", also=also)
    assert recipe.type == "data" or recipe.type == "pretrain", "load has checked the type"
    return recipe


def _show_row(row: Row, tokenizer: Tokenizer) -> None:
    from glmctl.data import token_view

    if console.is_json():
        console.result(asdict(row))
        return
    if isinstance(row, token_view.Talk):
        console.out(f"── {row.place}, rendered\n{row.text}")
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(token_view.coloured(row, tokenizer), soft_wrap=True)
    else:
        console.out(token_view.plain(row, tokenizer))
