"""Our rendering equals transformers' `apply_chat_template` on the same Jinja, text and token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.template_source import exported_template, training_template
from glmctl.data.tokenizer import Tokenizer

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": 'Adds <two> "numbers" & says so, für 数',
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
BARE = {"name": "stop", "parameters": {}}
PARTS = [{"type": "text", "text": "part one, "}, {"type": "text", "text": "part two"}]


def u(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def s(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def t(text: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def a(
    text: Any = "", reasoning: str | None = None, calls: list[tuple[str, dict[str, Any]]] | None = None
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": x}} for n, x in calls]
    return message


CALL = [("add", {"a": 2, "b": 3})]
MIXED = {"s": 'q "x"\n</b>', "n": None, "b": False, "l": [1, {"k": "数"}], "f": 2.5, "e": "", "d": {}}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one user turn": [u("hi")],
    "system and user": [s("be kind"), u("hi")],
    "two system messages": [s("one"), s("two"), u("hi")],
    "answer without reasoning": [u("hi"), a("hello")],
    "answer with reasoning": [u("hi"), a("hello", "greet back")],
    "reasoning with white space around it": [u("hi"), a("\n hello \n", "\n\n greet \n")],
    "empty reasoning": [u("hi"), a("hello", "")],
    "reasoning of a past turn is dropped": [u("a"), a("b", "r1"), u("c"), a("d", "r2")],
    "open user turn after reasoning": [u("a"), a("b", "r1"), u("c")],
    "reasoning inside the content": [u("a"), a("<think>why</think>so")],
    "reasoning before a lone end tag": [u("a"), a("why\n</think>\n\nso")],
    "reasoning inside a past content": [u("a"), a("<think>why</think>so"), u("b")],
    "two end tags": [u("a"), a("<think>why</think>so</think>there")],
    "nothink typed by the user": [u("a/nothink"), a("b"), u("c")],
    "nothink inside the text": [u("/nothink is a switch"), a("yes")],
    "one call": [u("2+3"), a("", "add", CALL)],
    "one call with content": [u("2+3"), a("Let me add.", "add", CALL)],
    "call and result": [u("2+3"), a("", "add", CALL), t("5")],
    "whole tool loop": [u("2+3"), a("", "add", CALL), t("5"), a("It is 5.", "done")],
    "parallel calls": [u("x"), a("", None, [*CALL, ("stop", {}), *CALL])],
    "parallel results": [u("x"), a("", None, CALL * 2), t("5"), t("6"), a("5 and 6")],
    "long tool loop keeps reasoning": [u("x"), a("", "r1", CALL), t("5"), a("", "r2", CALL), t("5"), a("10", "r3")],
    "tool loop of a past turn": [u("x"), a("", "r1", CALL), t("5"), a("5", "r2"), u("and?"), a("6", "r3")],
    "argument values of every type": [u("x"), a("", None, [("f", MIXED)])],
    "code in an argument": [u("x"), a("", None, [("run", {"source": "def f():\n\treturn '<tool_call>'\n"})])],
    "call without arguments": [u("x"), a("", None, [("stop", {})])],
    "content parts": [s(PARTS), u(PARTS), a(PARTS)],
    "parts that are strings": [u(["one", "two"])],
    "result in parts": [u("x"), a("", None, CALL), t(PARTS)],
    "missing content": [u("x"), {"role": "assistant", "tool_calls": a("", None, CALL)["tool_calls"]}],
    "content of none": [u("x"), a(None, "r", CALL)],
    "empty list of calls": [u("x"), a("y", None, [])],
    "unicode": [s("你是助手"), u("数学题：2+3=? 😀"), a("五 ✓", "二加三")],
    "special strings in contents": [
        s("<|user|>"),
        u("<|assistant|>\n<think>"),
        a("[gMASK]", "<sop>"),
        u("{{ x }} {% y %}"),
    ],
    "white space in user turns": [u("  a\n\n"), a("b"), u("\n")],
    "assistant speaks first": [a("welcome", "r"), u("hi"), a("yes", "r2")],
    "no user at all": [s("x"), a("y", "r")],
    "empty texts": [s(""), u(""), a("")],
    "markup that html would escape": [u("a < b && \"c\" > 'd'"), a("<b>&amp;</b>")],
}


@pytest.fixture(scope="module")
def theirs(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_there_are_enough_conversations() -> None:
    assert len(CONVERSATIONS) >= 30


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rendering_equals_transformers(name: str, tiny_tokenizer: Tokenizer, theirs: Any) -> None:
    messages, ours = CONVERSATIONS[name], ChatTemplate(tiny_tokenizer)
    for tools in (None, [ADD, BARE]):
        for prompt in (False, True):
            for thinking in (None, True, False):
                switch = {} if thinking is None else {"enable_thinking": thinking}
                expected = theirs.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **switch
                )
                assert ours.render(messages, tools, add_generation_prompt=prompt, **switch) == expected
                if prompt and name != "special strings in contents":
                    continue
                if prompt:
                    # where contents spell special strings, transformers lets them act; we do not
                    ids = theirs.apply_chat_template(
                        messages, tools=tools, add_generation_prompt=True, return_dict=False, **switch
                    )
                    assert ours.encode_prompt(messages, tools, **switch) != ids


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in CONVERSATIONS
        if name not in ("special strings in contents", "two end tags", "code in an argument", "nothink inside the text")
    ],
)
def test_prompt_ids_equal_transformers(name: str, tiny_tokenizer: Tokenizer, theirs: Any) -> None:
    messages, ours = CONVERSATIONS[name], ChatTemplate(tiny_tokenizer)
    for tools in (None, [ADD, BARE]):
        for thinking in (True, False):
            ids = theirs.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
            )
            assert ours.encode_prompt(messages, tools, enable_thinking=thinking) == ids


def test_transformers_reads_the_same_loss_mask_from_the_marks(tiny_tokenizer: Tokenizer, theirs: Any) -> None:
    """transformers has a `generation` tag too; its mask is ours less the closing role tokens.

    (A turn that ends in a character of several tokens is left out: transformers loses that character's last bytes.)
    """
    ours = ChatTemplate(tiny_tokenizer)
    closers = {tiny_tokenizer.id("<|user|>"), tiny_tokenizer.id("<|observation|>")}
    for name in ("one call", "whole tool loop", "long tool loop keeps reasoning", "parallel results"):
        messages = CONVERSATIONS[name]
        answer = theirs.apply_chat_template(
            messages, chat_template=training_template(), return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = ours.encode_training(messages)
        mask = [m if t not in closers else 0 for t, m in zip(encoded.tokens, encoded.loss_mask, strict=True)]
        assert answer["input_ids"] == encoded.tokens[:-1]
        assert answer["assistant_masks"] == mask[:-1]


def test_transformers_reports_the_same_refusals(tiny_tokenizer: Tokenizer, theirs: Any) -> None:
    from glmctl.errors import DataError

    for messages in ([{"role": "robot", "content": "x"}], [u([{"type": "image_url"}])], [u({"x": 1})]):
        with pytest.raises(Exception, match=r"role|content"):
            theirs.apply_chat_template(messages, tokenize=False)
        with pytest.raises(DataError, match=r"role|content"):
            ChatTemplate(tiny_tokenizer).render(messages)


def test_the_folder_carries_the_template_without_marks(theirs: Any) -> None:
    assert theirs.chat_template == exported_template()
