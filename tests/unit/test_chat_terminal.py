"""The conversation on the terminal: commands, lines that go on, tool results, and text that may not escape."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace as Thing
from typing import Any

import openai
import pytest

from glmctl.serving.terminal import Terminal


def delta(**fields: Any) -> Any:
    return Thing(**{"content": None, "tool_calls": None, "reasoning_content": None, **fields})


def part(index: int, name: str | None = None, arguments: str | None = None) -> Any:
    return Thing(index=index, id=f"call-{index}" if name else None, function=Thing(name=name, arguments=arguments))


class Client:
    """Answers with the prepared turns; remembers what it was asked."""

    def __init__(self, *turns: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self.turns = list(turns)
        self.chat = Thing(completions=Thing(create=self.create))

    def create(self, **fields: Any) -> Any:
        self.asked.append(json.loads(json.dumps(fields)))
        turn = self.turns.pop(0)
        if isinstance(turn, BaseException):
            raise turn
        return Stream(turn)


class Stream:
    def __init__(self, turn: list[Any]) -> None:
        self.turn = turn
        self.closed = False

    def __iter__(self) -> Iterator[Any]:
        for each, finish in self.turn:
            if isinstance(each, BaseException):
                raise each
            yield Thing(choices=[Thing(delta=each, finish_reason=finish)])

    def close(self) -> None:
        self.closed = True


HELLO = [(delta(reasoning_content="hm"), None), (delta(content="Hi"), None), (delta(), "stop")]


def talk(client: Client, *lines: str, colour: bool = False) -> tuple[str, Terminal]:
    given = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    out = io.StringIO()
    terminal = Terminal(client, "tiny", {"temperature": 0}, read=read, out=out, colour=colour)
    terminal.run()
    return out.getvalue(), terminal


def test_thinking_is_dimmed_and_the_answer_is_not() -> None:
    assert talk(Client(HELLO), "hello", colour=True)[0] == "\x1b[2mhm\x1b[0m\nHi\x1b[0m\n"
    assert talk(Client(HELLO), "hello")[0] == "(thinking) hm\nHi\n"


def test_the_history_goes_along() -> None:
    client = Client(HELLO, HELLO)
    talk(client, "/system Be brief.", "one", "two")
    assert [message["role"] for message in client.asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert client.asked[1]["messages"][2] == {"role": "assistant", "content": "Hi", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    "lines",
    [["first \\", "second"], ['"""', "first ", "second", '"""']],
    ids=["backslash", "block"],
)
def test_messages_of_several_lines(lines: list[str]) -> None:
    client = Client(HELLO)
    talk(client, *lines)
    assert client.asked[0]["messages"][0]["content"] == "first \nsecond"


def test_nothink_as_a_command_and_as_a_suffix() -> None:
    client = Client(HELLO, HELLO, HELLO)
    talk(client, "/nothink", "a", "/think", "b", "c /nothink")
    thinks = [asked["extra_body"]["chat_template_kwargs"]["enable_thinking"] for asked in client.asked]
    assert thinks == [False, True, False]
    assert client.asked[2]["messages"][-1]["content"] == "c"


def test_a_tool_call_is_shown_and_its_result_asked_for(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    calls = [
        (delta(tool_calls=[part(0, "f", "")]), None),
        (delta(tool_calls=[part(0, None, '{"a": 1}')]), None),
        (delta(tool_calls=[part(1, "f", "{}")]), None),
        (delta(), "tool_calls"),
    ]
    client = Client(calls, HELLO)
    shown, _ = talk(client, f"/tools {tmp_path / 'tools.json'}", "go", "one", "two")
    assert shown.startswith('f {"a": 1} f {}\n')
    assert client.asked[0]["tools"] == tools
    tail = client.asked[1]["messages"][-3:]
    assert [call["function"]["arguments"] for call in tail[0]["tool_calls"]] == ['{"a": 1}', "{}"]
    assert [(message["tool_call_id"], message["content"]) for message in tail[1:]] == [
        ("call-0", "one"),
        ("call-1", "two"),
    ]


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    client = Client([(delta(content="Hal"), None), (KeyboardInterrupt(), None)], HELLO)
    shown, _ = talk(client, "a", "b")
    assert "Hal\n(stopped)\n" in shown
    assert client.asked[1]["messages"][1] == {"role": "assistant", "content": "Hal"}


def test_an_error_is_one_line_and_takes_the_question_back() -> None:
    client = Client(openai.OpenAIError("no \x1b[2Jsuch model"), HELLO)
    shown, _ = talk(client, "a", "b")
    assert shown.splitlines()[1] == "no \ufffd[2Jsuch model"
    assert [message["content"] for message in client.asked[1]["messages"]] == ["b"]


def test_control_characters_never_reach_the_terminal() -> None:
    evil = "\x1b]0;title\x07 \x9b31m \x08 tab\tline\n"
    shown, _ = talk(Client([(delta(content=evil), "stop")]), "a")
    assert shown == "\ufffd]0;title\ufffd \ufffd31m \ufffd tab\tline\n\n"


def test_commands(tmp_path: Path) -> None:
    client = Client(HELLO, HELLO)
    saved = tmp_path / "talk.jsonl"
    shown, terminal = talk(
        client, "/wat", "/tools /nowhere", "a", f"/save {saved}", "/clear", "b", "/quit", "never asked"
    )
    assert "unknown command /wat" in shown
    assert "/nowhere: No such file" in shown
    assert [message["content"] for message in json.loads(saved.read_text())["messages"]] == ["a", "Hi"]
    assert len(client.asked[1]["messages"]) == 1
    assert len(terminal.conversation.messages) == 2
