"""JSON calls and TypeScript declarations: the texts, the way back, the masks, and that a folder carries its style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.chat import ChatTemplate
from glmctl.data.json_calls import JsonCallParser
from glmctl.data.parsing import Delta, Parsed
from glmctl.data.template_source import training_template, without_marks
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import styled, styles

TOOL = {
    "type": "function",
    "function": {
        "name": "run",
        "description": "Run code.\nReturns its output.",
        "parameters": {
            "type": "object",
            "properties": {
                "source": {"type": "string", "description": "what to run"},
                "language": {"enum": ["python", "c"], "default": "python"},
                "limits": {"type": "object", "properties": {"seconds": {"type": "integer"}}, "required": ["seconds"]},
                "files": {"type": "array", "items": {"type": ["string", "null"]}},
                "extra": {"anyOf": [{"type": "boolean"}, {"type": "object"}]},
                "more": {},
            },
            "required": ["source"],
        },
    },
}
BARE = {"name": "stop", "parameters": {}}
CODE = 'def f(x):\n\treturn "\\n".join(x) + \'"\'\n'


def talk(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    called = {"function": {"name": "run", "arguments": arguments}}
    return [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "Sure.", "reasoning_content": "why", "tool_calls": [called, called]},
    ]


def parse(text: str, *, thinking: bool = True) -> Parsed:
    """A turn with JSON calls, as a whole."""
    return JsonCallParser(thinking).read(text)


@pytest.fixture(scope="module")
def as_json(tiny_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer, styled("json", "typescript"))


def test_the_default_style_is_the_template_itself() -> None:
    assert styled() == training_template()
    assert len(styles()) == 8, "four styles, each with and without marks"


def test_tools_are_declared_as_types(as_json: ChatTemplate) -> None:
    text = as_json.render(talk({}), [TOOL, BARE])
    declared = text.partition("<tools>\n")[2].partition("</tools>")[0]
    assert declared == (
        "// Run code.\n// Returns its output.\n"
        "type run = (_: {\n// what to run\nsource: string,\n"
        'language?: "python" | "c", // default: "python"\n'
        "limits?: {\nseconds: number,\n},\n"
        "files?: Array<string | null>,\nextra?: boolean | object,\nmore?: any,\n}) => any;\n"
        "type stop = () => any;\n"
    )


def test_calls_are_json_and_come_back(as_json: ChatTemplate) -> None:
    text = as_json.render(talk({"source": CODE, "n": [1, None]}), [TOOL])
    block = json.dumps({"name": "run", "arguments": {"source": CODE, "n": [1, None]}}, ensure_ascii=False)
    assert text.endswith(f"<think>why</think>\nSure.\n<tool_call>{block}</tool_call>\n<tool_call>{block}</tool_call>")
    read = as_json.parse(text.rpartition("<|assistant|>")[2], [TOOL])
    assert (read.reasoning, read.content, read.problem) == ("why", "Sure.", None)
    assert read.tool_calls == [{"name": "run", "arguments": {"source": CODE, "n": [1, None]}}] * 2


SAID = st.lists(st.sampled_from(["</tool_call>", "<tool_call>", "\\", '"', "\n", "x"]) | st.text(max_size=4)).map(
    "".join
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=8), SAID | st.integers() | st.none(), max_size=3))
def test_any_arguments_come_back(arguments: dict[str, Any]) -> None:
    block = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)
    read = parse(f"<think></think>\n<tool_call>{block}</tool_call>")
    assert (read.tool_calls, read.problem) == ([{"name": "f", "arguments": arguments}], None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>{}</tool_call>", "no proper name"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no object"),
        ('<tool_call>{"name": "f", "arguments": {"s": "a\nb"}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "f"}', "not closed"),
        ('<tool_call>{"name": "f"}</tool_call> and', "text after a tool call"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "f", "arguments": ' + "[" * 100_000 + "</tool_call>", "not JSON"),
        ("<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "not JSON"),
    ],
)
def test_what_is_amiss_with_a_json_call_is_said(text: str, problem: str) -> None:
    read = parse(f"<think>x</think>\n{text}")
    assert problem in str(read.problem)
    assert not read.well_formed
    assert [call["name"] for call in read.tool_calls] in ([], ["f"])


BLOCK = '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>'
CALL = {"name": "f", "arguments": {"k": 1}}


def test_a_call_quoted_in_the_reasoning_is_no_call() -> None:
    read = parse(f"\n<think>I could write {BLOCK} here</think>\nNo need.")
    assert read == Parsed(f"I could write {BLOCK} here", "No need.", [], True, None)
    both = parse(f"\n<think>first {BLOCK}, and </tool_call>\n</think>\nSo:\n{BLOCK}")
    assert both == Parsed(f"first {BLOCK}, and </tool_call>", "So:", [CALL], True, None)
    endless = parse(f"\n<think>I will write {BLOCK}")
    assert (endless.tool_calls, endless.problem) == ([], "<think> is not closed")


def test_a_call_whose_argument_quotes_a_think_block_is_one() -> None:
    said = "a</think>b<think>"
    block = json.dumps({"name": "f", "arguments": {"k": said}})
    for thinking, before in ((True, "\n<think>why</think>\n"), (False, "\n")):
        read = parse(f"{before}<tool_call>{block}</tool_call>", thinking=thinking)
        assert read.tool_calls == [{"name": "f", "arguments": {"k": said}}]
        assert read.problem is None


def test_a_call_before_the_think_block_is_not_well_formed() -> None:
    read = parse(f"{BLOCK}\n<think>too late</think>\nx")
    assert (read.tool_calls, read.problem) == ([CALL], "there is no <think> block")


@pytest.mark.parametrize("closing", ["<|user|>", "<|observation|>", "<|endoftext|>"])
def test_one_closing_token_behind_a_json_call_is_dropped(closing: str) -> None:
    assert parse(f"\n<think></think>\n{BLOCK}{closing}") == Parsed(None, "", [CALL], True, None)


def test_a_missing_quote_costs_the_calls_up_to_the_next_line_at_most() -> None:
    broken = '<tool_call>{"name": "f", "arguments": {"k": "1}}</tool_call>'
    read = parse(f"<think></think>\n{broken}\n{BLOCK}\n{BLOCK}")
    assert read.tool_calls == [CALL]
    assert "not JSON" in str(read.problem)


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "<|user|>"]
SCRAPS = [BLOCK, '{"name": "f", "arguments": ', '{"k": "', '"}}', '"', "\\", "\n", "x", "数"]
HOSTILE = st.lists(st.sampled_from(TAGS + SCRAPS), max_size=20).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(HOSTILE, st.integers(1, 7), st.booleans())
def test_a_stream_of_json_calls_says_what_the_whole_text_says(text: str, step: int, thinking: bool) -> None:
    whole, stream = JsonCallParser(thinking), JsonCallParser(thinking)
    deltas = [d for at in range(0, len(text), step) for d in stream.feed(text[at : at + step])] + stream.finish()
    whole.feed(text)
    whole.finish()
    assert stream.parsed == whole.parsed
    assert "".join(d.reasoning or "" for d in deltas) == (whole.parsed.reasoning or "")
    assert "".join(d.content or "" for d in deltas) == whole.parsed.content
    names = [d.tool_name for d in deltas if d.tool_name is not None]
    arguments = [json.loads(d.arguments) for d in deltas if d.arguments is not None]
    assert [{"name": n, "arguments": a} for n, a in zip(names, arguments, strict=True)] == whole.parsed.tool_calls


def test_a_json_call_is_passed_on_when_its_end_tag_has_come() -> None:
    stream = JsonCallParser()
    assert stream.feed(f"\n<think>{BLOCK[:19]}") == [Delta(reasoning=BLOCK[:19])]
    assert stream.feed("</think>\nSo") == [Delta(content="So")]
    assert stream.feed(f"\n{BLOCK[:-1]}") == []
    assert stream.feed(">") == [Delta(tool_index=0, tool_name="f"), Delta(tool_index=0, arguments='{"k": 1}')]
    assert stream.finish() == []


def test_both_styles_read_everything_around_a_call_alike(as_json: ChatTemplate, tiny_tokenizer: Tokenizer) -> None:
    """The same turn, in either style: the same reasoning, words and calls, whatever the reasoning quotes."""
    tags = ChatTemplate(tiny_tokenizer)
    for why in ("plain", BLOCK, "<tool_call>f\n</tool_call>", "<arg_key>", "</tool_call>"):
        for said in ("", "Look:"):
            turn = {"role": "assistant", "content": said, "reasoning_content": why}
            talking: list[dict[str, Any]] = [
                {"role": "user", "content": "q"},
                turn | {"tool_calls": [{"function": CALL}]},
            ]
            read = [one.parse(one.render(talking).rpartition("<|assistant|>")[2]) for one in (tags, as_json)]
            assert read == [Parsed(why, said, [CALL], True, None)] * 2


@pytest.mark.parametrize("calls", ["tags", "json"])
@pytest.mark.parametrize("declaration", ["json", "typescript"])
def test_training_continues_the_prompt_in_every_style(calls: Any, declaration: Any, tiny_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tiny_tokenizer, styled(calls, declaration))
    messages = talk({"source": CODE})
    made, prompt = template.encode_training(messages, [TOOL]), template.encode_prompt(messages[:1], [TOOL])
    assert made.tokens[: len(prompt)] == prompt
    assert made.loss_mask == [0] * len(prompt) + [1] * (len(made.tokens) - len(prompt))
    wrote = template.tokenizer.decode(made.tokens[len(prompt) : -1])
    assert template.parse(wrote, [TOOL]).tool_calls == [{"name": "run", "arguments": {"source": CODE}}] * 2


def test_a_folder_carries_its_style(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path)
    assert ChatTemplate.load(tmp_path).calls == "tags"
    (tmp_path / "chat_template.jinja").write_text(without_marks(styled("json")))
    loaded = ChatTemplate.load(tmp_path)
    assert loaded.calls == "json"
    assert loaded.encode_training(talk({"source": CODE})).loss_mask, "the marks are known again"


FOREIGN = """\
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] -%}
CALL
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
QWEN = (
    '\n<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("call", "style"),
    [
        (QWEN, "json"),
        (QWEN.replace('"{{ call.function.name }}"', "{{ call.function.name | tojson }}"), "json"),
        ("<tool_call>{{ call.function.name }}\n</tool_call>", "tags"),
        ("[TOOL_CALLS]{{ call.function | tojson }}", "tags"),
        ("{{ raise_exception('no tools') }}", "tags"),
        ("", "tags"),
    ],
    ids=["qwen", "quoted", "tags", "mistral", "refuses", "says nothing"],
)
def test_a_foreign_template_is_asked_for_its_style(call: str, style: str, tiny_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tiny_tokenizer, FOREIGN.replace("CALL", call), where="theirs.jinja")
    assert template.calls == style


@pytest.mark.slow
def test_transformers_renders_every_style_as_we_do(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for source in styles():
        ours = ChatTemplate(tiny_tokenizer, source)
        for tools in (None, [TOOL, BARE]):
            rendered = theirs.apply_chat_template(
                talk({"source": CODE}), tools=tools, chat_template=source, tokenize=False
            )
            assert ours.render(talk({"source": CODE}), tools) == rendered
