"""What clients may ask, field by field, with every bound checked before any work is done.

OpenAI's names, all of them: a field that would change the answer and that this server cannot honour is refused by
name, one that would not is accepted. Beyond them, the names that vLLM, SGLang and Z.ai servers share (top_k, min_p,
chat_template_kwargs, thinking ...). Any other name is ignored, as those servers do, or refused with `--strict`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from glmctl.engine.request import MAX_TOP_LOGPROBS
from glmctl.errors import nearest
from glmctl.serving.api_error import ApiError
from glmctl.serving.messages import (
    MAX_TOOLS,
    Message,
    Name,
    Part,
    ShortText,
    ToolSpec,
    template_messages,
)

MAX_CHOICES = 8
MAX_PROMPTS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 2048
MAX_BIASES = 1024
MAX_PATTERN_CHARS = 8192
MAX_TOKENS_FIELD = 10_000_000
"""a sanity bound; the context bounds what is really generated"""

TokenId = Annotated[int, Field(ge=0, le=10_000_000)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000)]


def _unsupported(why: str) -> BeforeValidator:
    """For a field that would change the answer and cannot be honoured: anything but null is refused."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise ValueError(f"not supported by this server: {why}")

    return BeforeValidator(refuse)


def _only(*neutral: Any, why: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            raise ValueError(f"not supported by this server: {why}")
        return value

    return check


# ----------------------------------------------------------------------------- what is common


class StreamOptions(Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Part):
    """vLLM's spelling: exactly one of these is what the answer must be."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1, max_length=MAX_PATTERN_CHARS)
    choice: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, min_length=1, max_length=1024
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice)) != 1:
            raise ValueError("give exactly one of json, regex and choice")
        return self


class Generation(Part):
    """What chat and plain completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, lt=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_FIELD)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = Field(
        None, max_length=MAX_STOPS
    )
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[None, _unsupported("use response_format")] = None
    guided_regex: Annotated[None, _unsupported("use structured_outputs")] = None
    guided_choice: Annotated[None, _unsupported("use structured_outputs")] = None
    guided_grammar: Annotated[None, _unsupported("use structured_outputs")] = None
    # accepted and without effect on the answer
    user: ShortText | None = None
    metadata: dict[str, ShortText] | None = Field(None, max_length=16)
    store: bool | None = None
    service_tier: ShortText | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _by_id(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 8):
                raise ValueError("keys must be token ids")
        return value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self


# ----------------------------------------------------------------------------- chat


class TemplateArguments(Part):
    enable_thinking: bool | None = None


class Thinking(Part):
    """Z.ai's spelling of the same switch."""

    type: Literal["enabled", "disabled"]


class JsonSchema(Part):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with type 'json_schema', and only then")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema that the answer must follow; None = any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_ if self.json_schema.schema_ is not None else {}
        return {"type": "object"} if self.type == "json_object" else None


class FunctionName(Part):
    name: Name


class NamedTool(Part):
    type: Literal["function"]
    function: FunctionName


class AllowedToolsList(Part):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Part):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolsList


ToolChoice = Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_FIELD)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS_FIELD)
    tools: list[ToolSpec] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    tool_stream: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateArguments | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    # OpenAI's, and not for this model
    modalities: Annotated[list[str] | None, BeforeValidator(_only(["text"], why="this model writes text"))] = None
    verbosity: Annotated[ShortText | None, BeforeValidator(_only("medium", why="ask for it in words"))] = None
    audio: Annotated[None, _unsupported("this model writes text")] = None
    functions: Annotated[None, _unsupported("use tools")] = None
    function_call: Annotated[None, _unsupported("use tool_choice")] = None
    web_search_options: Annotated[None, _unsupported("it searches nothing")] = None
    moderation: Annotated[None, _unsupported("it moderates nothing")] = None
    # accepted and without effect on the answer
    prediction: dict[str, Any] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: ShortText | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_that_need_each_other(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two of them have the same name")
        for name in self.chosen_tools or ():
            if name not in names:
                raise ValueError(f"tool_choice: no tool is called '{name}'")
        if self.must_call and not names:
            raise ValueError("tool_choice needs tools")
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("structured_outputs and response_format say the same thing; give one")
        return self

    @property
    def enable_thinking(self) -> bool:
        """On unless one of the spellings of the switch turns it off."""
        kwargs = self.chat_template_kwargs
        if kwargs is not None and kwargs.enable_thinking is not None:
            return kwargs.enable_thinking
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        # the model has a switch and no dial: every effort but none is the same
        return self.reasoning_effort != "none"

    @property
    def token_limit(self) -> int | None:
        """The smaller of the two fields that limit the answer."""
        given = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(given, default=None)

    @property
    def chosen_tools(self) -> list[str] | None:
        """Names that `tool_choice` restricts calls to; None = any tool."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a tool call."""
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"

    @property
    def one_call(self) -> bool:
        """Whether the answer may hold one tool call at most."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    def template_messages(self) -> list[dict[str, Any]]:
        """As the chat template takes them."""
        return template_messages(self.messages)

    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is shown."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


# ----------------------------------------------------------------------------- the other routes


class CompletionRequest(Generation):
    """POST /v1/completions. `prompt` is text, token ids, or a list of either."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_FIELD)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: Annotated[int | None, BeforeValidator(_only(1, why="ask for n answers and choose"))] = None
    suffix: Annotated[str | None, BeforeValidator(_only("", why="write the FIM tokens into the prompt"))] = None

    @model_validator(mode="after")
    def _nothing_to_generate(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 makes sense with echo only")
        return self

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
    tokens: list[TokenId] = Field(max_length=1_000_000)


class WeightsRequest(Part):
    """POST /admin/weights: take the weights of a model folder on this machine, and call them `version`."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    version: int = Field(ge=0, le=2**53)


# ----------------------------------------------------------------------------- reading

Model = TypeVar("Model", bound=Part)


def validate(kind: type[Model], body: dict[str, Any], *, strict: bool = False) -> Model:
    """`body` as a request of `kind`. ApiError 400 naming the first field that is wrong; `strict`: or unknown."""
    try:
        return kind.model_validate(body, extra="forbid" if strict else "ignore")
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


_UNION_TAGS = frozenset({"system", "developer", "user", "assistant", "tool", "str", "int", "NamedTool", "AllowedTools"})
