"""The shapes in which others store conversations, each turned into ours: {messages, tools?, enable_thinking?}.

messages            OpenAI's, and TRL's conversational language modelling: {messages, tools?, chat_template_kwargs?}
prompt_completion   TRL's: {prompt, completion}, both text or both messages; only the completion is learnt
sharegpt            {conversations: [{from, value}], system?, tools?}, with LLaMA-Factory's function calls
alpaca              {instruction, input?, output, system?, history?}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from glmctl.errors import DataError

Shape = Literal["messages", "prompt_completion", "sharegpt", "alpaca"]
Row = Mapping[str, Any]

COLUMNS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
"""shape -> the columns it cannot be without, by which it is recognised, in this order"""

_SPEAKERS = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response", "function"), "tool"),
    "function_call": "function_call",
}


def detect(row: Row) -> Shape:
    """The shape that the columns of `row` mean. DataError when they mean none."""
    for shape, columns in COLUMNS.items():
        if all(column in row for column in columns):
            return shape
    known = "; ".join(" + ".join(columns) for columns in COLUMNS.values())
    raise DataError(f"columns {', '.join(map(str, row)) or '(none)'} are of no known format ({known})")


def convert(row: Row, shape: Shape) -> dict[str, Any]:
    """`row` in our shape; its messages are not checked yet. DataError says what keeps it from being one."""
    missing = [column for column in COLUMNS[shape] if column not in row]
    if missing:
        raise DataError(f"no '{missing[0]}', which a {shape} row has")
    return _CONVERTERS[shape](row)


def _messages(row: Row) -> dict[str, Any]:
    return completed({"messages": row["messages"]}, row)


def _prompt_completion(row: Row) -> dict[str, Any]:
    prompt = as_messages(row["prompt"], "user", "prompt")
    # what the prompt has the assistant say is not learnt
    prompt = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
    return completed({"messages": prompt + as_messages(row["completion"], "assistant", "completion")}, row)


def _sharegpt(row: Row) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' must be a non-empty list")
    messages: list[dict[str, Any]] = _system(row)
    for at, turn in enumerate(turns):
        try:
            _append_turn(messages, turn)
        except DataError as error:
            raise DataError(f"conversations[{at}]: {error.message}") from error
    return completed({"messages": messages}, row)


def _alpaca(row: Row) -> dict[str, Any]:
    given, history = row.get("input"), row.get("history")
    wrong = next((name for name in ("instruction", "output") if not isinstance(row[name], str)), None)
    if wrong is not None or not isinstance(given, str | None):
        raise DataError(f"'{wrong or 'input'}' must be text")
    messages = _system(row)
    if not isinstance(history, list | None):
        raise DataError("'history' must be a list of [question, answer]")
    for pair in history or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("'history' must be a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = f"{row['instruction']}\n\n{given}" if given and given.strip() else row["instruction"]
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return completed({"messages": messages}, row)


_CONVERTERS: dict[Shape, Callable[[Row], dict[str, Any]]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _append_turn(messages: list[dict[str, Any]], turn: Any) -> None:
    """Add one ShareGPT turn; a function call joins the assistant's words right before it."""
    if not isinstance(turn, dict):
        raise DataError("not an object")
    speaker = turn.get("from", turn.get("role"))
    said = turn.get("value", turn.get("content"))
    role = _SPEAKERS.get(str(speaker))
    if role is None:
        raise DataError(f"'from' is {speaker!r}, not one of {', '.join(sorted(_SPEAKERS))}")
    if role == "function_call":
        calls = _calls(said)
        if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            messages[-1]["tool_calls"] = calls
        else:
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        return
    kept = {key: turn[key] for key in ("weight", "reasoning_content", "tool_calls") if key in turn}
    messages.append({"role": role, "content": said, **kept})


def _calls(said: Any) -> list[Any]:
    """Tool calls from the JSON text of one or several {name, arguments}."""
    value = _parsed(said, "the function call")
    return [{"type": "function", "function": call} for call in (value if isinstance(value, list) else [value])]


def _system(row: Row) -> list[dict[str, Any]]:
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def as_messages(value: Any, role: str, name: str) -> list[Any]:
    """A list of messages as it is, a text as one message of `role`. DataError, naming `name`, for anything else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return value
    raise DataError(f"'{name}' must be text or a non-empty list of messages")


def completed(found: dict[str, Any], row: Row) -> dict[str, Any]:
    """`found` with the tools (a list or its JSON text) and the switch of thinking that `row` carries."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "'tools'") if tools.strip() else None
    if tools:
        found["tools"] = tools
    options = row.get("chat_template_kwargs")
    thinking = row.get("enable_thinking", options.get("enable_thinking") if isinstance(options, Mapping) else None)
    if thinking is not None:
        found["enable_thinking"] = thinking
    return found


def _parsed(text: Any, what: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: not JSON: {error}") from error
