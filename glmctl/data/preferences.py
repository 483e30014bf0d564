"""Pairs of a better and a worse conversation, in the shapes of TRL's preference data.

{chosen, rejected, prompt?, tools?, enable_thinking?}: with a prompt, both are what follows it; without, both are whole
conversations. All three are messages or plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmctl import console
from glmctl.data.conversations import Conversation, complaint, conversation_of, source_of
from glmctl.data.reading import BadRows
from glmctl.data.records import records
from glmctl.data.shapes import as_messages, completed
from glmctl.errors import DataError
from glmctl.recipe.schema import ConversationFiles


@dataclass(frozen=True)
class Preference:
    """Two conversations, the first of which is the better one."""

    chosen: Conversation
    rejected: Conversation


def read_preferences(sources: Sequence[str | ConversationFiles], *, bad_rows: float = 0.0) -> list[Preference]:
    """All pairs of `sources` in order; rows that are none are left out and counted.

    RecipeError for a path of nothing; DataError, with counts and the first places, when more than the share
    `bad_rows` of a source's rows are no pairs, or all of them.
    """
    found: list[Preference] = []
    for source in map(source_of, sources):
        rows, kept, bad = 0, len(found), BadRows(limit=bad_rows)
        for place, row in _pairs(source):
            rows += 1
            if isinstance(row, DataError):
                bad.add(row.message, place)
            else:
                found.append(row)
        if bad.total > bad_rows * rows or len(found) == kept:
            if not bad.total:
                raise DataError(f"{source.name}: no pairs in it")
            raise DataError(complaint(bad, rows, what="pairs of conversations"))
        if bad.total:
            console.warn(f"left out: {complaint(bad, rows, what='pairs of conversations')}")
    return found


def preference_of(row: Any) -> Preference:
    """A checked pair from a JSON value. DataError says what is wrong."""
    if not isinstance(row, Mapping):
        raise DataError("not an object")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"no '{key}', which a pair has")
    if row["chosen"] == row["rejected"]:
        raise DataError("chosen and rejected are the same")
    prompt = as_messages(row["prompt"], "user", "prompt") if "prompt" in row else []
    made = []
    for key in ("chosen", "rejected"):
        try:
            messages = prompt + as_messages(row[key], "assistant", key)
            made.append(conversation_of(completed({"messages": messages}, row)))
        except DataError as error:
            raise DataError(f"{key}: {error.message}") from error
    return Preference(*made)


def _pairs(source: ConversationFiles) -> Iterator[tuple[str, Preference | DataError]]:
    for place, row in records(source):
        try:
            if isinstance(row, DataError):
                raise row
            found: Preference | DataError = preference_of(row)
        except DataError as error:
            found = error
        yield place, found
