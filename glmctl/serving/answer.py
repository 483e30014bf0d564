"""One chat answer on its way: tokens to text, text to reasoning, content and tool calls."""

from __future__ import annotations

import json
from typing import Any

from glmctl.data.parsing import Delta
from glmctl.engine.request import Event, Request
from glmctl.serving.protocol import ChatRequest
from glmctl.serving.service import Service, new_id
from glmctl.serving.structured import require_followed
from glmctl.serving.text import TextStream


class Answer:
    """Feed it the events of its request; it stops by itself at a stop string, and after one call if one is wanted."""

    def __init__(self, service: Service, body: ChatRequest, index: int, request: Request) -> None:
        self._service = service
        self._body = body
        self._logprobs = bool(body.logprobs)
        self._one_call = body.one_call
        self._text = TextStream(service.tokenizer, body.stop or (), min_tokens=body.min_tokens or 0)
        self._parser = service.template.stream_parser(body.template_tools(), thinking=body.enable_thinking)
        self._end_of_thinking = service.tokenizer.id("</think>") if body.enable_thinking else None
        self.index = index
        self.request = request
        self.tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.stop_string: str | None = None
        """the one that ended the answer"""

    def take(self, event: Event) -> tuple[list[Delta], list[dict[str, Any]]]:
        """Deltas and log-probability entries that one more token brings; sets `finish_reason` on the last.

        ApiError 400 when a grammar ran into its limits half way: what came is not what was asked for.
        """
        self.tokens += 1
        self._count_reasoning(event.token)
        matched = event.completion.matched_stop if event.completion is not None else None
        closing = isinstance(matched, int)
        self.stop_string = matched if isinstance(matched, str) else None
        entries = [] if closing or not self._logprobs else [self._entry(event)]
        text = "" if closing else self._text.push(event.token)
        stopped = self._text.stopped
        if event.finish_reason is not None and not stopped:
            require_followed(self.request, self._body)
            text += self._text.finish()
        deltas = self._parser.feed(text)
        if event.finish_reason is not None or stopped:
            deltas += self._parser.finish()
            reason = "stop" if stopped else event.finish_reason
            self.finish_reason = "tool_calls" if reason == "stop" and self._parser.parsed.tool_calls else reason
        if self._one_call:
            deltas = self._up_to_one_call(deltas)
        return deltas, entries

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        parsed = self._parser.parsed
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parsed.content or None,
            "refusal": None,
            "reasoning_content": parsed.reasoning,
            "reasoning": parsed.reasoning,
        }
        calls = parsed.tool_calls[:1] if self._one_call else parsed.tool_calls
        if calls:
            message["tool_calls"] = [
                {
                    "id": new_id("call"),
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                    },
                }
                for call in calls
            ]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def shape(self, delta: Delta) -> dict[str, Any]:
        """A delta as OpenAI streams it."""
        if delta.reasoning is not None:
            # Z.ai and SGLang read the first name, vLLM the second
            return {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        if delta.content is not None:
            return {"content": delta.content}
        if delta.tool_name is not None:
            function = {"name": delta.tool_name, "arguments": ""}
            call: dict[str, Any] = {
                "index": delta.tool_index,
                "id": new_id("call"),
                "type": "function",
                "function": function,
            }
        else:
            call = {"index": delta.tool_index, "function": {"arguments": delta.arguments}}
        return {"tool_calls": [call]}

    def _up_to_one_call(self, deltas: list[Delta]) -> list[Delta]:
        """Drop what belongs to a second call, and end the answer there."""
        kept = [delta for delta in deltas if not delta.tool_index]
        if len(kept) < len(deltas):
            self.finish_reason = "tool_calls"
        return kept

    def _count_reasoning(self, token: int) -> None:
        if self._end_of_thinking is None:
            return
        self.reasoning_tokens += 1
        if token == self._end_of_thinking:
            self._end_of_thinking = None

    def _entry(self, event: Event) -> dict[str, Any]:
        top = [{**self._service.token_text(token), "logprob": value} for token, value in event.top_logprobs or ()]
        return {**self._service.token_text(event.token), "logprob": event.logprob, "top_logprobs": top}
