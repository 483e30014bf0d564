"""POST /v1/chat/completions: messages in; reasoning, content and tool calls out, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glmctl.engine.request import Request
from glmctl.serving.answer import Answer
from glmctl.serving.body import read_json
from glmctl.serving.exchange import Exchange
from glmctl.serving.protocol import ChatRequest
from glmctl.serving.service import Service, collect, data_events, new_id, stream, usage
from glmctl.serving.validation import validate


async def chat_requests(service: Service, body: ChatRequest, identity: str) -> list[Request]:
    """The generations that a chat request asks for. ApiError for whatever is wrong with it."""
    service.check_model(body.model)
    constraint = await service.grammars.of_chat(body)
    prompt = await service.encode_chat(body.template_messages(), body.template_tools(), body.enable_thinking)
    limit_name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    return service.requests(
        body,
        identity,
        prompt,
        max_tokens=service.budget(prompt, body.token_limit, "messages", limit_name),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
    )


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """Answer one chat request. ApiError for whatever is wrong with it."""
    body = validate(ChatRequest, await read_json(http), strict=service.strict)
    identity = new_id("chatcmpl")
    requests = await chat_requests(service, body, identity)
    answers = {request.id: Answer(service, body, index, request) for index, request in enumerate(requests)}
    head = {
        "id": identity,
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": service.fingerprint,
    }
    exchange = service.open(http, requests)
    if body.stream:
        return stream(exchange, data_events(_chunks(exchange, body, answers, head)))
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in answers}
    async for event in collect(exchange):
        answer = answers[event.id]
        entries[event.id] += answer.take(event)[1]
        if answer.finish_reason is not None:
            exchange.drop(event.id)
    choices = [
        {
            "index": answer.index,
            "message": answer.message(),
            "logprobs": {"content": entries[name], "refusal": None} if body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for name, answer in answers.items()
    ]
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": _usage(answers)})


async def _chunks(
    exchange: Exchange, body: ChatRequest, answers: dict[str, Answer], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """A role chunk for each choice, deltas, a finish chunk for each, and a usage chunk if it was asked for."""
    head = {**head, "object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    if with_usage:
        head["usage"] = None

    def one(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice]}

    for answer in answers.values():
        yield one(answer.index, {"role": "assistant", "content": ""})
    # log-probabilities of tokens whose text is still held back wait for the next chunk of their choice
    waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in answers}
    async for event in exchange.events():
        answer = answers[event.id]
        deltas, entries = answer.take(event)
        waiting[event.id] += entries
        for delta in deltas:
            logprobs = {"content": waiting[event.id], "refusal": None} if waiting[event.id] else None
            waiting[event.id] = []
            yield one(answer.index, answer.shape(delta), logprobs)
        if answer.finish_reason is not None:
            exchange.drop(event.id)
            logprobs = {"content": waiting[event.id], "refusal": None} if waiting[event.id] else None
            yield one(answer.index, {}, logprobs, answer.finish_reason)
    if with_usage:
        yield {**head, "choices": [], "usage": _usage(answers)}


def _usage(answers: dict[str, Answer]) -> dict[str, Any]:
    prompt_tokens = len(next(iter(answers.values())).request.prompt)
    generated = sum(answer.tokens for answer in answers.values())
    return usage(prompt_tokens, generated, sum(answer.reasoning_tokens for answer in answers.values()))
