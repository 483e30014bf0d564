"""The HTTP application: routes, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from glmctl.errors import GlmctlError
from glmctl.model.folder import load_model
from glmctl.serving import anthropic, metrics, page
from glmctl.serving.api_error import ApiError
from glmctl.serving.body import read_json
from glmctl.serving.chat import chat_completions
from glmctl.serving.completions import completions
from glmctl.serving.guard import Guard
from glmctl.serving.messages import template_messages
from glmctl.serving.openapi import document
from glmctl.serving.protocol import DetokenizeRequest, TokenizeRequest, WeightsRequest
from glmctl.serving.service import Service
from glmctl.serving.validation import validate
from glmctl.serving.worker import EngineDied


def create_app(
    service: Service, *, key: str | None = None, admin_key: str | None = None, loopback: bool = True
) -> Guard:
    """The application, guarded. Its lifespan starts and stops the engine's thread."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.close)

    # bodies are read by our own strict reader, so the document is our own too
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    _add_generation_routes(app, service)
    _add_token_routes(app, service)
    _add_state_routes(app, service)
    _add_admin_routes(app, service)
    page.add_routes(app)
    return Guard(app, service=service, key=key, admin_key=admin_key, loopback=loopback)


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: HttpRequest) -> Response:
        return await chat_completions(service, request)

    @app.post("/v1/completions", response_model=None)
    async def text(request: HttpRequest) -> Response:
        return await completions(service, request)

    @app.post("/v1/messages", response_model=None)
    async def anthropic_messages(request: HttpRequest) -> Response:
        return await anthropic.messages(service, request)

    @app.post("/v1/messages/count_tokens", response_model=None)
    async def anthropic_count(request: HttpRequest) -> Response:
        return await anthropic.count_tokens(service, request)


def _add_token_routes(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize", response_model=None)
    async def tokenize(request: HttpRequest) -> dict[str, Any]:
        body = validate(TokenizeRequest, await read_json(request), strict=service.strict)
        if body.model is not None:
            service.check_model(body.model)
        if body.prompt is not None:
            tokens = await service.encode_text(body.prompt, "prompt")
        else:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] or None
            kwargs = body.chat_template_kwargs
            thinking = kwargs is None or kwargs.enable_thinking is not False
            tokens = await service.encode_chat(template_messages(body.messages or []), tools, thinking)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.worker.max_length}

    @app.post("/detokenize", response_model=None)
    async def detokenize(request: HttpRequest) -> dict[str, Any]:
        body = validate(DetokenizeRequest, await read_json(request), strict=service.strict)
        if body.model is not None:
            service.check_model(body.model)
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}

    @app.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> dict[str, Any]:
        """What lm-eval asks for in place of a tokenizer of its own."""
        end = tokenizer.decode([tokenizer.pad_id])
        return {"eos_token": end, "bos_token": None, "pad_token": end, "chat_template": service.template.source}


def _add_state_routes(app: FastAPI, service: Service) -> None:
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "glmctl"}
    card["max_model_len"] = service.worker.max_length

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether the process can still do its work."""
        if not service.worker.alive:
            raise ApiError(503, "the engine is not running", code="engine_unavailable")
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether a request sent now would be taken."""
        if not service.worker.alive or service.draining or service.worker.full:
            raise ApiError(503, "not taking requests now", code="not_ready")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)

    @app.get("/openapi.json", response_model=None)
    async def openapi() -> Response:
        return JSONResponse(document(service.name))


def _add_admin_routes(app: FastAPI, service: Service) -> None:
    """Behind the admin key; the guard answers 404 when there is none."""

    @app.get("/admin/weights", response_model=None)
    async def weights() -> dict[str, Any]:
        return {"version": service.worker.version}

    @app.post("/admin/weights", response_model=None)
    async def load_weights(request: HttpRequest) -> dict[str, Any]:
        body = validate(WeightsRequest, await read_json(request), strict=True)
        try:
            source = await asyncio.to_thread(load_model, Path(body.path))
            await asyncio.wrap_future(service.worker.load_weights(body.version, source))
        except GlmctlError as error:
            raise ApiError(400, f"path: {error.message}", param="path", code="bad_weights") from error
        except EngineDied as error:
            raise ApiError(503, str(error), code="engine_unavailable") from error
        return {"version": service.worker.version}


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.scope["path"])


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "no such route", 405: "this route does not take that method"}.get(error.status_code, error.detail)
    return ApiError(error.status_code, message).response(request.scope["path"], error.headers)


async def _internal_error(request: HttpRequest, error: Exception) -> Response:
    # the traceback goes to the server's log; a client gets no part of it
    return ApiError(500, "internal error", code="internal_error").response(request.scope["path"])
