"""POST /v1/chat/completions: messages in; reasoning, content and tool calls out, whole or streamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glmctl.data.parsing import Delta, StreamParser
from glmctl.engine.request import Event, Request
from glmctl.serving.body import read_json
from glmctl.serving.exchange import Exchange
from glmctl.serving.protocol import ChatRequest, validate
from glmctl.serving.service import Service, collect, new_id, stream, usage
from glmctl.serving.text import TextStream


class ChatChoice:
    """One answer on its way: tokens -> text -> deltas in OpenAI's shape."""

    def __init__(self, service: Service, body: ChatRequest, index: int, request: Request) -> None:
        self._service = service
        self._logprobs = bool(body.logprobs)
        self._text = TextStream(service.tokenizer, body.stop or ())
        self._parser = StreamParser(body.enable_thinking, body.template_tools())
        self.index = index
        self.request = request
        self.tokens = 0
        self.finish_reason: str | None = None

    def take(self, event: Event) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Deltas and log-probability entries that one more token brings; sets `finish_reason` on the last."""
        self.tokens += 1
        closing = event.finish_reason == "stop"
        entries = [] if closing or not self._logprobs else [self._entry(event)]
        text = "" if closing else self._text.push(event.token)
        stopped = self._text.stopped
        if event.finish_reason is not None and not stopped:
            text += self._text.finish()
        deltas = self._parser.feed(text)
        if event.finish_reason is not None or stopped:
            deltas += self._parser.finish()
            reason = "stop" if stopped else event.finish_reason
            called = reason == "stop" and self._parser.parsed.tool_calls
            self.finish_reason = "tool_calls" if called else reason
        return [self._shape(delta) for delta in deltas], entries

    def message(self) -> dict[str, Any]:
        """The whole answer."""
        parsed = self._parser.parsed
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parsed.content or None,
            "reasoning_content": parsed.reasoning,
            "reasoning": parsed.reasoning,
        }
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": new_id("call"),
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": json.dumps(call["arguments"], ensure_ascii=False),
                    },
                }
                for call in parsed.tool_calls
            ]
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _shape(self, delta: Delta) -> dict[str, Any]:
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

    def _entry(self, event: Event) -> dict[str, Any]:
        top = [{**self._service.token_text(token), "logprob": value} for token, value in event.top_logprobs or ()]
        return {**self._service.token_text(event.token), "logprob": event.logprob, "top_logprobs": top}


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """Answer one chat request. ApiError for whatever is wrong with it."""
    body = validate(ChatRequest, await read_json(http))
    service.check_model(body.model)
    prompt = await service.encode_chat(body.template_messages(), body.template_tools(), body.enable_thinking)
    limit_name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = service.budget(prompt, body.token_limit, "messages", limit_name)
    params = service.sampling(body, max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    identity = new_id("chatcmpl")
    requests = [Request(f"{identity}/{index}", prompt, each) for index, each in enumerate(params)]
    choices = {request.id: ChatChoice(service, body, index, request) for index, request in enumerate(requests)}
    exchange = service.open(http, requests)
    head = {"id": identity, "created": int(time.time()), "model": service.name}
    if body.stream:
        return stream(exchange, _chunks(exchange, body, choices, head))
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in choices}
    async for event in collect(exchange):
        choice = choices[event.id]
        entries[event.id] += choice.take(event)[1]
        if choice.finish_reason is not None:
            exchange.drop(event.id)
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": choice.index,
                    "message": choice.message(),
                    "logprobs": {"content": entries[name]} if body.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for name, choice in choices.items()
            ],
            "usage": usage(len(prompt), sum(choice.tokens for choice in choices.values())),
        }
    )


async def _chunks(
    exchange: Exchange, body: ChatRequest, choices: dict[str, ChatChoice], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """A role chunk for each choice, deltas, a finish chunk for each, and a usage chunk if it was asked for."""
    head = {**head, "object": "chat.completion.chunk"}

    def one(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice]}

    for choice in choices.values():
        yield one(choice.index, {"role": "assistant", "content": ""})
    # log-probabilities of tokens whose text is still held back wait for the next chunk of their choice
    waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in choices}
    async for event in exchange.events():
        choice = choices[event.id]
        deltas, entries = choice.take(event)
        waiting[event.id] += entries
        for delta in deltas:
            logprobs = {"content": waiting[event.id]} if waiting[event.id] else None
            waiting[event.id] = []
            yield one(choice.index, delta, logprobs)
        if choice.finish_reason is not None:
            exchange.drop(event.id)
            logprobs = {"content": waiting[event.id]} if waiting[event.id] else None
            yield one(choice.index, {}, logprobs, choice.finish_reason)
    if body.stream_options is not None and body.stream_options.include_usage:
        prompt_tokens = len(next(iter(choices.values())).request.prompt)
        generated = sum(choice.tokens for choice in choices.values())
        yield {**head, "choices": [], "usage": usage(prompt_tokens, generated)}
