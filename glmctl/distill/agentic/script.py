"""The teacher that needs no model: it does what a task's script says, with what the tools really return."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from glmctl.errors import DataError, RecipeError
from glmctl.rl.environment import Message, Tool

_PLACE = re.compile(r"\{(\d+)(?:\.(\w+))?\}")


class Script:
    """Follows one task's script: its calls one after another, then its answer.

    `{0}`, `{1}`, ... in an argument or answer are the results of the calls made so far, and `{0.key}` a member of a
    result that is a JSON object, so a script can use what only the tools know.
    """

    def __init__(self, turns: Sequence[dict[str, Any]], where: str) -> None:
        """`turns`: for every user message {calls: [{name, arguments}], answer, reasoning?}."""
        self._turns = turns
        self._where = where

    def reply(self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, thinking: bool, seed: int) -> Message:
        """See `Actor`. RecipeError when the script has no turn for this user message."""
        asked = sum(message["role"] == "user" for message in messages) - 1
        if asked >= len(self._turns):
            raise RecipeError(f"{self._where}: the script ends before user message {asked + 1}")
        turn = self._turns[asked]
        since = max(at for at, message in enumerate(messages) if message["role"] == "user")
        made = sum(message["role"] == "assistant" for message in messages[since:])
        results = [str(message["content"]) for message in messages if message["role"] == "tool"]
        calls = turn.get("calls") or []
        if made < len(calls):
            call = calls[made]
            arguments = filled(call["arguments"], results, self._where)
            said: Message = {"role": "assistant", "content": ""}
            said["tool_calls"] = [{"type": "function", "function": {"name": call["name"], "arguments": arguments}}]
            why = call.get("reasoning") or f"I need {call['name']}."
        else:
            said = {"role": "assistant", "content": filled(turn["answer"], results, self._where)}
            why = turn.get("reasoning") or "I have what was asked for."
        return {**said, "reasoning_content": filled(why, results, self._where)} if thinking else said


def filled(value: Any, results: Sequence[str], where: str) -> Any:
    """`value` with `{n}` and `{n.key}` in its strings replaced by result n, or a member of it. DataError for none."""
    if isinstance(value, dict):
        return {key: filled(one, results, where) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, results, where) for one in value]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> str:
        number, key = int(match[1]), match[2]
        if number >= len(results):
            raise DataError(f"{where}: the script uses result {number} of {len(results)}")
        if key is None:
            return results[number]
        try:
            return str(json.loads(results[number])[key])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: result {number} has no '{key}': {results[number]!r}") from error

    return _PLACE.sub(found, value)
