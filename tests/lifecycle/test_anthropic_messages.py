"""Anthropic's dialect through Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from glmctl.serving.server import Server

MESSAGES: Any = [{"role": "user", "content": "Stock of 3 bolts?"}]
GREEDY: Any = {"temperature": 0}
NOTHINK: Any = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"enum": ["bolt", "nut"]}, "count": {"enum": [1, 2, 3]}, "ok": {"type": "boolean"}},
    "required": ["name", "count", "ok"],
    "additionalProperties": False,
}


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


# ------------------------------------------------------------------ Anthropic's dialect, by Anthropic's random_client


@pytest.fixture(scope="module")
def claude(random_server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=random_server.url, api_key="none", max_retries=0, timeout=120) as random_client:
        yield random_client


def test_messages_answer(claude: anthropic.Anthropic, random_client: openai.OpenAI) -> None:
    answer = claude.messages.create(model="tiny", messages=MESSAGES, max_tokens=12, extra_body=GREEDY)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert "".join(block.text for block in answer.content if block.type == "text") == say(random_client)
    assert answer.usage.output_tokens <= 12


def test_messages_stream_joins_to_the_whole(claude: anthropic.Anthropic, random_client: openai.OpenAI) -> None:
    with claude.messages.stream(model="tiny", messages=MESSAGES, max_tokens=12, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == say(random_client)
        assert stream.get_final_message().usage.output_tokens > 0


def test_messages_thinking_block(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model="tiny", messages=MESSAGES, max_tokens=12, thinking={"type": "enabled", "budget_tokens": 1024}
    ) as stream:
        message = stream.get_final_message()
    assert message.role == "assistant"
    assert all(block.type in ("thinking", "text") for block in message.content)


@pytest.mark.parametrize("streamed", [False, True])
def test_messages_tool_use(claude: anthropic.Anthropic, streamed: bool) -> None:
    fields: Any = {
        "model": "tiny",
        "max_tokens": 120,
        "extra_body": GREEDY,
        "system": "Use tools.",
        "tools": [{"name": "get_stock", "description": "d", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "get_stock", "disable_parallel_tool_use": True},
    }
    if streamed:
        with claude.messages.stream(messages=MESSAGES, **fields) as stream:
            message = stream.get_final_message()
    else:
        message = claude.messages.create(messages=MESSAGES, **fields)
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.input.keys() == {"name", "count", "ok"}
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "12"}
    history: Any = [*MESSAGES, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    # without a choice of tools their declarations are not in the prompt; the call and its result are
    without: Any = {**fields, "tool_choice": {"type": "none"}, "max_tokens": 2}
    alone = claude.messages.create(messages=MESSAGES, **without)
    again = claude.messages.create(messages=history, **without)
    assert again.usage.input_tokens > alone.usage.input_tokens + message.usage.output_tokens // 2


def test_messages_stop_sequence(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(model="tiny", messages=MESSAGES, max_tokens=12, extra_body=GREEDY)
    text = "".join(block.text for block in whole.content if block.type == "text")
    stop = text[3:5]
    answer = claude.messages.create(
        model="tiny", messages=MESSAGES, max_tokens=12, stop_sequences=[stop], extra_body=GREEDY
    )
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)


def test_messages_count_tokens(claude: anthropic.Anthropic) -> None:
    count = claude.messages.count_tokens(model="tiny", messages=MESSAGES)
    answer = claude.messages.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert count.input_tokens == answer.usage.input_tokens


def test_messages_errors_have_their_own_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as error:
        claude.messages.create(model="huge", messages=MESSAGES, max_tokens=1)
    assert error.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model="tiny", messages=MESSAGES, max_tokens=0)
