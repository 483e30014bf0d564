"""POST /v1/completions: the plain continuation of text or token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glmctl.engine.request import Event, Request
from glmctl.serving.body import read_json
from glmctl.serving.exchange import Exchange
from glmctl.serving.protocol import CompletionRequest, validate
from glmctl.serving.service import Service, collect, new_id, stream, usage
from glmctl.serving.text import TextStream


class TextChoice:
    """One continuation on its way."""

    def __init__(self, service: Service, body: CompletionRequest, index: int, request: Request) -> None:
        self._service = service
        self._wants_logprobs = body.logprobs is not None
        self._stream = TextStream(service.tokenizer, body.stop or ())
        self._offset = 0
        self.index = index
        self.request = request
        self.tokens = 0
        self.finish_reason: str | None = None

    def take(self, event: Event) -> tuple[str, dict[str, Any] | None]:
        """The text and log-probabilities that one more token brings; sets `finish_reason` on the last."""
        self.tokens += 1
        closing = event.finish_reason == "stop"
        logprobs = None if closing or not self._wants_logprobs else self._logprobs(event)
        text = "" if closing else self._stream.push(event.token)
        stopped = self._stream.stopped
        if stopped:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            text += self._stream.finish()
            self.finish_reason = event.finish_reason
        return text, logprobs

    def _logprobs(self, event: Event) -> dict[str, Any]:
        token = self._service.token_text(event.token)["token"]
        top = {self._service.token_text(index)["token"]: value for index, value in event.top_logprobs or ()}
        offset, self._offset = self._offset, self._offset + len(token)
        # the chosen token is always among the alternatives, as OpenAI has it
        assert event.logprob is not None
        top.setdefault(token, event.logprob)
        return {
            "tokens": [token],
            "token_logprobs": [event.logprob],
            "top_logprobs": [top],
            "text_offset": [offset],
        }


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not parts:
        return None
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


async def completions(service: Service, http: HttpRequest) -> Response:
    """Answer one completion request. Choices are numbered prompt by prompt, `n` for each."""
    body = validate(CompletionRequest, await read_json(http))
    service.check_model(body.model)
    prompts = [
        await service.encode_text(prompt, "prompt") if isinstance(prompt, str) else prompt for prompt in body.prompts
    ]
    identity = new_id("cmpl")
    requests: list[Request] = []
    for prompt in prompts:
        max_tokens = service.budget(prompt, body.max_tokens, "prompt", "max_tokens")
        for params in service.sampling(body, max_tokens, body.logprobs):
            requests.append(Request(f"{identity}/{len(requests)}", prompt, params))
    choices = {request.id: TextChoice(service, body, index, request) for index, request in enumerate(requests)}
    exchange = service.open(http, requests)
    head = {"id": identity, "object": "text_completion", "created": int(time.time()), "model": service.name}
    prompt_tokens = sum(map(len, prompts))
    if body.stream:
        return stream(exchange, _chunks(exchange, body, choices, head, prompt_tokens))
    texts: dict[str, list[str]] = {name: [] for name in choices}
    logprobs: dict[str, list[dict[str, Any]]] = {name: [] for name in choices}
    async for event in collect(exchange):
        text, entry = choices[event.id].take(event)
        texts[event.id].append(text)
        logprobs[event.id] += [entry] if entry else []
        if choices[event.id].finish_reason is not None:
            exchange.drop(event.id)
    return JSONResponse(
        {
            **head,
            "choices": [
                {
                    "index": choice.index,
                    "text": "".join(texts[name]),
                    "logprobs": _joined(logprobs[name]),
                    "finish_reason": choice.finish_reason,
                }
                for name, choice in choices.items()
            ],
            "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices.values())),
        }
    )


async def _chunks(
    exchange: Exchange,
    body: CompletionRequest,
    choices: dict[str, TextChoice],
    head: dict[str, Any],
    prompt_tokens: int,
) -> AsyncIterator[dict[str, Any]]:
    waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in choices}
    async for event in exchange.events():
        choice = choices[event.id]
        text, entry = choice.take(event)
        waiting[event.id] += [entry] if entry else []
        if not text and choice.finish_reason is None:
            continue
        parts, waiting[event.id] = waiting[event.id], []
        body_choice = {
            "index": choice.index,
            "text": text,
            "logprobs": _joined(parts),
            "finish_reason": choice.finish_reason,
        }
        yield {**head, "choices": [body_choice]}
        if choice.finish_reason is not None:
            exchange.drop(event.id)
    if body.stream_options is not None and body.stream_options.include_usage:
        generated = sum(choice.tokens for choice in choices.values())
        yield {**head, "choices": [], "usage": usage(prompt_tokens, generated)}
