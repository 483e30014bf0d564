"""Questions put to a running server through the official client: what the demo ends with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MAX_TOKENS = 200


@dataclass(frozen=True)
class Question:
    """One chat request. `tools` makes it a tool question; `thinking` off is `/nothink`."""

    prompt: str
    thinking: bool = True
    streamed: bool = False
    tools: list[dict[str, Any]] | None = None
    system: str | None = None


@dataclass(frozen=True)
class Reply:
    """What came back."""

    prompt: str
    thinking: bool
    streamed: bool
    reasoning: str
    reply: str
    tool_calls: list[dict[str, Any]]
    finish_reason: str

    @property
    def text(self) -> str:
        """For a terminal: the calls if there are any, else the answer."""
        calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in self.tool_calls]
        return " ".join([*calls, self.reply]).strip() or "(nothing)"

    def row(self) -> dict[str, Any]:
        """As one row of samples.jsonl."""
        return asdict(self)


def ask(base_url: str, key: str | None, model: str, questions: Sequence[Question], max_tokens: int) -> list[Reply]:
    """Put the questions greedily (temperature 0), one after another. Raises the client's own errors."""
    import openai

    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=key or "none", max_retries=0, timeout=120.0) as client:
        return [_ask(client, model, question, max_tokens) for question in questions]


def _ask(client: Any, model: str, question: Question, max_tokens: int) -> Reply:
    messages = [{"role": "user", "content": question.prompt}]
    if question.system is not None:
        messages.insert(0, {"role": "system", "content": question.system})
    arguments: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": question.thinking}},
    }
    if question.tools:
        arguments["tools"] = question.tools
    take = _streamed if question.streamed else _whole
    reasoning, content, calls, finish = take(client, arguments)
    return Reply(
        prompt=question.prompt,
        thinking=question.thinking,
        streamed=question.streamed,
        reasoning=reasoning,
        reply=content,
        tool_calls=[{"name": name, "arguments": _decoded(text)} for name, text in calls],
        finish_reason=finish,
    )


Answer = tuple[str, str, list[tuple[str, str]], str]
"""reasoning, content, (function name, arguments as JSON text) of each call, finish reason"""


def _whole(client: Any, arguments: dict[str, Any]) -> Answer:
    choice = client.chat.completions.create(**arguments).choices[0]
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return getattr(message, "reasoning_content", None) or "", message.content or "", calls, choice.finish_reason


def _streamed(client: Any, arguments: dict[str, Any]) -> Answer:
    reasoning, content, finish = [], [], ""
    names: list[str] = []
    texts: list[str] = []
    for part in client.chat.completions.create(**arguments, stream=True):
        for choice in part.choices:
            delta = choice.delta
            reasoning.append(getattr(delta, "reasoning_content", None) or "")
            content.append(delta.content or "")
            for call in delta.tool_calls or ():
                if call.index == len(names):
                    names.append(call.function.name)
                    texts.append("")
                texts[call.index] += call.function.arguments or ""
            finish = choice.finish_reason or finish
    return "".join(reasoning), "".join(content), list(zip(names, texts, strict=True)), finish


def _decoded(text: str) -> Any:
    """Arguments as an object; a call that was cut off keeps its text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
