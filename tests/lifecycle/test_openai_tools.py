"""Tool calls and structured answers through the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pydantic
import pytest

from glmctl.data.tokenizer import Tokenizer

MESSAGES: Any = [{"role": "user", "content": "Stock of 3 bolts?"}]
NOTHINK: Any = {"chat_template_kwargs": {"enable_thinking": False}}
ONE_CALL: Any = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120}
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"enum": ["bolt", "nut"]}, "count": {"enum": [1, 2, 3]}, "ok": {"type": "boolean"}},
    "required": ["name", "count", "ok"],
    "additionalProperties": False,
}


def tool(name: str, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **more}}


STOCK, ORDER = tool("get_stock"), tool("order")


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": NOTHINK,
        **fields,
    }
    return client.chat.completions.create(**fields)


def say(client: openai.OpenAI, **fields: Any) -> str:
    return ask(client, **fields).choices[0].message.content or ""


# ------------------------------------------------------------------ tools


def test_required_tool_call(random_client: openai.OpenAI) -> None:
    choice = ask(
        random_client, tools=[STOCK, ORDER], tool_choice="required", parallel_tool_calls=False, max_tokens=120
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name in ("get_stock", "order")
    assert json.loads(call.function.arguments).keys() == {"name", "count", "ok"}
    assert choice.message.content is None


def test_named_tool_call(random_client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "order"}}
    (call,) = ask(random_client, tools=[STOCK, ORDER], tool_choice=named, max_tokens=120).choices[0].message.tool_calls
    assert call.function.name == "order"


def test_allowed_tools(random_client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "order"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    answer = ask(random_client, tools=[STOCK, ORDER], tool_choice=choice, parallel_tool_calls=False, max_tokens=120)
    assert answer.choices[0].message.tool_calls[0].function.name == "order"


def test_arguments_follow_their_schema(random_client: openai.OpenAI) -> None:
    (call,) = (
        ask(
            random_client,
            tools=[STOCK],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=2,
            seed=9,
            max_tokens=120,
        )
        .choices[0]
        .message.tool_calls
    )
    arguments = json.loads(call.function.arguments)
    assert arguments["name"] in ("bolt", "nut")
    assert arguments["count"] in (1, 2, 3)
    assert isinstance(arguments["ok"], bool)


def test_parallel_calls_are_numbered(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(token): -100 for token in tiny_tokenizer.eos_ids}
    stream = ask(random_client, tools=[STOCK], tool_choice="required", logit_bias=bias, max_tokens=200, stream=True)
    indexes = [part.index for chunk in stream for c in chunk.choices for part in c.delta.tool_calls or ()]
    assert indexes == sorted(indexes)
    assert max(indexes) >= 1


def test_streamed_tool_call_joins_to_the_whole(random_client: openai.OpenAI) -> None:
    fields: Any = {"tools": [STOCK], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120}
    whole = ask(random_client, **fields).choices[0].message.tool_calls[0].function
    name, text, identity, finish = "", "", "", None
    for chunk in ask(random_client, stream=True, **fields):
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for part in choice.delta.tool_calls or ():
                identity += part.id or ""
                name += part.function.name or ""
                text += part.function.arguments or ""
    assert (name, json.loads(text)) == (whole.name, json.loads(whole.arguments))
    assert identity.startswith("call")
    assert finish == "tool_calls"


def test_arguments_stream_in_pieces(random_client: openai.OpenAI) -> None:
    stream = ask(
        random_client, tools=[STOCK], tool_choice="required", parallel_tool_calls=False, max_tokens=120, stream=True
    )
    pieces = [part for chunk in stream for c in chunk.choices for part in c.delta.tool_calls or ()]
    assert len(pieces) >= 4


def test_tool_choice_none_calls_nothing(random_client: openai.OpenAI) -> None:
    assert ask(random_client, tools=[STOCK], tool_choice="none").choices[0].message.tool_calls is None


def test_strict_tools_bind_under_auto(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(tiny_tokenizer.id("<tool_call>")): 100}
    strict = tool("get_stock", strict=True)
    choice = ask(random_client, tools=[strict], logit_bias=bias, parallel_tool_calls=False, max_tokens=120).choices[0]
    assert json.loads(choice.message.tool_calls[0].function.arguments).keys() == {"name", "count", "ok"}


# ------------------------------------------------------------------ structured output


def test_json_schema(random_client: openai.OpenAI) -> None:
    wish: Any = {"type": "json_schema", "json_schema": {"name": "stock", "schema": SCHEMA, "strict": True}}
    answer = ask(random_client, response_format=wish, temperature=2, seed=3, max_tokens=200).choices[0]
    assert answer.finish_reason == "stop"
    assert json.loads(answer.message.content).keys() == {"name", "count", "ok"}


def test_json_object(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(tiny_tokenizer.encode_plain("}")[0]): 50}
    text = say(random_client, response_format={"type": "json_object"}, logit_bias=bias, max_tokens=50)
    assert json.loads(text) == {}


def test_streamed_json_schema(random_client: openai.OpenAI) -> None:
    wish: Any = {"type": "json_schema", "json_schema": {"name": "stock", "schema": SCHEMA}}
    stream = ask(random_client, response_format=wish, max_tokens=200, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text).keys() == {"name", "count", "ok"}


def test_parse_helper_gives_an_object(random_client: openai.OpenAI) -> None:
    class Stock(pydantic.BaseModel):
        ok: bool
        other: bool

    answer = random_client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Stock, max_tokens=100, temperature=0, extra_body=NOTHINK
    )
    assert isinstance(answer.choices[0].message.parsed, Stock)


def test_regex(random_client: openai.OpenAI) -> None:
    text = say(random_client, extra_body={**NOTHINK, "structured_outputs": {"regex": r"[a-c]{2}-\d{3}"}})
    assert re.fullmatch(r"[a-c]{2}-\d{3}", text)


def test_choice(random_client: openai.OpenAI) -> None:
    assert say(random_client, extra_body={**NOTHINK, "structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")


def test_the_grammar_starts_after_thinking(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    """The random thought may be anything; what follows `</think>` is the choice, and the answer cannot end before."""
    bias = {str(tiny_tokenizer.id("</think>")): 12, str(tiny_tokenizer.eos_ids[1]): 12}
    wish = {"structured_outputs": {"choice": ["yes", "no"]}}
    choice = ask(random_client, extra_body=wish, logit_bias=bias, max_tokens=200, temperature=1, seed=1).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content.endswith(("yes", "no")) or choice.message.reasoning_content


def test_a_schema_that_cannot_be_followed_names_its_field(random_client: openai.OpenAI) -> None:
    wish: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}
    with pytest.raises(openai.BadRequestError) as error:
        ask(random_client, response_format=wish)
    assert (error.value.param, error.value.code) == ("response_format", "invalid_schema")
