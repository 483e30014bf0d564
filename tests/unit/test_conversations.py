"""Laws of conversation files: what is read is what was written, and the first bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.conversations import Conversation, read_conversations
from glmctl.errors import DataError, RecipeError

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a", "reasoning_content": "r"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
}


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    talks = [
        Conversation([USER, REPLY]),
        Conversation([USER, CALL, {"role": "tool", "content": "1"}, REPLY], [{"name": "f"}]),
        Conversation([USER, {"role": "assistant", "content": "a"}], None, False),
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(talk.row()) + "\n\n" for talk in talks))
    assert read_conversations([path]) == talks


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ({}, "'messages'"),
        ({"messages": []}, "'messages'"),
        ({"messages": [USER]}, "last message"),
        ({"messages": ["x", REPLY]}, r"messages\[0\]: not an object"),
        ({"messages": [{"role": "robot"}, REPLY]}, r"messages\[0\]: role 'robot'"),
        ({"messages": [{"role": "user"}, REPLY]}, "needs content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]}, "text parts only"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "needs content or tool calls"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "function name"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "arguments of f: not JSON",
        ),
        ({"messages": [USER, REPLY], "tools": {"a": 1}}, "'tools'"),
        ({"messages": [USER, REPLY], "enable_thinking": "no"}, "'enable_thinking'"),
        ({"messages": [USER, REPLY], "enable_thinking": False}, "enable_thinking is false"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, row: Any, problem: str) -> None:
    good = json.dumps(Conversation([USER, REPLY]).row())
    path = tmp_path / "c.jsonl"
    path.write_text(f"{good}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"c\.jsonl:2: .*{problem}"):
        read_conversations([path])


def test_a_missing_file_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        read_conversations([tmp_path / "absent.jsonl"])
