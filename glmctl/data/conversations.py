"""Conversations: {"messages": [...], "tools": [...], "enable_thinking": true}, the one form inside the house.

Messages have OpenAI's shape. An assistant message may carry `reasoning_content`, and `weight` 0 when it is not to be
learnt; the arguments of a tool call are an object or its JSON text. Keys that are not known here (an id, say) are
passed over. Files may hold other shapes, see `shapes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.data.messages import text_of
from glmctl.data.reading import BadRows
from glmctl.data.records import records
from glmctl.data.shapes import convert, detect
from glmctl.errors import DataError
from glmctl.recipe.schema import ConversationFiles

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """One conversation, its last message an assistant's."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool = True

    def row(self) -> dict[str, Any]:
        """As a JSON line holds it."""
        row: dict[str, Any] = {"messages": self.messages}
        if self.tools:
            row["tools"] = self.tools
        return row | {"enable_thinking": self.enable_thinking}


def conversations(source: ConversationFiles) -> Iterator[tuple[str, Conversation | DataError]]:
    """(place, conversation) of every row of `source`; for a row that is none, the DataError that says why.

    The format "auto" is that of the first readable row. Errors of the source as a whole are raised as by `records`.
    """
    shape = None if source.format == "auto" else source.format
    for place, row in records(source):
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError("not an object")
            shape = shape or detect(row)
            found: Conversation | DataError = conversation_of(convert(row, shape))
        except DataError as error:
            found = error
        yield place, found


def read_conversations(
    sources: Sequence[str | Path | ConversationFiles], *, bad_rows: float = 0.0
) -> list[Conversation]:
    """All conversations of `sources` (a string is a path), in order; rows that are none are left out and counted.

    RecipeError for a path of nothing; DataError, with counts and the first places, when more than the share
    `bad_rows` of a source's rows are no conversations, or all of them.
    """
    found: list[Conversation] = []
    for source in map(source_of, sources):
        rows, kept, bad = 0, len(found), BadRows(limit=bad_rows)
        for place, row in conversations(source):
            rows += 1
            if isinstance(row, DataError):
                bad.add(row.message, place)
            else:
                found.append(row)
        if bad.total > bad_rows * rows or (bad.total and len(found) == kept):
            hint = f"`glmctl data conversations {source.name}` lists them all"
            raise DataError(complaint(bad, rows), hint=hint)
        if bad.total:
            console.warn(f"left out: {complaint(bad, rows)}")
    return found


def complaint(bad: BadRows, rows: int, *, what: str = "conversations") -> str:
    """One line: the first place and what is wrong there, then the other kinds with their counts."""
    (kind, places), *others = bad.places.items()
    shown = [f"{places[0]}: {kind}"]
    shown += [f"{bad.kinds[other]} x {other} (first: {at[0]})" for other, at in others[:3]]
    more = f", {len(others) - 3} more kinds" if len(others) > 3 else ""
    return f"{'; '.join(shown)}{more}; {bad.total} of {rows} rows are no {what}"


def source_of(given: str | Path | ConversationFiles) -> ConversationFiles:
    """The source that a recipe's entry means."""
    return ConversationFiles(path=str(given)) if isinstance(given, str | Path) else given


def conversation_of(row: Any) -> Conversation:
    """A checked conversation from a JSON value. DataError says what is wrong."""
    if not isinstance(row, dict):
        raise DataError("not an object")
    messages, tools, thinking = row.get("messages"), row.get("tools"), row.get("enable_thinking", True)
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a non-empty list")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("'tools' must be a list of objects")
    if not isinstance(thinking, bool):
        raise DataError("'enable_thinking' must be true or false")
    for at, message in enumerate(messages):
        try:
            _check_message(message)
        except DataError as error:
            raise DataError(f"messages[{at}]: {error.message}") from error
    if messages[-1]["role"] != "assistant":
        raise DataError("the last message must be the assistant's")
    if all(message.get("weight", 1) == 0 for message in messages if message["role"] == "assistant"):
        raise DataError("every assistant message has weight 0, so there is nothing to learn")
    last_user = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if not thinking and any(str(m.get("reasoning_content") or "").strip() for m in messages[last_user + 1 :]):
        raise DataError("enable_thinking is false, but the last turn has reasoning_content")
    return Conversation(messages, tools or None, thinking)


def _check_message(message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError("not an object")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"role {role!r} is not one of {', '.join(ROLES)}")
    text_of(message.get("content"))
    if role != "assistant":
        if message.get("content") is None:
            raise DataError(f"a {role} message needs content")
        return
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise DataError("'reasoning_content' must be text")
    if message.get("weight", 1) not in (0, 1):
        raise DataError("'weight' must be 0 or 1")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError("'tool_calls' must be a list")
    for call in calls:
        check_call(call)
    if not calls and not text_of(message.get("content")).strip():
        raise DataError("an assistant message needs content or tool calls")


def check_call(call: Any) -> None:
    """DataError unless `call` is a tool call with a name and an object of arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError("a tool call needs a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"arguments of {function['name']}: not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise DataError(f"arguments of {function['name']}: must be a JSON object")
