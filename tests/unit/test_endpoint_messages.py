"""What an endpoint's reply becomes: one of our messages, or broken in a way that has a name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

from glmctl.distill.endpoint import incoming

HALF = "\ud83d"


def reply(content: str, arguments: str | None = None) -> ChatCompletionMessage:
    body: dict[str, Any] = {"role": "assistant", "content": content}
    if arguments is not None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        body["tool_calls"] = [call]
    return ChatCompletionMessage.model_validate(body)


@pytest.mark.parametrize(
    ("content", "arguments"), [(f"a {HALF}", None), ("", '{"k": ["\\ud83d"]}'), ("", f'{{"{HALF}": 1}}')]
)
def test_half_a_character_is_broken_and_can_be_written_down(content: str, arguments: str | None) -> None:
    given = reply("x", "{}" if arguments is not None else None)
    # past the client's own validation, as a server's escaped JSON gets there
    object.__setattr__(given, "content", content)
    if given.tool_calls:
        object.__setattr__(given.tool_calls[0].function, "arguments", arguments)
    message, broken = incoming(given)
    assert broken == "half a character (a lone surrogate)"
    assert message == {"role": "assistant", "content": ""}


def test_whole_characters_pass() -> None:
    message, broken = incoming(reply("😀", '{"k": "\\ud83d\\ude00"}'))
    assert broken == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"k": "😀"}
