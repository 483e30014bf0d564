"""JSON calls and TypeScript declarations: the texts, the way back, the masks, and that a folder carries its style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.chat import ChatTemplate
from glmctl.data.template_source import training_template, without_marks
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import parse_json_calls, styled, styles

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


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.text(max_size=20) | st.integers() | st.none(), max_size=3))
def test_any_arguments_come_back(arguments: dict[str, Any]) -> None:
    block = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)
    read = parse_json_calls(f"<think></think>\n<tool_call>{block}</tool_call>")
    # a tag inside a string ends the block: the format has no escape for it
    if "tool_call>" not in block:
        assert read.tool_calls == [{"name": "f", "arguments": arguments}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>{}</tool_call>", "no proper name"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no object"),
        ('<tool_call>{"name": "f", "arguments": {"s": "a\nb"}}</tool_call>', "not JSON"),
        ('<tool_call>{"name": "f"}', "not closed"),
        ('<tool_call>{"name": "f"}</tool_call> and', "text after a tool call"),
    ],
)
def test_what_is_amiss_with_a_json_call_is_said(text: str, problem: str) -> None:
    read = parse_json_calls(f"<think>x</think>\n{text}")
    assert problem in str(read.problem)
    assert not read.well_formed


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
