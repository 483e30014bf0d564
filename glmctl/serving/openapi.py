"""The published description of the API, made from the very models that requests are checked against."""

from __future__ import annotations

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

import glmctl
from glmctl.serving.anthropic import CountRequest, MessagesRequest
from glmctl.serving.api_error import ANTHROPIC_PREFIX
from glmctl.serving.messages import Part
from glmctl.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_COMPONENT = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {"type": {"const": "error"}, "error": {"type": "object", "required": ["type", "message"]}},
}
_STREAMING: dict[str, Any] = {"text/event-stream": {}}
_POSTS: list[tuple[str, type[Part], str, list[str], bool]] = [
    ("/v1/chat/completions", ChatRequest, "Answer a conversation.", ["id", "choices", "usage"], True),
    ("/v1/completions", CompletionRequest, "Continue text or token ids.", ["id", "choices", "usage"], True),
    ("/v1/messages", MessagesRequest, "Answer a conversation, in Anthropic's dialect.", ["id", "content"], True),
    ("/v1/messages/count_tokens", CountRequest, "Length of a prompt.", ["input_tokens"], False),
    ("/tokenize", TokenizeRequest, "Text or messages to token ids.", ["tokens", "count"], False),
    ("/detokenize", DetokenizeRequest, "Token ids to text.", ["prompt"], False),
]
_GETS: list[tuple[str, str, str]] = [
    ("/v1/models", "The served model, as a list.", "application/json"),
    ("/health", "Whether the process can do its work.", "application/json"),
    ("/ready", "Whether a request sent now would be taken.", "application/json"),
    ("/tokenizer_info", "The tokenizer's end token and chat template.", "application/json"),
    ("/metrics", "Metrics for Prometheus.", "text/plain"),
]


def document(model: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server that serves `model`."""
    paths, components = _static()
    schemas = {name: dict(schema) for name, schema in components.items()}
    for name in ("ChatRequest", "CompletionRequest", "MessagesRequest", "CountRequest"):
        properties = dict(schemas[name]["properties"])
        properties["model"] = {"const": model}
        schemas[name]["properties"] = properties
    return {
        "openapi": "3.1.0",
        "info": {"title": "glmctl", "version": glmctl.__version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


@functools.cache
def _static() -> tuple[dict[str, Any], dict[str, Any]]:
    kinds = [kind for _, kind, *_ in _POSTS]
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_COMPONENT)
    components = {**schemas["$defs"], "Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    paths: dict[str, Any] = {}
    for path, kind, text, required, streams in _POSTS:
        answer = {"application/json": {"schema": {"type": "object", "required": required}}}
        body = {"application/json": {"schema": {"$ref": _COMPONENT.format(model=kind.__name__)}}}
        responses = {
            "200": {"description": "Done.", "content": {**answer, **(_STREAMING if streams else {})}},
            **_failures(path, 400, 401, 403, 404, 408, 413, 421, 429, 431, 503),
        }
        paths[path] = {
            "post": {"summary": text, "requestBody": {"required": True, "content": body}, "responses": responses}
        }
    for path, text, media in _GETS:
        done = {"description": "Done.", "content": {media: {}}}
        responses = {"200": done, **_failures(path, 401, 403, 421, 431, 503)}
        paths[path] = {"get": {"summary": text, "responses": responses}}
    return paths, components


def _failures(path: str, *statuses: int) -> dict[str, Any]:
    shape = "AnthropicError" if path.startswith(ANTHROPIC_PREFIX) else "Error"
    content = {"application/json": {"schema": {"$ref": _COMPONENT.format(model=shape)}}}
    return {str(status): {"description": "Refused.", "content": content} for status in statuses}
