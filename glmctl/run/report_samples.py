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
"""Shown for each stage; the file holds them all."""

_PARTS = re.compile(r"(<think>.*?(?:</think>|\Z))|(<tool_call>.*?(?:</tool_call>|\Z))", re.DOTALL)
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""A young model writes control characters; the page shows their Unicode pictures."""
_BEFORE = ("before", "start", "first")


def sample_section(stages: list[StageView]) -> str:
    """For each stage with samples a card: the prompt, and under it what was written before and after."""
    cards = []
    for stage in stages:
        shown = list(_grouped(stage.samples))[:MAX_SAMPLES]
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
        rows = [row for row in stage.samples if row_reply(row)]
        if not rows and stage.summary.get("reply"):
            rows = [{"prompt": stage.summary.get("asked", ""), "reply": stage.summary["reply"]}]
        for row in rows[:MAX_SAMPLES]:
            cards.append(f'<div class="card wide">{_sample(row_prompt(row), [row])}</div>')
    if not cards:
        return ""
    text = "Asked over HTTP with the official openai client."
    return f'<h2>The served reply</h2><p>{text}</p><div class="grid">{"".join(cards)}</div>'


def _grouped(samples: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows with the same prompt together: of those, the earliest and the latest. Prompts in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in samples:
        if row_reply(row):
            groups.setdefault(row_prompt(row), []).append(row)
    for prompt, rows in groups.items():
        yield prompt, [rows[0], rows[-1]] if len(rows) > 1 else rows


def row_prompt(row: Mapping[str, Any]) -> str:
    """What was asked: `prompt` (text or messages), else the messages up to the last user turn."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else _asked(row.get("messages"))
    return "\n".join(f"{m.get('content') or ''}" for m in messages if m.get("role") in ("user", None)).strip()


def row_reply(row: Mapping[str, Any]) -> str:
    """What was written: the first of the usual keys, else the messages after the last user turn, rendered."""
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
    return f'<div class="sample{wide}">{ask}{"".join(_reply(row, len(rows)) for row in rows)}</div>'


def _reply(row: dict[str, Any], count: int) -> str:
    badge = ""
    reward = row.get("reward", row.get("correct"))
    if isinstance(reward, bool | int | float):
        right = float(reward) > 0.5
        badge = f'<i class="badge {"right" if right else "wrong"}">{"right" if right else "wrong"}</i>'
    label = escape(_label(row, count))
    return f'<div><span class="who">{label}{badge}</span><div class="text">{marked(row_reply(row))}</div></div>'


def _label(row: Mapping[str, Any], count: int) -> str:
    """`before`, `after`, `step 40` or `answered`, with the model's name where the row has one."""
    when = str(row.get("when") or row.get("phase") or "")
    if not when and isinstance(row.get("step"), int):
        when = f"step {row['step']}"
    if not when:
        when = "answered" if count == 1 else "written"
    if when in _BEFORE:
        when = "before"
    who = row.get("model") or row.get("teacher") or row.get("task")
    return f"{when} · {who}" if who else when


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
