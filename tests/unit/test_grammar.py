"""Grammars as token constraints: what they allow is what the grammar says, forwards and after any rollback."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.grammar import GrammarCompiler, GrammarConstraint, GrammarError

VOCAB = 520
SCHEMA = {
    "type": "object",
    "properties": {"item": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["item", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tiny_tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(
        [tiny_tokenizer.decode_bytes([index]) for index in range(tiny_tokenizer.vocab_size)],
        special=tiny_tokenizer.added_tokens.values(),
        eos_ids=tiny_tokenizer.eos_ids,
        encode=tiny_tokenizer.encode_plain,
        vocab_size=VOCAB,
    )


def allowed(constraint: GrammarConstraint) -> list[int]:
    mask = constraint.mask()
    assert mask is not None
    assert mask.shape == (VOCAB,)
    return [int(index) for index in mask.nonzero()[:, 0]]


def walk(constraint: GrammarConstraint, draw: st.DrawFn | Any, eos: tuple[int, ...], limit: int = 80) -> list[int]:
    """Tokens drawn among those allowed, to the end of the grammar or the limit."""
    tokens: list[int] = []
    while len(tokens) < limit:
        choices = allowed(constraint)
        token = draw(st.sampled_from(choices))
        if token in eos:
            break
        constraint.accept(token)
        tokens.append(token)
    return tokens


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_allowed_to_end_satisfies_the_schema(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    constraint = compiler.compile(f"start: %json {json.dumps(SCHEMA)}")
    tokens = walk(constraint, data.draw, tiny_tokenizer.eos_ids, limit=120)
    ends = set(tiny_tokenizer.eos_ids)
    if ends <= set(allowed(constraint)):
        value = json.loads(tiny_tokenizer.decode(tokens))
        assert isinstance(value["item"], str)
        assert isinstance(value["count"], int)
        assert value.keys() == {"item", "count"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rollback_is_as_if_the_tokens_had_never_come(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Across the border between thinking and grammar, and across the grammar's end."""
    think_end = tiny_tokenizer.id("</think>")
    constraint = compiler.compile('start: "a" /[0-9]{1,2}/', after=think_end)
    thought = data.draw(st.lists(st.integers(40, 99), max_size=4))
    for token in (*thought, think_end):
        constraint.accept(token)
    tokens = [*thought, think_end, *walk(constraint, data.draw, (), limit=6)]
    count = data.draw(st.integers(0, len(tokens)))
    constraint.rollback(count)
    replayed = constraint.fresh()
    for token in tokens[: len(tokens) - count]:
        replayed.accept(token)
    assert allowed(constraint) == allowed(replayed)


def test_nothing_but_the_end_is_forbidden_before_the_grammar_starts(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile('start: "yes"', after=tiny_tokenizer.id("</think>"))
    assert set(range(VOCAB)) - set(allowed(constraint)) == set(tiny_tokenizer.eos_ids)
    constraint.accept(tiny_tokenizer.id("</think>"))
    assert tiny_tokenizer.decode([allowed(constraint)[0]])[0] == "y"


def test_the_end_comes_exactly_when_the_grammar_is_complete(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile('start: "ab"')
    for token in tiny_tokenizer.encode_plain("ab"):
        assert not set(allowed(constraint)) & set(tiny_tokenizer.eos_ids)
        constraint.accept(token)
    assert set(allowed(constraint)) == set(tiny_tokenizer.eos_ids)
    # a client that ignores the end still gets a mask with something in it
    constraint.accept(tiny_tokenizer.eos_ids[0])
    constraint.accept(tiny_tokenizer.eos_ids[0])
    assert set(allowed(constraint)) == set(tiny_tokenizer.eos_ids)


def test_padding_and_unnamed_special_tokens_are_never_allowed(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer
) -> None:
    tokens = allowed(compiler.compile("start: /(?s:.*)/"))
    assert not set(tokens) & (set(tiny_tokenizer.added_tokens.values()) - set(tiny_tokenizer.eos_ids))
    assert max(tokens) < tiny_tokenizer.vocab_size


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([r"[a-c]+x", r"(foo|bar)[0-9]", r"[0-9]{2}-[0-9]{2}", r"é?."]), st.data())
def test_a_regex_allows_what_python_matches(
    compiler: GrammarCompiler, tiny_tokenizer: Tokenizer, pattern: str, data: st.DataObject
) -> None:
    constraint = compiler.compile(f"start: /{pattern}/")
    tokens = walk(constraint, data.draw, tiny_tokenizer.eos_ids, limit=12)
    if set(tiny_tokenizer.eos_ids) <= set(allowed(constraint)):
        assert re.fullmatch(pattern, tiny_tokenizer.decode(tokens)), tiny_tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "lark",
    [
        "start: /(/",
        "start: /(?=x)y/",
        "start: %json {",
        'start: %json {"type": "foo"}',
        'start: %json {"$ref": "#"}',
        'start: %json {"$ref": "http://127.0.0.1:9/x"}',
        "start: missing",
        "nothing",
        "",
    ],
)
def test_a_bad_grammar_is_an_error_in_one_line(compiler: GrammarCompiler, lark: str) -> None:
    with pytest.raises(GrammarError) as error:
        compiler.compile(lark)
    assert error.value.message
    assert "\n" not in error.value.message


def test_copies_do_not_share_their_state(compiler: GrammarCompiler, tiny_tokenizer: Tokenizer) -> None:
    first = compiler.compile('start: "ab"')
    second = first.fresh()
    before = allowed(second)
    first.accept(tiny_tokenizer.encode_plain("ab")[0])
    assert allowed(second) == before
