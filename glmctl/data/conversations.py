"""Conversations as JSON lines: {"messages": [...], "tools": [...], "enable_thinking": true}.

Messages have OpenAI's shape. An assistant message may carry `reasoning_content`; the arguments of a tool call are an
object or its JSON text. Keys that are not known here (an id, say) are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmctl.data.chat import text_of
from glmctl.data.reading import numbered_lines, open_maybe_packed
from glmctl.errors import DataError, RecipeError

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


def read_conversations(paths: Sequence[str | Path]) -> list[Conversation]:
    """All conversations of JSON lines files (optionally .gz), in order.

    RecipeError for a missing file; DataError "file:line: what" for the first line that is not a conversation.
    """
    return [conversation for path in paths for conversation in _read(Path(path))]


def _read(path: Path) -> Iterator[Conversation]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    with open_maybe_packed(path) as stream:
        for number, line in numbered_lines(stream):
            if line is not None and not line.strip():
                continue
            try:
                if line is None:
                    raise DataError("the line is longer than 16 MB")
                yield conversation_of(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error
            except DataError as error:
                raise DataError(f"{path}:{number}: {error.message}") from error


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
