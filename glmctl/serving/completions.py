"""POST /v1/completions: the plain continuation of text or token ids, and the log-probabilities of the prompt itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.request import Completion, Event, Request, TopLogprobs
from glmctl.serving.body import read_json
from glmctl.serving.exchange import Exchange
from glmctl.serving.protocol import CompletionRequest
from glmctl.serving.service import Service, collect, data_events, new_id, stream, usage
from glmctl.serving.structured import require_followed
from glmctl.serving.text import TextStream
from glmctl.serving.validation import validate


class LegacyLogprobs:
    """The parallel lists of the old completions API, in the order of the tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0
        self._fresh()

    def _fresh(self) -> None:
        self._lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, top: TopLogprobs) -> None:
        """One more token; the first of a prompt has no log-probability."""
        text = self._shown(token)
        values: dict[str, float] | None = None
        if logprob is not None:
            values = {}
            # the chosen token is always among the alternatives, as OpenAI has it
            for index, value in [*top, (token, logprob)]:
                values.setdefault(self._shown(index), value)
        self._lists["tokens"].append(text)
        self._lists["token_logprobs"].append(logprob)
        self._lists["top_logprobs"].append(values)
        self._lists["text_offset"].append(self._offset)
        self._offset += len(self._tokenizer.decode([token]))

    def flush(self) -> dict[str, list[Any]] | None:
        """What came since the last flush; None if nothing did."""
        lists = self._lists
        self._fresh()
        return lists if lists["tokens"] else None

    def _shown(self, token: int) -> str:
        raw = self._tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # two halves of a character must not look alike
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Continuation:
    """One continuation on its way; with `echo` the prompt comes first."""

    def __init__(self, service: Service, body: CompletionRequest, index: int, request: Request) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._stream = TextStream(service.tokenizer, body.stop or (), min_tokens=body.min_tokens or 0)
        self._logprobs = LegacyLogprobs(service.tokenizer) if body.logprobs is not None else None
        self._scored: list[tuple[int, float | None, TopLogprobs]] = []
        self.index = index
        self.request = request
        self.tokens = 0
        self.finish_reason: str | None = None

    def opening(self) -> str:
        """The echoed prompt; nothing without `echo`."""
        return self._tokenizer.decode(self.request.prompt) if self._body.echo else ""

    def take(self, event: Event) -> str:
        """The text that one more token brings; sets `finish_reason` on the last.

        ApiError 400 when a grammar ran into its limits half way.
        """
        completion = event.completion
        only_prompt = self._body.max_tokens == 0
        self.tokens += not only_prompt
        closing = completion is not None and isinstance(completion.matched_stop, int)
        if self._logprobs is not None and not (closing or only_prompt):
            self._scored.append((event.token, event.logprob, event.top_logprobs or []))
        if only_prompt:
            self.finish_reason = "length"
            return ""
        text = "" if closing else self._stream.push(event.token)
        if self._stream.stopped:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            require_followed(self.request, self._body)
            text += self._stream.finish()
            self.finish_reason = event.finish_reason
        return text

    def logprobs(self, completion: Completion | None) -> dict[str, list[Any]] | None:
        """Of the tokens since the last call; behind those of an echoed prompt, which come with its completion."""
        if self._logprobs is None:
            return None
        if completion is not None and completion.prompt_logprobs is not None:
            scores = [(score.logprob, score.top) for score in completion.prompt_logprobs]
            for token, (logprob, top) in zip(completion.prompt, [(None, []), *scores], strict=True):
                self._logprobs.add(token, logprob, top)
        for token, logprob, top in self._scored:
            self._logprobs.add(token, logprob, top)
        self._scored.clear()
        return self._logprobs.flush()


async def completions(service: Service, http: HttpRequest) -> Response:
    """Answer one completion request. Choices are numbered prompt by prompt, `n` for each."""
    body = validate(CompletionRequest, await read_json(http), strict=service.strict)
    service.check_model(body.model)
    constraint = await service.grammars.of_completion(body)
    prompts = [
        await service.encode_text(prompt, "prompt") if isinstance(prompt, str) else prompt for prompt in body.prompts
    ]
    identity = new_id("cmpl")
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        asked = 1 if body.max_tokens == 0 else body.max_tokens
        requests += service.requests(
            body,
            f"{identity}/{number}",
            prompt,
            max_tokens=service.budget(prompt, asked, "prompt", "max_tokens"),
            top_logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            constraint=constraint,
        )
    choices = {request.id: Continuation(service, body, index, request) for index, request in enumerate(requests)}
    head = {
        "id": identity,
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": service.fingerprint,
    }
    prompt_tokens = sum(map(len, prompts))
    exchange = service.open(http, requests)
    # log-probabilities of an echoed prompt are known at the end only
    pieces = _pieces(exchange, choices, whole=not body.stream or bool(body.echo and body.logprobs is not None))
    if body.stream:
        return stream(exchange, data_events(_chunks(pieces, body, choices, head, prompt_tokens)))
    try:
        shown = [piece async for piece in pieces]
    finally:
        exchange.close()
    return JSONResponse(
        {
            **head,
            "choices": sorted(shown, key=lambda choice: int(choice["index"])),
            "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices.values())),
        }
    )


async def _pieces(
    exchange: Exchange, choices: dict[str, Continuation], *, whole: bool
) -> AsyncIterator[dict[str, Any]]:
    """Choices in OpenAI's shape: piece by piece as they come, or each as a whole when it has ended."""
    texts = {name: choice.opening() for name, choice in choices.items()}
    async for event in collect(exchange) if whole else exchange.events():
        choice = choices[event.id]
        texts[event.id] += choice.take(event)
        finished = choice.finish_reason is not None
        if finished:
            exchange.drop(event.id)
        elif whole or not texts[event.id]:
            continue
        logprobs = choice.logprobs(event.completion)
        text, texts[event.id] = texts[event.id], ""
        yield {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


async def _chunks(
    pieces: AsyncIterator[dict[str, Any]],
    body: CompletionRequest,
    choices: dict[str, Continuation],
    head: dict[str, Any],
    prompt_tokens: int,
) -> AsyncIterator[dict[str, Any]]:
    async for piece in pieces:
        yield {**head, "choices": [piece]}
    if body.stream_options is not None and body.stream_options.include_usage:
        generated = sum(choice.tokens for choice in choices.values())
        yield {**head, "choices": [], "usage": usage(prompt_tokens, generated)}
