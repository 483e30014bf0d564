"""The Jinja environment in which chat templates run: immutable, sandboxed, without autoescape, deterministic.

`{% generation %} ... {% endgeneration %}` writes the two strings of the context variables named below around its
body; whoever renders picks strings that occur nowhere in the messages, cuts them out again and so learns which
characters the model itself would have written.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MARK_START = "generation_mark_start"
MARK_END = "generation_mark_end"


class GenerationMarks(Extension):
    """The `{% generation %}` tag."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(name: str) -> nodes.Node:
            return nodes.Output([nodes.Name(name, "load")]).set_lineno(line)

        return [mark(MARK_START), *body, mark(MARK_END)]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a language model has no use for
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. Raises `jinja2.TemplateSyntaxError` for bad syntax."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def has_marks(source: str) -> bool:
    """True when the template says what the model writes."""
    environment = jinja2.Environment(extensions=[GenerationMarks, "jinja2.ext.loopcontrols"])
    return any(name.name == MARK_START for name in environment.parse(source).find_all(nodes.Name))
