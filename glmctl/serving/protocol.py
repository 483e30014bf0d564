"""What clients may ask, field by field, with every bound checked before any work is done.

OpenAI's names, plus those that vLLM, SGLang and Z.ai servers share (top_k, min_p, chat_template_kwargs, thinking).
A known field that this server cannot honour is refused by name unless it asks for nothing; an unknown one always.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from glmctl.engine.request import MAX_TOP_LOGPROBS
from glmctl.errors import nearest
from glmctl.serving.api_error import ApiError

MAX_CHOICES = 8
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_TOKENS_FIELD = 10_000_000
"""a sanity bound; the context bounds what is really generated"""

ShortText = Annotated[str, Field(max_length=512)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]


class Part(BaseModel):
    """A part of a request: strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ----------------------------------------------------------------------------- messages


def _text_of_parts(value: Any) -> Any:
    """A list of text parts as one string; other part types are refused, for this is a text model."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {index}: only parts of type 'text' are accepted by a text model")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise ValueError(f"part {index}: expected {{'type': 'text', 'text': string}}")
        texts.append(part["text"])
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
            decoded = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError("not a JSON string") from error
        if not isinstance(decoded, dict):
            raise ValueError("must hold a JSON object")
        return decoded


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
    refusal: None = None
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


# ----------------------------------------------------------------------------- generation


class StreamOptions(Part):
    include_usage: bool | None = None


class Generation(Part):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_FIELD)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, lt=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = Field(
        None, max_length=MAX_STOPS
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # accepted when they ask for nothing
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    # accepted and without effect
    user: ShortText | None = None
    metadata: dict[str, ShortText] | None = Field(None, max_length=16)
    store: bool | None = None
    service_tier: ShortText | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
    @classmethod
    def _neutral(cls, value: Any, info: Any) -> Any:
        neutral = 1 if info.field_name == "repetition_penalty" else 0
        if value is None or value == {} or value == neutral:
            return value
        raise ValueError("not supported by this server; leave it out")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self


class TemplateArguments(Part):
    enable_thinking: bool | None = None


class Thinking(Part):
    """Z.ai's spelling of the same switch."""

    type: Literal["enabled", "disabled"]


class ResponseFormat(Part):
    type: Literal["text"]


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_FIELD)
    tools: list[ToolSpec] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    tool_stream: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateArguments | None = None
    thinking: Thinking | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    @property
    def enable_thinking(self) -> bool:
        """On unless either spelling of the switch turns it off."""
        kwargs = self.chat_template_kwargs
        if kwargs is not None and kwargs.enable_thinking is not None:
            return kwargs.enable_thinking
        return self.thinking is None or self.thinking.type == "enabled"

    @property
    def token_limit(self) -> int | None:
        """The smaller of the two fields that limit the answer."""
        given = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(given, default=None)

    def template_messages(self) -> list[dict[str, Any]]:
        """As the chat template takes them."""
        messages = []
        for message in self.messages:
            body = message.model_dump(exclude_none=True)
            if message.role == "developer":
                body["role"] = "system"
            messages.append(body)
        return messages

    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is shown."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class CompletionRequest(Generation):
    """POST /v1/completions. `prompt` is text, token ids, or a list of either."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, however many were given."""
        value: Any = self.prompt
        whole = isinstance(value, str) or isinstance(value[0], int)
        return [value] if whole else value


class TokenizeRequest(Part):
    """POST /tokenize: either a plain `prompt` or `messages` through the chat template."""

    model: ShortText | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[ToolSpec] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Part):
    """POST /detokenize"""

    model: ShortText | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(max_length=1_000_000)


# ----------------------------------------------------------------------------- reading

Model = TypeVar("Model", bound=Part)


def validate(kind: type[Model], body: dict[str, Any]) -> Model:
    """`body` as a request of `kind`. ApiError 400 naming the first field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _path(first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        code = None
        if first["type"] == "extra_forbidden":
            param = param[:120] if param else None
            match = nearest(str(first["loc"][-1])[:120], kind.model_fields)
            message = "unknown field" + (f"; did you mean '{match}'?" if match else "")
            code = "unknown_parameter"
        raise ApiError(400, f"{param}: {message}" if param else message, param=param, code=code) from error


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location; the names of union members are not part of it."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in _UNION_TAGS or "[" in step:
            continue
        else:
            path += f".{step}" if path else step
    return path


_UNION_TAGS = frozenset({"system", "developer", "user", "assistant", "tool", "str", "int"})
