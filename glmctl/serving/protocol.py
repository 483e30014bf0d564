"""What clients may ask, field by field, with every bound checked before any work is done.

OpenAI's names, all of them: a field that would change the answer and that this server cannot honour is refused by
name, one that would not is accepted. Beyond them, the names that vLLM, SGLang and Z.ai servers share (top_k, min_p,
chat_template_kwargs, thinking ...). Any other name is ignored, as those servers do, or refused with `--strict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from glmctl.engine.request import MAX_TOP_LOGPROBS
from glmctl.serving.body import MAX_VALUES
from glmctl.serving.messages import (
    MAX_TOOLS,
    Message,
    Name,
    Part,
    ShortText,
    ToolSpec,
    conflict,
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
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_VALUES)]
PromptText = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]

# as the document shows what a validator makes of several forms
_ONE_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = {"anyOf": [_ONE_STOP, {"type": "array", "items": _ONE_STOP, "maxItems": MAX_STOPS}, {"type": "null"}]}
_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "maxProperties": MAX_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,8}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ]
}


def _form_of_prompt(value: Any) -> str:
    """By its first item, so that an error is about the form that was meant."""
    if isinstance(value, str):
        return "text-prompt"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list):
        return "token-prompts"
    return "text-prompts" if isinstance(first, str) else "token-prompt"


Prompt = Annotated[
    Annotated[PromptText, Tag("text-prompt")]
    | Annotated[TokenIds, Tag("token-prompt")]
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS), Tag("text-prompts")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("token-prompts")],
    Discriminator(_form_of_prompt),
]


@dataclass(frozen=True)
class _Only:
    """For a field that would change the answer and cannot be honoured: anything but null and `neutral` is refused."""

    why: str
    neutral: tuple[Any, ...] = ()

    def _check(self, value: Any) -> Any:
        if value is not None and value not in self.neutral:
            raise ValueError(f"not supported by this server: {self.why}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [*self.neutral, None]}


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
            raise conflict("", "give exactly one of json, regex and choice")
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
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, WithJsonSchema(_BIAS_SCHEMA)] = (
        Field(None, max_length=MAX_BIASES)
    )
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_FIELD)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[StopString] | None, WithJsonSchema(_STOP_SCHEMA)] = Field(None, max_length=MAX_STOPS)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[None, _Only("use response_format")] = None
    guided_regex: Annotated[None, _Only("use structured_outputs")] = None
    guided_choice: Annotated[None, _Only("use structured_outputs")] = None
    guided_grammar: Annotated[None, _Only("use structured_outputs")] = None
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
            raise conflict("stream_options", "needs stream")
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
            raise conflict("", "json_schema is given with type 'json_schema', and only then")
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
    modalities: Annotated[list[str] | None, _Only("this model writes text", (["text"],))] = None
    verbosity: Annotated[ShortText | None, _Only("ask for it in words", ("medium",))] = None
    audio: Annotated[None, _Only("this model writes text")] = None
    functions: Annotated[None, _Only("use tools")] = None
    function_call: Annotated[None, _Only("use tool_choice")] = None
    web_search_options: Annotated[None, _Only("it searches nothing")] = None
    moderation: Annotated[None, _Only("it moderates nothing")] = None
    # accepted and without effect on the answer
    prediction: dict[str, Any] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: ShortText | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fields_that_need_each_other(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "needs logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise conflict("tools", "two of them have the same name")
        for name in self.chosen_tools or ():
            if name not in names:
                raise conflict("tool_choice", f"no tool is called '{name}'")
        if self.must_call and not names:
            raise conflict("tool_choice", "needs tools")
        if self.structured_outputs is not None and self.response_format is not None:
            raise conflict("structured_outputs", "response_format says the same thing; give one of them")
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

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS_FIELD)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: Annotated[int | None, _Only("ask for n answers and choose", (1,))] = None
    suffix: Annotated[str | None, _Only("write the FIM tokens into the prompt", ("",))] = None

    @model_validator(mode="after")
    def _nothing_to_generate(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "0 makes sense with echo only")
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
            raise conflict("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Part):
    """POST /detokenize"""

    model: ShortText | None = None
    tokens: list[TokenId] = Field(max_length=MAX_VALUES)


class WeightsRequest(Part):
    """POST /admin/weights: take the weights of a model folder on this machine, and call them `version`."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    version: int = Field(ge=0, le=2**53)
