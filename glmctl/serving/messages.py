"""The parts of a conversation as clients send them: messages, tool calls, tool descriptions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_TOOLS = 128

ShortText = Annotated[str, Field(max_length=512)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Part(BaseModel):
    """A part of a request: strict types. What `validate` does with foreign keys is the server's choice."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def _text_of_parts(value: Any) -> Any:
    """A list of text parts as one string; other part types are refused, for this is a text model."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal"):
            raise ValueError(f"part {index}: only parts of type 'text' are accepted by a text model")
        if not isinstance(part.get(kind), str):
            raise ValueError(f"part {index}: expected {{'type': 'text', 'text': string}}")
        texts.append(part[kind])
    return "".join(texts)


class _Message(Part):
    name: ShortText | None = None

    @field_validator("content", mode="before", check_fields=False)
    @classmethod
    def _flatten(cls, value: Any) -> Any:
        return _text_of_parts(value)


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: str


class UserMessage(_Message):
    role: Literal["user"]
    content: str


class CalledFunction(Part):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] = {}

    @field_validator("arguments", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        """A JSON string on the wire, an object for the template."""
        if not isinstance(value, str):
            return value
        try:
            decoded = json.loads(value or "{}", parse_constant=_no_constant)
            # "\ud800" inside the string is an escape of its own: only now does it become half a character
            json.dumps(decoded, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise ValueError("not a JSON string") from error
        if not isinstance(decoded, dict):
            raise ValueError("must hold a JSON object")
        return decoded


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class PastToolCall(Part):
    id: ShortText | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[PastToolCall] | None = Field(None, max_length=MAX_TOOLS)
    # what the official client's objects carry when they are sent back
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class ToolMessage(_Message):
    role: Literal["tool"]
    content: str
    tool_call_id: ShortText | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionSpec(Part):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Part):
    type: Literal["function"]
    function: FunctionSpec


def template_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them."""
    rendered = []
    for message in messages:
        body = message.model_dump(exclude_none=True, exclude={"refusal"})
        if message.role == "developer":
            body["role"] = "system"
        rendered.append(body)
    return rendered
