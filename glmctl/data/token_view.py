"""One row of training tokens as a person can read it: every token, what is learnt, where documents begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glmctl.data.batches import IGNORE, Batch, PretrainBatches
from glmctl.data.chat import ChatTemplate, LossOn
from glmctl.data.conversations import conversations
from glmctl.data.packing import stage_seed
from glmctl.data.shards import TokenShards
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, RecipeError, unknown

if TYPE_CHECKING:
    from glmctl.recipe.schema import ConversationFiles, DataRecipe, PretrainRecipe

PACKINGS: dict[str, Literal["concat", "best_fit"]] = {"concat": "concat", "best_fit": "best_fit"}

_COLOURS = ("on grey15", "on grey30")
_LINE_END = "⏎"


@dataclass(frozen=True)
class Row:
    """One row. All lists have one entry a token."""

    tokens: Sequence[int]
    documents: Sequence[int]
    """number of the document within the row, -1 on padding"""
    positions: Sequence[int]
    learnt: Sequence[bool]
    """whether the loss has this token as a target"""


def row_of(batch: Batch, index: int = 0) -> Row:
    """Row `index` of a batch. A token is learnt when it is the target of the one before it."""
    targets = batch.targets_BT[index].tolist()
    return Row(
        batch.tokens_BT[index].tolist(),
        batch.documents_BT[index].tolist(),
        batch.positions_BT[index].tolist(),
        [False, *(target != IGNORE for target in targets[:-1])],
    )


def row_of_shards(
    recipe: DataRecipe, run: Path, row: int, split: str, length: int, packing: Literal["concat", "best_fit"]
) -> tuple[Row, Tokenizer]:
    """A prepared split packed into rows in an order by the data recipe's seed: its row `row`, and its tokenizer.

    A training has an order of its own; see `row_of_stage`.
    """
    shards, tokenizer = _opened(run, split, recipe.tokenizer)
    return row_of(PretrainBatches(shards, length, packing, seed=recipe.seed).batch(row, 1)), tokenizer


def row_of_stage(recipe: PretrainRecipe, name: str | None, row: int) -> tuple[Row, Tokenizer]:
    """Row `row` of a stage as a run of `recipe` sees it (`first_sequence` counts these rows), and its tokenizer.

    RecipeError when there is no stage of that name, or no name and several stages.
    """
    names = [stage.name for stage in recipe.stages]
    if name is None and len(names) > 1:
        raise RecipeError(f"{recipe.name}: --stage is missing; one of: {', '.join(names)}")
    if name is not None and name not in names:
        raise unknown("stage", name, names, where=recipe.name)
    place = 0 if name is None else names.index(name)
    stage = recipe.stages[place]
    shards, tokenizer = _opened(Path(stage.data), "train", recipe.tokenizer)
    batches = PretrainBatches(shards, stage.sequence_length, stage.packing, seed=stage_seed(recipe.seed, place))
    return row_of(batches.batch(row, 1)), tokenizer


def _opened(data: Path, split: str, tokenizer_folder: str) -> tuple[TokenShards, Tokenizer]:
    shards = TokenShards.open(data, split)
    tokenizer = Tokenizer.load(tokenizer_folder)
    shards.require_tokenizer(tokenizer.hash)
    return shards, tokenizer


@dataclass(frozen=True)
class Talk(Row):
    """A conversation as SFT learns it: each example of it (`ChatTemplate.encode_examples`) is a document of the row."""

    place: str
    """`file:line` (or `name:row`) it was read from"""
    text: str
    """rendered, without what closes the last turn"""


def row_of_conversations(source: ConversationFiles, row: int, folder: Path, loss_on: LossOn) -> tuple[Talk, Tokenizer]:
    """Row `row` (from 0) of `source` as SFT would learn it, by tokenizer and template of `folder`.

    RecipeError when there are not so many rows; DataError when that row is no conversation, or teaches nothing.
    """
    template = ChatTemplate.load(folder)
    count = 0
    for count, (place, talk) in enumerate(conversations(source), start=1):
        if count <= row:
            continue
        if isinstance(talk, DataError):
            raise DataError(f"{place}: {talk.message}")
        thinking = talk.enable_thinking
        try:
            made = template.encode_examples(talk.messages, talk.tools, enable_thinking=thinking, loss_on=loss_on)
        except DataError as error:
            raise DataError(f"{place}: {error.message}", hint=error.hint) from error
        shown = Talk(
            tokens=[token for one in made for token in one.tokens],
            documents=[number for number, one in enumerate(made) for _ in one.tokens],
            positions=[position for one in made for position in range(len(one.tokens))],
            # the first token of an example is nobody's target
            learnt=[at > 0 and bool(mask) for one in made for at, mask in enumerate(one.loss_mask)],
            place=place,
            text=template.render(talk.messages, talk.tools, enable_thinking=thinking),
        )
        return shown, template.tokenizer
    raise RecipeError(f"{source.name}: --row {row}, but it has {count} rows")


def plain(row: Row, tokenizer: Tokenizer) -> str:
    """The row without colours: tokens apart by `·`, those that are not learnt between ‹ and ›."""
    parts: list[str] = []
    for head, stretch in _documents(row):
        shown: list[str] = []
        for token, learnt in stretch:
            text = _visible(tokenizer, token)
            shown.append(text if learnt else f"‹{text}›")
        parts.append(f"{head}\n{'·'.join(shown)}")
    return "\n".join(parts)


def coloured(row: Row, tokenizer: Tokenizer) -> Any:
    """The row as a rich Text: neighbouring tokens in two shades, specials bold, what is not learnt dim."""
    from rich.text import Text

    text = Text()
    special = set(tokenizer.added_tokens.values())
    for head, stretch in _documents(row):
        text.append(f"{head}\n", "bold cyan")
        for place, (token, learnt) in enumerate(stretch):
            style = _COLOURS[place % 2] + (" bold magenta" if token in special else "") + ("" if learnt else " dim")
            text.append(_visible(tokenizer, token), style)
            if "\n" in tokenizer.decode([token]):
                text.append("\n")
        text.append("\n")
    return text


def _documents(row: Row) -> Iterator[tuple[str, list[tuple[int, bool]]]]:
    """(heading, its tokens with whether each is learnt) of every document of the row; padding is only counted."""
    padding = sum(document < 0 for document in row.documents)
    for document in dict.fromkeys(number for number in row.documents if number >= 0):
        inside = [at for at, number in enumerate(row.documents) if number == document]
        learnt = sum(row.learnt[at] for at in inside)
        first, last = row.positions[inside[0]], row.positions[inside[-1]]
        head = f"── document {document}: {len(inside)} tokens, positions {first} to {last}, {learnt} learnt"
        yield head, [(row.tokens[at], row.learnt[at]) for at in inside]
    if padding:
        yield f"── padding: {padding} tokens", []


def _visible(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token]).replace("\n", _LINE_END).replace("\t", "⇥")
