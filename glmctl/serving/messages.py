"""The parts of a conversation as clients send them: messages, tool calls, tool descriptions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128
CONFLICT = "conflicting_fields"
ARGUMENTS = "invalid_tool_arguments"

ShortText = Annotated[str, Field(max_length=512)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Part(BaseModel):
    """A part of a request: strict types. What `validate` does with foreign keys is the server's choice."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def conflict(field: str, message: str) -> PydanticCustomError:
    """For fields that are right one by one and wrong together: the one to name, and what is wrong with it."""
    return PydanticCustomError(CONFLICT, "{message}", {"message": message, "field": field})


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


def _part_schema(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["type", kind],
        "properties": {"type": {"const": kind}, kind: {"type": "string"}},
    }


Text = Annotated[
    str,
    BeforeValidator(_text_of_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"anyOf": [_part_schema("text"), _part_schema("refusal")]}},
            ]
        }
    ),
]
"""content: a string, or text parts, which become one"""


class _Message(Part):
    name: ShortText | None = None


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Text


class UserMessage(_Message):
    role: Literal["user"]
    content: Text


_ARGUMENTS_SCHEMA = {"anyOf": [{"type": "string", "contentMediaType": "application/json"}, {"type": "object"}]}


class CalledFunction(Part):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: Annotated[dict[str, Any], WithJsonSchema(_ARGUMENTS_SCHEMA)] = {}

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
            raise PydanticCustomError(ARGUMENTS, "not a JSON string") from error
        if not isinstance(decoded, dict):
            raise PydanticCustomError(ARGUMENTS, "must hold a JSON object")
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
    content: Text | None = None
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
    content: Text
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
