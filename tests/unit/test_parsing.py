"""Laws of the parser: it inverts the template, never disagrees with its stream, and names what is malformed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.chat import ChatTemplate
from glmctl.data.parsing import Delta, Parsed, StreamParser, parse
from glmctl.data.tokenizer import Tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "run_code",
            "parameters": {
                "type": "object",
                "properties": {
                    "source": {"type": "string"},
                    "count": {"type": "integer"},
                    "ratio": {"type": "number"},
                    "options": {"type": "object"},
                    "items": {"type": "array"},
                    "flag": {"type": "boolean"},
                    "maybe": {"type": ["string", "null"]},
                    "mode": {"enum": ["fast", "1"]},
                    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                },
            },
        },
    },
    {"name": "stop", "parameters": {"type": "object", "properties": {}}},
]

PIECES = [*"abcxyz019 \n\t\"'\\{}[]()<>/|=+-*#:;,.`$%&数é😀", "def f():\n    return 'x'\n", '"""', "\\n", "\r\n"]


def code(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.choice((0, 1, 3, 12, 30))))


def json_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind < 2:
        return code(rng)
    if kind < 5:
        return rng.choice((None, True, False, rng.randrange(-(10**12), 10**12), rng.uniform(-1e9, 1e9), 1e-300))
    if kind == 5:
        return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {code(rng): json_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def call(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.2:
        return {"name": "stop", "arguments": {}}
    values: dict[str, Any] = {
        "source": code(rng),
        "count": rng.randrange(-(10**20), 10**20),
        "ratio": rng.gauss(0, 1e6),
        "options": {code(rng): json_value(rng)},
        "items": [json_value(rng) for _ in range(3)],
        "flag": rng.random() < 0.5,
        "mode": rng.choice(("fast", "1")),
        # text that is no JSON: without a type, a string that reads as a number is one
        "untyped": "~" + code(rng),
        "maybe": rng.choice((None, "~" + code(rng))),
    }
    chosen = rng.sample(sorted(values), rng.randrange(5))
    return {"name": "run_code", "arguments": {key: values[key] for key in chosen}}


def messages(seed: int, count: int) -> Iterator[tuple[str | None, str, list[Any]]]:
    """(reasoning, content, tool calls) with quotes, newlines, tags in pieces and code, none with a whole tag."""
    rng = random.Random(seed)
    while count:
        reasoning, content = code(rng).strip(), code(rng).strip()
        if without_tags(reasoning + content):
            count -= 1
            yield reasoning or None, content, [call(rng) for _ in range(rng.choice((0, 0, 1, 1, 3)))]


def without_tags(text: str) -> bool:
    return not any(tag in text for tag in ("<think", "</think", "tool_call>", "<arg", "</arg", "<|", "[gMASK", "<sop"))


def rendered(template: ChatTemplate, message: tuple[str | None, str, list[Any]]) -> str:
    """The assistant's part of the rendered conversation, its closing role token included."""
    said = Parsed(*message, True, None).message()
    text = template.render([{"role": "user", "content": "q"}, said])
    closing = "<|observation|>" if said.get("tool_calls") else "<|user|>"
    return text.split("<|assistant|>", 1)[1] + closing


def test_parsing_inverts_rendering(tiny_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tiny_tokenizer)
    for message in messages(seed=0, count=1000):
        assert parse(rendered(template, message), tools=TOOLS) == Parsed(*message, True, None)


def test_parsing_inverts_decoded_tokens(tiny_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tiny_tokenizer)
    for message in messages(seed=1, count=100):
        said = Parsed(*message, True, None).message()
        encoded = template.encode_training([{"role": "user", "content": "q"}, said])
        own = [token for token, mask in zip(encoded.tokens, encoded.loss_mask, strict=True) if mask]
        assert parse(tiny_tokenizer.decode(own), tools=TOOLS) == Parsed(*message, True, None)


def test_without_thinking_the_text_starts_after_the_think_block(tiny_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tiny_tokenizer)
    for message in messages(seed=2, count=200):
        text = rendered(template, (None, *message[1:]))
        assert parse(text, thinking=False, tools=TOOLS) == Parsed(None, *message[1:], True, None)
        after = text.removeprefix("\n<think></think>")
        assert parse(after, thinking=False, tools=TOOLS) == Parsed(None, *message[1:], True, None)


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
SCRAPS = ["<|user|>", "<|assistant|>", "<thi", "</tool_c", "<", "f", "f\n", "\\n", "5", '{"a":', '"x"', " ", "\n", "数"]
HOSTILE = st.lists(st.sampled_from(TAGS + SCRAPS), max_size=24).map("".join)


def joined(deltas: list[Delta]) -> tuple[str, str, list[list[str]]]:
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.tool_name is not None:
            assert delta.tool_index == len(calls)
            calls.append([delta.tool_name, ""])
        if delta.arguments is not None:
            assert delta.tool_index == len(calls) - 1
            calls[-1][1] += delta.arguments
    return (
        "".join(delta.reasoning or "" for delta in deltas),
        "".join(delta.content or "" for delta in deltas),
        calls,
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(HOSTILE, st.integers(1, 7), st.booleans())
def test_a_stream_says_what_the_whole_text_says(text: str, step: int, thinking: bool) -> None:
    whole = StreamParser(thinking, TOOLS)
    whole_deltas = whole.feed(text) + whole.finish()
    stream = StreamParser(thinking, TOOLS)
    deltas = [d for at in range(0, len(text), step) for d in stream.feed(text[at : at + step])] + stream.finish()
    assert stream.parsed == whole.parsed
    reasoning, content, calls = joined(deltas)
    assert (reasoning, content, calls) == joined(whole_deltas)
    assert (reasoning or None, content) == (stream.parsed.reasoning, stream.parsed.content)
    complete = [{"name": n, "arguments": json.loads(a)} for n, a in calls if a.endswith("}") and _is_json(a)]
    assert [c for c in complete if c in stream.parsed.tool_calls] == stream.parsed.tool_calls


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_stream_passes_text_on_at_once_and_holds_back_what_may_be_a_tag() -> None:
    stream = StreamParser(True, TOOLS)
    assert stream.feed("\n<thi") == []
    assert stream.feed("nk>let me") == [Delta(reasoning="let me")]
    assert stream.feed(" see\n</thi") == [Delta(reasoning=" see")]
    assert stream.feed("s too") == [Delta(reasoning="\n</this too")]
    assert stream.feed("</think>\n") == []
    assert stream.feed("Look: ") == [Delta(content="Look:")]
    assert stream.feed("a <b\n") == [Delta(content=" a <b")]
    assert stream.feed("<tool_call>run_code\n<arg_key>count</arg_key>\n") == [Delta(tool_index=0, tool_name="run_code")]
    assert stream.feed("<arg_value>4") == []
    assert stream.feed("2</arg_value>\n") == [Delta(tool_index=0, arguments='{"count": 42')]
    assert stream.feed("</tool_call>") == [Delta(tool_index=0, arguments="}")]
    assert stream.finish() == []
    assert stream.parsed.tool_calls == [{"name": "run_code", "arguments": {"count": 42}}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-1.5e3", -1500.0),
        ("true", True),
        ("null", None),
        ('{"a": [1]}', {"a": [1]}),
        ("[]", []),
        ('"quoted"', '"quoted"'),
        ("plain", "plain"),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        ('["\\ud800"]', '["\\ud800"]'),
        ("{broken", "{broken"),
        ("", ""),
        ("9" * 5000, "9" * 5000),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_without_a_schema_a_value_is_json_unless_it_is_text(text: str, value: Any) -> None:
    call = f"\n<think></think>\n<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    parsed = parse(call)
    assert parsed.well_formed
    assert parsed.tool_calls == [{"name": "f", "arguments": {"k": value}}]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("source", "5", "5"),
        ("source", " x\n", " x\n"),
        ("count", "5", 5),
        ("count", "five", "five"),
        ("maybe", "null", None),
        ("maybe", "5", "5"),
        ("mode", "1", "1"),
        ("either", "5", 5),
        ("either", "[5]", "[5]"),
        ("unheard_of", "5", 5),
    ],
)
def test_the_schema_decides_what_stays_text(key: str, text: str, value: Any) -> None:
    call = f"<tool_call>run_code\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    assert parse(call, thinking=False, tools=TOOLS).tool_calls[0]["arguments"] == {key: value}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("boolean", "True", True),
        ("boolean", " False ", False),
        ("boolean", "yes", "yes"),
        (["integer", "null"], "None", None),
        ("object", "{'a': 1, 'b': (True, None)}", {"a": 1, "b": [True, None]}),
        ("object", '{\\"a\\": \\"x\\"}', {"a": "x"}),
        ("object", "{1: 2}", "{1: 2}"),
        ("array", "['x', \"it's\"]", ["x", "it's"]),
        ("array", "[1e999]", "[1e999]"),
        ("array", "{1, 2}", "{1, 2}"),
        ("array", "__import__('os')", "__import__('os')"),
        ("array", "(" * 5000, "(" * 5000),
        ("array", "'text'", "'text'"),
        # where a string may stand, a word of Python is a word
        (["string", "boolean"], "True", "True"),
        (None, "True", "True"),
    ],
)
def test_where_no_string_is_allowed_escaped_json_and_python_are_read(kind: Any, text: str, value: Any) -> None:
    """Spec section 3.2: JSON, unescaped, Python literal, raw."""
    tools = [{"name": "f", "parameters": {"properties": {"k": {} if kind is None else {"type": kind}}}}]
    call = f"<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    assert parse(call, thinking=False, tools=tools).tool_calls[0]["arguments"] == {"k": value}


@pytest.mark.parametrize("call", ["stop\n", "stop", "stop\\n", " stop \n "])
def test_a_call_without_arguments(call: str) -> None:
    parsed = parse(f"<tool_call>{call}</tool_call>", thinking=False)
    assert parsed.tool_calls == [{"name": "stop", "arguments": {}}]
    assert parsed.well_formed


def test_a_value_may_hold_anything_but_its_own_end_tag() -> None:
    value = "</tool_call><tool_call>evil\n<arg_key><|user|><think></think>"
    call = f"<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    parsed = parse(call, thinking=False)
    assert parsed.well_formed
    assert parsed.tool_calls == [{"name": "f", "arguments": {"k": value}}]


def test_a_bottomless_schema_is_an_unknown_type() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(900):
        schema = {"anyOf": [schema]}
    tools = [{"name": "f", "parameters": {"properties": {"k": schema}}}]
    text = "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>5</arg_value>\n</tool_call>"
    assert parse(text, thinking=False, tools=tools).tool_calls == [{"name": "f", "arguments": {"k": 5}}]


GOOD = "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("5", "no <think> block"),
        ("", "no <think> block"),
        ("hm</think>\n5", "no <think> block"),
        ("\n<think>endless", "<think> is not closed"),
        ("\n<think>a<think>b</think>5", "<think> inside the reasoning"),
        ("\n<think>a<|user|>b</think>5", "<|user|> inside the reasoning"),
        ("\n<think></think>5</think>6", "</think> inside the content"),
        ("\n<think></think>5<|assistant|>\n6", "<|assistant|> inside the content"),
        ("\n<think></think>5<|user|>\n6", "<|user|> inside the content"),
        ("\n<think></think>5</tool_call>", "</tool_call> inside the content"),
        ("\n<think></think><tool_call>f\n", "<tool_call> is not closed"),
        ("\n<think></think><tool_call>f", "<tool_call> is not closed"),
        ("\n<think></think><tool_call>f\n<arg_key>k</arg_key>\n<arg_value>1", "<tool_call> is not closed"),
        ("\n<think></think><tool_call>\n</tool_call>", "no proper name"),
        ("\n<think></think><tool_call>a b\n</tool_call>", "no proper name"),
        ("\n<think></think><tool_call>f\nk=1</tool_call>", "text between the arguments"),
        ("\n<think></think><tool_call>f\n<arg_key>k</tool_call>", "<arg_key> is not closed"),
        ("\n<think></think><tool_call>f\n<arg_key>k</arg_key>\n</tool_call>", "has no <arg_value>"),
        (f"\n<think></think>{GOOD} and more", "text after a tool call"),
        (f"\n<think></think>{GOOD.replace('</tool_call>', GOOD[GOOD.index('<arg_key>') :])}", "given twice"),
    ],
)
def test_malformed_text_is_named_and_not_raised(text: str, problem: str) -> None:
    parsed = parse(text)
    assert not parsed.well_formed
    assert problem in (parsed.problem or "")


def test_a_broken_call_is_left_out_and_the_next_one_read() -> None:
    parsed = parse(f"<tool_call>f\nk=1</tool_call>\n{GOOD}", thinking=False)
    assert [call["arguments"] for call in parsed.tool_calls] == [{"k": 1}]
    assert not parsed.well_formed


def test_reasoning_in_a_nothink_answer_is_kept_and_not_well_formed() -> None:
    parsed = parse("\n<think>hm</think>\n5", thinking=False)
    assert (parsed.reasoning, parsed.content, parsed.well_formed) == ("hm", "5", False)


@pytest.mark.parametrize("closing", ["<|user|>", "<|observation|>", "<|endoftext|>"])
def test_one_closing_token_at_the_end_is_dropped(closing: str) -> None:
    assert parse("\n<think>r</think>\nx" + closing) == parse("\n<think>r</think>\nx")


def test_the_message_of_a_parsed_text_renders_back(tiny_tokenizer: Tokenizer) -> None:
    text = f"\n<think>r</think>\nx\n{GOOD}"
    rendered_text = ChatTemplate(tiny_tokenizer).render([{"role": "user", "content": "q"}, parse(text).message()])
    assert rendered_text.endswith("<|assistant|>" + text)
