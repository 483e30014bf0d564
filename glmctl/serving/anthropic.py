"""POST /v1/messages: Anthropic's dialect of the same conversation, translated to ours and back.

Thinking is off unless the request enables it, as its clients expect; its budget is a wish that this model cannot
follow (it has a switch and no dial), so `max_tokens` bounds thoughts and answer together. Signatures are empty.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Request as HttpRequest
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from glmctl.data.parsing import Delta
from glmctl.serving.answer import Answer
from glmctl.serving.api_error import ApiError
from glmctl.serving.body import read_json
from glmctl.serving.chat import chat_requests
from glmctl.serving.exchange import Exchange
from glmctl.serving.messages import MAX_TOOLS, Name, Part, ShortText, conflict
from glmctl.serving.protocol import MAX_MESSAGES, MAX_STOPS, MAX_TOKENS_FIELD, ChatRequest, StopString
from glmctl.serving.service import Service, collect, new_id, stream
from glmctl.serving.validation import validate

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class TextBlock(Part):
    type: Literal["text"]
    text: str


class ToolUseBlock(Part):
    type: Literal["tool_use"]
    id: ShortText
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: ShortText
    content: str | list[TextBlock] = ""
    is_error: bool | None = None


class ThinkingBlock(Part):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedBlock(Part):
    type: Literal["redacted_thinking"]


Block = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedBlock, Field(discriminator="type")
]


class AnthropicMessage(Part):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Part):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class AnthropicToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> AnthropicToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise conflict("name", "it is given with type 'tool', and only then")
        return self


class AnthropicThinking(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)


class CountRequest(Part):
    """POST /v1/messages/count_tokens"""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: str | list[TextBlock] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages"""

    max_tokens: int = Field(ge=1, le=MAX_TOKENS_FIELD)
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    metadata: dict[str, Any] | None = None
    service_tier: ShortText | None = None


def to_chat(body: CountRequest) -> ChatRequest:
    """The same request in OpenAI's dialect. ApiError for what cannot be said in it."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _joined(body.system)})
    for message in body.messages:
        messages += _assistant(message) if message.role == "assistant" else _user(message)
    fields: dict[str, Any] = {"model": body.model, "messages": messages}
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    fields["chat_template_kwargs"] = {"enable_thinking": thinks}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    choice = body.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if isinstance(body, MessagesRequest):
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields |= {name: value for name in same if (value := getattr(body, name)) is not None}
        if body.stop_sequences:
            fields["stop"] = body.stop_sequences
    return validate(ChatRequest, fields)


async def count_tokens(service: Service, http: HttpRequest) -> Response:
    """How long the prompt is."""
    body = to_chat(validate(CountRequest, await read_json(http), strict=service.strict))
    service.check_model(body.model)
    tokens = await service.encode_chat(body.template_messages(), body.template_tools(), body.enable_thinking)
    return JSONResponse({"input_tokens": len(tokens)})


async def messages(service: Service, http: HttpRequest) -> Response:
    """Answer one request, whole or streamed. ApiError for whatever is wrong with it."""
    body = to_chat(validate(MessagesRequest, await read_json(http), strict=service.strict))
    identity = new_id("msg")
    requests = await chat_requests(service, body, identity)
    answer = Answer(service, body, 0, requests[0])
    exchange = service.open(http, requests)
    head: dict[str, Any] = {
        "id": identity,
        "type": "message",
        "role": "assistant",
        "model": service.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": len(requests[0].prompt), "output_tokens": 0},
    }
    if body.stream:
        return stream(exchange, _events(exchange, answer, head), failure=_error_event)
    async for event in collect(exchange):
        answer.take(event)
        if answer.finish_reason is not None:
            exchange.drop(event.id)
    return JSONResponse({**head, "content": _content(answer), **_ending(answer), "usage": _usage(answer)})


async def _events(exchange: Exchange, answer: Answer, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """message_start, the blocks one after another, message_delta, message_stop."""
    yield _event("message_start", message=head)
    blocks = _Blocks()
    async for event in exchange.events():
        deltas, _ = answer.take(event)
        for delta in deltas:
            for each in blocks.take(delta):
                yield each
        if answer.finish_reason is not None:
            exchange.drop(event.id)
    for each in blocks.close():
        yield each
    yield _event("message_delta", delta=_ending(answer), usage=_usage(answer))
    yield _event("message_stop")


class _Blocks:
    """Deltas to content blocks: a block is opened when its kind or its call changes, after the last was closed."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: tuple[str, int | None] | None = None

    def take(self, delta: Delta) -> list[bytes]:
        start: dict[str, Any]
        if delta.reasoning is not None:
            start = {"type": "thinking", "thinking": "", "signature": ""}
            return [*self._open(("thinking", None), start), self._delta("thinking_delta", thinking=delta.reasoning)]
        if delta.content is not None:
            start = {"type": "text", "text": ""}
            return [*self._open(("text", None), start), self._delta("text_delta", text=delta.content)]
        if delta.tool_name is not None:
            start = {"type": "tool_use", "id": new_id("toolu"), "name": delta.tool_name, "input": {}}
            return self._open(("tool_use", delta.tool_index), start)
        return [self._delta("input_json_delta", partial_json=delta.arguments)]

    def close(self) -> list[bytes]:
        return [] if self._kind is None else [_event("content_block_stop", index=self._index)]

    def _open(self, kind: tuple[str, int | None], start: dict[str, Any]) -> list[bytes]:
        if kind == self._kind:
            return []
        closing = self.close()
        self._kind = kind
        self._index += 1
        return [*closing, _event("content_block_start", index=self._index, content_block=start)]

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return _event("content_block_delta", index=self._index, delta={"type": kind, **fields})


def _event(kind: str, **fields: Any) -> bytes:
    text = json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {kind}\ndata: {text}\n\n".encode()


def _error_event(error: ApiError) -> bytes:
    return _event("error", error=error.anthropic_body()["error"])


def _content(answer: Answer) -> list[dict[str, Any]]:
    message = answer.message()
    blocks: list[dict[str, Any]] = []
    if message["reasoning_content"]:
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", ()):
        function = call["function"]
        block = {"type": "tool_use", "id": new_id("toolu"), "name": function["name"]}
        blocks.append({**block, "input": json.loads(function["arguments"])})
    return blocks


def _ending(answer: Answer) -> dict[str, Any]:
    if answer.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_string}
    return {"stop_reason": _STOP_REASONS[answer.finish_reason or "length"], "stop_sequence": None}


def _usage(answer: Answer) -> dict[str, int]:
    return {"input_tokens": len(answer.request.prompt), "output_tokens": answer.tokens}


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _user(message: AnthropicMessage) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    results: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content)})
        elif isinstance(block, TextBlock):
            results.append({"role": "user", "content": block.text})
        else:
            raise ApiError(400, f"messages: a user message holds no {block.type} block", param="messages")
    return results


def _assistant(message: AnthropicMessage) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content}]
    texts, thoughts, calls = [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            raise ApiError(400, "messages: an assistant message holds no tool_result block", param="messages")
    result: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        result["reasoning_content"] = "\n".join(thoughts)
    if calls:
        result["tool_calls"] = calls
    return [result]
