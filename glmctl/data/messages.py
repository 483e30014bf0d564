"""Messages as a chat template wants them: text as text, arguments as objects, reasoning in its own field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from glmctl.errors import DataError

Message = Mapping[str, Any]


def settled(messages: Sequence[Message], *, split_reasoning: bool = False) -> list[dict[str, Any]]:
    """Copies of messages with arguments as objects and reasoning under `reasoning_content`. DataError if malformed.

    With `split_reasoning`, reasoning that an assistant content carries before `</think>` is moved out of it by
    the template's own rule (encoding hides tags inside contents, so the template could not find it).
    """
    result = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError("a message must be an object with a 'role'")
        copy = dict(message)
        if "reasoning" in copy and not isinstance(copy.get("reasoning_content"), str):
            copy["reasoning_content"] = copy["reasoning"]
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_settled_call(call) for call in copy["tool_calls"]]
        elif "tool_calls" in copy:
            del copy["tool_calls"]
        if split_reasoning and copy["role"] == "assistant" and not isinstance(copy.get("reasoning_content"), str):
            text = text_of(copy.get("content"))
            if "</think>" in text:
                before, after = text.split("</think>", 1)
                copy["reasoning_content"], copy["content"] = before.split("<think>")[-1], after
        result.append(copy)
    return result


def text_of(content: Any) -> str:
    """The text of a message content: a string, a list of text parts, or None. DataError for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise DataError("message content may hold text parts only")
    raise DataError("message content must be a string or a list of text parts")


def _settled_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError("a tool call must be an object")
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise DataError("a tool call needs a function name")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise DataError(f"arguments of {name}: not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"arguments of {name}: must be a JSON object, not {type(arguments).__name__}")
    return {**call, "function": {**cast(Mapping[str, Any], function), "arguments": dict(arguments)}}
