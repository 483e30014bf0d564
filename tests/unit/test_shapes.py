"""Laws of foreign conversations: each format gives the one form, whatever it lies in, and bad rows are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.conversations import Conversation, conversations, read_conversations, source_of
from glmctl.data.shapes import COLUMNS, convert, detect
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import ConversationFiles

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"name": "add", "arguments": {"a": 1}}


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def says(role: str, text: Any) -> dict[str, Any]:
    return {"from": role, "value": text}


ASKED = [u("q"), a("r")]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": ASKED, "id": 7}, {"messages": ASKED}),
    "messages with tools as text": (
        {"messages": ASKED, "tools": json.dumps([TOOL])},
        {"messages": ASKED, "tools": [TOOL]},
    ),
    "messages without thinking": (
        {"messages": ASKED, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": ASKED, "enable_thinking": False},
    ),
    "prompt and completion as text": ({"prompt": "q", "completion": "r"}, {"messages": ASKED}),
    "prompt and completion as messages": (
        {"prompt": [u("p"), a("o"), u("q")], "completion": [a("r")], "tools": [TOOL]},
        {"messages": [u("p"), a("o", weight=0), *ASKED], "tools": [TOOL]},
    ),
    "sharegpt": (
        {"conversations": [says("human", "q"), says("gpt", "r")], "system": "s"},
        {"messages": [{"role": "system", "content": "s"}, *ASKED]},
    ),
    "sharegpt with roles of its own": (
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        {"messages": ASKED},
    ),
    "sharegpt with function calls": (
        {
            "conversations": [
                says("human", "q"),
                says("gpt", "let me see"),
                says("function_call", json.dumps(CALL)),
                says("observation", "1"),
                says("function_call", json.dumps([CALL, CALL])),
                says("observation", "2"),
                says("gpt", "r"),
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                u("q"),
                a("let me see", tool_calls=[{"type": "function", "function": CALL}]),
                {"role": "tool", "content": "1"},
                a("", tool_calls=[{"type": "function", "function": CALL}] * 2),
                {"role": "tool", "content": "2"},
                a("r"),
            ],
            "tools": [TOOL],
        },
    ),
    "alpaca": ({"instruction": "q", "output": "r", "input": ""}, {"messages": ASKED}),
    "alpaca with input, system and history": (
        {"instruction": "q", "input": "i", "output": "r", "system": "s", "history": [["p", "o"]]},
        {"messages": [{"role": "system", "content": "s"}, u("p"), a("o"), u("q\n\ni"), a("r")]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_format_is_recognised_and_gives_the_one_form(name: str) -> None:
    row, wanted = CASES[name]
    assert convert(row, detect(row)) == wanted


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "columns text are of no known format"),
        ({"conversations": []}, "non-empty list"),
        ({"conversations": [says("robot", "x")]}, r"conversations\[0\]: 'from' is 'robot'"),
        ({"conversations": [says("function_call", "{")]}, r"conversations\[0\]: the function call: not JSON"),
        ({"conversations": ["x"]}, r"conversations\[0\]: not an object"),
        ({"instruction": 3, "output": "r"}, "'instruction' must be text"),
        ({"instruction": "q", "output": "r", "history": [["a"]]}, "'history'"),
        ({"prompt": 3, "completion": "r"}, "'prompt' must be text"),
        ({"messages": ASKED, "tools": "["}, "'tools': not JSON"),
    ],
)
def test_what_keeps_a_row_from_being_a_conversation_is_said(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        convert(row, detect(row))


def test_a_given_format_is_not_guessed() -> None:
    assert set(COLUMNS) == {"messages", "prompt_completion", "sharegpt", "alpaca"}
    with pytest.raises(DataError, match="no 'instruction', which a alpaca row has"):
        convert({"messages": ASKED}, "alpaca")


# ------------------------------------------------------------------ what they lie in

ROWS = [{"messages": [u(f"q{i}"), a(f"r{i}", reasoning_content="why")], "tools": [TOOL]} for i in range(5)]
TALKS = [Conversation(row["messages"], row["tools"]) for row in ROWS]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_json_in_every_container_gives_the_same_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(ROWS))
    (tmp_path / "c.json").write_text(lines(ROWS))  # many call JSON lines .json
    for file in tmp_path.iterdir():
        assert read_conversations([file]) == TALKS, file.name


def test_arrow_in_every_container_gives_the_same_conversations(tmp_path: Path) -> None:
    """Arrow gives every message every key of any message; those that were not there are not there again."""
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "parts")
    file = tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"
    for path in (file, tmp_path / "hub", tmp_path / "saved", tmp_path / "parts"):
        assert read_conversations([path]) == TALKS, path.name
    for path in (tmp_path / "hub", tmp_path / "parts"):
        assert read_conversations([ConversationFiles(path=str(path), split="test")]) == TALKS[:1]
        with pytest.raises(RecipeError if path.name == "parts" else DataError, match="nowhere"):
            read_conversations([ConversationFiles(path=str(path), split="nowhere")])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="damaged Parquet"):
        read_conversations([tmp_path / "broken.parquet"])


def test_bad_rows_are_all_counted_and_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad: list[Any] = [{"messages": []}, {"messages": [u("q")]}, {"messages": []}]
    path.write_text(lines([ROWS[0], bad[0], ROWS[1], bad[1], bad[2]]) + "{\n")
    with pytest.raises(DataError) as raised:
        read_conversations([path])
    assert raised.value.exit_code == 3
    said = raised.value.message
    assert said.startswith(f"{path}:2: 'messages' must be a non-empty list; ")
    assert f"1 x the last message must be the assistant's (first: {path}:4)" in said
    assert f"{path}:6" in said
    assert "4 of 6 rows are no conversations" in said
    assert read_conversations([path], bad_rows=0.7) == TALKS[:2]
    places = [place for place, row in conversations(source_of(path)) if isinstance(row, DataError)]
    assert places == [f"{path}:{line}" for line in (2, 4, 5, 6)]


def test_a_source_of_nothing_but_bad_rows_is_refused_however_many_may_be_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"messages": []}]))
    with pytest.raises(DataError, match="1 of 1 rows"):
        read_conversations([path], bad_rows=1.0)


def test_rows_of_a_json_list_are_named_by_the_line_they_begin_at(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"messages":\n []},\n\n{"messages": 3}\n]')
    with pytest.raises(DataError, match=rf"{path}:2: .*2 of 2 rows"):
        read_conversations([path])
    path.write_text('[\n{"a": 1}\n{"a": 2}]')
    with pytest.raises(DataError, match=rf"{path}:2: not JSON: a comma"):
        read_conversations([path])
    path.write_text('[\n{"a": 1},\n{"a": ')
    with pytest.raises(DataError, match=rf"{path}:3: not JSON"):
        read_conversations([path])


def test_a_source_is_a_path_or_a_name_and_not_both() -> None:
    for given in ({}, {"path": "a", "dataset": "b"}):
        with pytest.raises(ValueError, match="one of path and dataset"):
            ConversationFiles(**given)
