"""The report's samples: what the model wrote before and after each stage, and the reply it gave over HTTP.

Everything here came out of a model or a file, so every character is escaped before it meets the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from glmctl.run.view import StageView, of_kind

MAX_SAMPLES = 6
"""Prompts shown for each stage; the file holds them all."""
MAX_SIDES = 4
"""Models or modes shown side by side for one prompt."""

_PARTS = re.compile(r"(<think>.*?(?:</think>|\Z))|(<tool_call>.*?(?:</tool_call>|\Z))", re.DOTALL)
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""A young model writes control characters; the page shows their Unicode pictures."""


def sample_section(stages: list[StageView]) -> str:
    """For each stage with samples a card: the prompt, and under it what was written before and after."""
    cards = []
    for stage in stages:
        shown = list(_grouped(stage.samples))[:MAX_SAMPLES] if stage.kind != "serve" else []
        if shown:
            body = "".join(_sample(prompt, rows) for prompt, rows in shown)
            cards.append(f'<div class="card wide"><h3>{escape(stage.name)}</h3>{body}</div>')
    if not cards:
        return ""
    text = "Reasoning is grey, tool calls are coloured. Nothing is picked by hand: the first ones of each file."
    return f'<h2>In its own words</h2><p>{text}</p><div class="grid">{"".join(cards)}</div>'


def reply_section(stages: list[StageView]) -> str:
    """What the served model answered to the official client."""
    cards = []
    for stage in of_kind(stages, "serve"):
        rows = list(stage.samples)
        if not rows and stage.summary.get("reply"):
            rows = [{"prompt": stage.summary.get("asked", ""), "reply": stage.summary["reply"]}]
        body = "".join(_sample(prompt, group) for prompt, group in list(_grouped(rows))[:MAX_SAMPLES])
        cards.append(f'<div class="card wide">{body}</div>' if body else "")
    if not any(cards):
        return ""
    text = "Asked over HTTP with the official openai client."
    return f'<h2>The served reply</h2><p>{text}</p><div class="grid">{"".join(cards)}</div>'


def _grouped(samples: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows with the same prompt together, prompts in order of appearance.

    Of one model's answers over time the first and the last; of several models, or modes, one each.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        groups.setdefault(row_prompt(row), []).append(row)
    for prompt, rows in groups.items():
        sides = {(str(row.get("model")), row.get("thinking")): row for row in rows}
        if len(sides) > 1:
            yield prompt, list(sides.values())[:MAX_SIDES]
        else:
            yield prompt, [rows[0], rows[-1]] if len(rows) > 1 else rows


def row_prompt(row: Mapping[str, Any]) -> str:
    """What was asked: `prompt` (text or messages), else the messages up to the last user turn."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else _asked(row.get("messages"))
    return "\n".join(f"{m.get('content') or ''}" for m in messages if m.get("role") in ("user", None)).strip()


def row_reply(row: Mapping[str, Any]) -> str:
    """What was written: the first of the usual keys, else the messages after the last user turn, rendered.

    A row that keeps `reasoning` and `tool_calls` apart from its `reply` is put together again.
    """
    if isinstance(row.get("reply"), str) and (row.get("reasoning") or row.get("tool_calls")):
        return message_text({**row, "role": "assistant", "content": row["reply"]})
    for key in ("reply", "completion", "text", "response", "output", "sample"):
        value = row.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping):
            return message_text(value)
    messages = row.get("messages")
    if isinstance(messages, list):
        return "\n".join(message_text(m) for m in messages[len(_asked(messages)) :])
    return ""


def _asked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        return []
    last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=-1)
    return messages[: last + 1]


def message_text(message: Mapping[str, Any]) -> str:
    """A message as the model writes it: reasoning in think tags, content, tool calls as JSON in their tags."""
    parts = []
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        parts.append(f"<think>{reasoning}</think>")
    if message.get("content"):
        role = "" if message.get("role") in (None, "assistant") else f"[{message['role']}] "
        parts.append(f"{role}{message['content']}")
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(f"<tool_call>{function.get('name')} {text}</tool_call>")
    return "\n".join(parts)


def _sample(prompt: str, rows: list[dict[str, Any]]) -> str:
    wide = " one" if len(rows) == 1 else ""
    text = f'<span class="who">asked</span><div class="text">{escape(prompt.translate(_CONTROLS))}</div>'
    ask = f'<div class="ask">{text}</div>' if prompt else ""
    replies = "".join(_reply(row, last=len(rows) > 1 and row is rows[-1]) for row in rows)
    return f'<div class="sample{wide}">{ask}{replies}</div>'


def _reply(row: dict[str, Any], *, last: bool) -> str:
    badge = ""
    reward = row.get("reward", row.get("correct"))
    if isinstance(reward, bool | int | float):
        right = float(reward) > 0.5
        badge = f'<i class="badge {"right" if right else "wrong"}">{"right" if right else "wrong"}</i>'
    label = escape(_label(row, last=last))
    return f'<div><span class="who">{label}{badge}</span><div class="text">{marked(row_reply(row))}</div></div>'


def _label(row: Mapping[str, Any], *, last: bool) -> str:
    """The model's name; else `before` and `after`, from the row itself or from its step; else how it was asked."""
    if row.get("model"):
        return str(row["model"])
    if isinstance(row.get("thinking"), bool):
        return "answered" if row["thinking"] else "answered, told /nothink"
    when = str(row.get("when") or "")
    if not when and isinstance(row.get("step"), int):
        when = "before" if row["step"] == 0 else f"after step {row['step']}" if last else f"step {row['step']}"
    who = row.get("teacher")
    return " · ".join(str(part) for part in (when or "answered", who) if part)


def marked(text: str) -> str:
    """The reply as HTML: reasoning and tool calls in spans of their own, everything escaped."""
    text = text.translate(_CONTROLS)
    out, end = [], 0
    for found in _PARTS.finditer(text):
        out.append(escape(text[end : found.start()]))
        css = "think" if found[1] else "call"
        out.append(f'<span class="{css}">{escape(found[0])}</span>')
        end = found.end()
    out.append(escape(text[end:]))
    return "".join(out).strip("\n") if text.strip() else '<span class="none">(nothing)</span>'
