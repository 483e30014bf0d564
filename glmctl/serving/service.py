"""What every route needs: the model's name, its tokenizer and template, the engine, and one way to start work."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import StreamingResponse

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.request import Constraint, Event, Request, SamplingParams, check_prompt
from glmctl.errors import DataError, GlmctlError
from glmctl.serving.api_error import ApiError
from glmctl.serving.exchange import ClientGone, Exchange
from glmctl.serving.messages import CONFLICT
from glmctl.serving.metrics import Metrics
from glmctl.serving.protocol import Generation
from glmctl.serving.sse import DONE, chunk
from glmctl.serving.structured import Grammars
from glmctl.serving.worker import EngineWorker


@dataclass
class Service:
    """One served model. `draining` is set when the server has been told to stop; `strict` refuses unknown fields."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate
    worker: EngineWorker
    strict: bool = False
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        ids = range(self.tokenizer.vocab_size)
        self._longest_token = max(len(self.tokenizer.decode_bytes([index])) for index in ids)
        self.metrics = Metrics(self.worker)
        self.grammars = Grammars(self.tokenizer, self.worker.vocab_size, self.template.calls)

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes when the weights do."""
        return f"glmctl-weights-{self.worker.version}"

    def check_model(self, name: str) -> None:
        """ApiError 404 unless `name` is the served model."""
        if name != self.name:
            raise ApiError(
                404,
                f"the model '{name[:80]}' does not exist; '{self.name}' does",
                param="model",
                code="model_not_found",
            )

    def check_size(self, characters: int, param: str) -> None:
        """ApiError 400 for text that cannot fit the context even at the longest tokens, before it is tokenized."""
        if characters > self._longest_token * self.worker.max_length:
            raise _too_long(f"{characters} characters", self.worker.max_length, param)

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        enable_thinking: bool,
    ) -> list[int]:
        """The prompt's token ids; off the event loop, since a long text takes a while."""
        self.check_size(sum(len(message.get("content") or "") for message in messages), "messages")
        try:
            return await asyncio.to_thread(
                self.template.encode_prompt, messages, tools, enable_thinking=enable_thinking
            )
        except DataError as error:
            raise ApiError(400, f"messages: {error.message}", param="messages", code="invalid_messages") from error

    async def encode_text(self, text: str, param: str) -> list[int]:
        """Token ids of plain text, special strings recognised."""
        self.check_size(len(text), param)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def budget(self, prompt: Sequence[int], asked: int | None, param: str, limit_name: str) -> int:
        """How many tokens may be generated. ApiError 400 when prompt and answer do not fit the context."""
        context = self.worker.max_length
        if len(prompt) >= context:
            raise _too_long(f"{len(prompt)} tokens", context, param)
        try:
            check_prompt(prompt, self.worker.vocab_size, context)
        except GlmctlError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param, code="invalid_tokens") from error
        room = context - len(prompt)
        if asked is not None and asked > room:
            raise ApiError(
                400,
                f"{limit_name}: the prompt has {len(prompt)} tokens and the context holds {context}, "
                f"which leaves {room}, not {asked}",
                param=limit_name,
                code="context_length_exceeded",
            )
        return room if asked is None else asked

    def requests(
        self,
        body: Generation,
        identity: str,
        prompt: list[int],
        *,
        max_tokens: int,
        top_logprobs: int | None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> list[Request]:
        """One request for each of the `n` answers to one prompt. Without a seed, every call draws its own.

        top_logprobs: alternatives to report with each token, None = no log-probabilities. ApiError 400 for token ids
        that the vocabulary does not have.
        """
        seed = secrets.randbits(64) if body.seed is None else body.seed
        bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
        for name, ids in (("logit_bias", bias), ("stop_token_ids", body.stop_token_ids or ())):
            if ids and max(ids) >= self.worker.vocab_size:
                message = f"{name}: token {max(ids)} is not in the vocabulary of {self.worker.vocab_size}"
                raise ApiError(400, message, param=name, code="invalid_tokens")
        if (body.min_tokens or 0) > max_tokens:
            message = f"min_tokens: more than the {max_tokens} that may be generated"
            raise ApiError(400, message, param="min_tokens", code=CONFLICT)
        return [
            Request(
                f"{identity}/{index}",
                prompt,
                SamplingParams(
                    max_tokens=max_tokens,
                    min_tokens=body.min_tokens or 0,
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    top_k=max(0, body.top_k or 0),
                    min_p=body.min_p or 0.0,
                    presence_penalty=body.presence_penalty or 0.0,
                    frequency_penalty=body.frequency_penalty or 0.0,
                    repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
                    logit_bias=bias,
                    stop=tuple(body.stop or ()),
                    stop_token_ids=(*self.tokenizer.eos_ids, *(body.stop_token_ids or ())),
                    ignore_eos=bool(body.ignore_eos),
                    seed=seed + index,
                    logprobs=top_logprobs is not None,
                    top_logprobs=top_logprobs or 0,
                    prompt_logprobs=prompt_logprobs,
                ),
                constraint,
            )
            for index in range(body.n or 1)
        ]

    def open(self, http: HttpRequest, requests: list[Request]) -> Exchange:
        """Submit; counts rejections."""
        try:
            return Exchange.open(self.worker, self.metrics, requests, http.receive)
        except ApiError as error:
            if error.status == 429:
                self.metrics.rejected.inc()
            raise

    def token_text(self, token: int) -> dict[str, Any]:
        """A token as OpenAI shows it beside its log-probability."""
        raw = self.tokenizer.decode_bytes([token])
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}


def new_id(prefix: str) -> str:
    """A fresh identifier."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's usage object; the closing token of an answer counts, as it was generated."""
    result: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if reasoning_tokens is not None:
        result["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return result


def stream(exchange: Exchange, chunks: AsyncIterator[bytes], *, failure: Any = None) -> StreamingResponse:
    """Server-sent events. A failure under way becomes an error event, by `failure(ApiError)` or in OpenAI's shape."""

    async def body() -> AsyncIterator[bytes]:
        try:
            async for each in chunks:
                yield each
        except ApiError as error:
            yield chunk(error.body()) if failure is None else failure(error)
        except ClientGone:
            return
        finally:
            exchange.close()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def data_events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Chunks as OpenAI streams them, ending in [DONE]."""
    async for each in chunks:
        yield chunk(each)
    yield DONE


async def collect(exchange: Exchange) -> AsyncIterator[Event]:
    """The events of an exchange that is answered in one piece; frees everything however it ends."""
    try:
        async for event in exchange.events():
            yield event
    except ClientGone as error:
        raise ApiError(499, "the client went away") from error
    finally:
        exchange.close()


def _too_long(size: str, context: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"{param}: the prompt has {size}; the context holds {context} tokens and needs room for one more",
        param=param,
        code="context_length_exceeded",
    )
