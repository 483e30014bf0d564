"""Templates and texts that come from others: no code runs, nothing loops for ever, parsing stays linear."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.parsing import StreamParser, parse
from glmctl.data.template_source import exported_template
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError

ASK = [{"role": "user", "content": "hi"}]

GADGETS = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['os'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum.__globals__.__builtins__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__closure__ }}",
    "{{ range.__self__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ [messages]|map(attribute='__class__')|list }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': ''}) }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% set _ = messages.clear() %}",
    "{{ ().__class__.__bases__[0] }}",
    "{{ (1).__class__ }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'x' import y %}",
    "{{ config }}{{ request.application }}",
    "{{ __import__('os') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}",
]

# what an escape would show
LEAKS = ("root:", "<class", "<module", "<function", "<built-in", "uid=", "os.py", "{'__name__'")


@pytest.mark.parametrize("source", GADGETS)
def test_a_gadget_template_reaches_nothing(tiny_tokenizer: Tokenizer, source: str) -> None:
    messages = [dict(message) for message in ASK]
    try:
        text = ChatTemplate(tiny_tokenizer, source).render(messages)
    except DataError:
        text = ""
    assert not any(leak in text for leak in LEAKS)
    assert messages == ASK


BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long output": "{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}",
    "a doubled string": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a repeated string": "{{ 'x' * 10 ** 10 }}",
    "a padded string": "{{ '%1000000000d' % 1 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nested lists": "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "a long range": "{{ range(10 ** 12) | list }}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_without_bounds_is_stopped(tiny_tokenizer: Tokenizer, kind: str) -> None:
    with pytest.raises(DataError, match="chat template"):
        ChatTemplate(tiny_tokenizer, BOMBS[kind]).render(ASK)


def test_after_being_stopped_a_template_renders_again(tiny_tokenizer: Tokenizer) -> None:
    source = "{% if tools %}{{ 9 ** (9 ** (8 + tools | length)) }}{% endif %}ok"
    template = ChatTemplate(tiny_tokenizer, source)
    with pytest.raises(DataError, match="ran into a limit"):
        template.render(ASK, [{"name": "f"}])
    assert template.render(ASK) == "ok"


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% endif %}", "x" * (300 * 1024)])
def test_a_template_that_is_none_is_refused_when_loaded(tiny_tokenizer: Tokenizer, tmp_path: Path, source: str) -> None:
    tiny_tokenizer.save(tmp_path, chat_template=source)
    with pytest.raises(DataError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)


def test_a_folder_without_a_template_gets_ours(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert ChatTemplate.load(tmp_path).source == exported_template()


# ------------------------------------------------------------------ hostile model output

TAGS = ["<think>", "</think>", "<tool_call>", "<tool_call>f\n", "</tool_call>", "<arg_key>", "<arg_value>", "<|user|>"]
CHAINS = ["<tool_call>f\n</tool_call>", "<arg_key>k</arg_key>", "<arg_key>k</arg_key><arg_value>[</arg_value>"]
SCRAPS = ["<", "<thin", "\\n", "[", '{"a":', "9", " ", "\n", "x \n"]


class Counting(StreamParser):
    """A parser that counts the characters its searches pass over."""

    looked = 0

    def _until(self, tags: Any) -> tuple[str, str | None]:
        begin, rest = self._at, len(self._buffer) - self._at
        text, tag = super()._until(tags)
        self.looked += 1 + (self._at - begin if tag else rest)
        return text, tag

    def _next_tag(self, tags: Any) -> str | None:
        begin = self._at
        tag = super()._next_tag(tags)
        self.looked += 1 + self._at - begin
        return tag


def hostile(length: int) -> Iterator[str]:
    for start in ("", "<think></think>", "<think></think><tool_call>f\n"):
        for part in TAGS + CHAINS + SCRAPS:
            yield start + part * (length // len(part))


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_parsing_looks_at_each_character_a_bounded_number_of_times(step: int) -> None:
    """Counted in characters, not seconds: what is looked at again is at most a tag's length for each piece fed."""
    for text in hostile(512):
        stream = Counting(True)
        for at in range(0, len(text), step):
            stream.feed(text[at : at + step])
        stream.finish()
        assert stream.looked <= 3 * len(text) + 16 * (len(text) // step + 1)


def test_worst_cases_of_64_kb_parse() -> None:
    texts = [*hostile(2048), *("<think></think>" + part * (65_536 // len(part)) for part in ("<", "[", "</tool_call>"))]
    for text in texts:
        parsed = parse(text)
        assert len(parsed.content) <= len(text)
