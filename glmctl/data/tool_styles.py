"""Other ways to write tools and calls than GLM-4.5's, for contrast (spec sections 3.2 and 6).

GLM-4.5 declares each tool as a line of JSON and writes a call as tags around raw values, so that code in an argument
needs no escaping. `calls: json` writes the call as one JSON object, as most models do; `declaration: typescript` shows
the tools as types, as Kimi K2 and gpt-oss do. A style is a template: it travels in the model folder, and whoever
renders it (transformers, vLLM) needs nothing of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Literal

from glmctl.data.template_source import exported_template, training_template, without_marks

Calls = Literal["tags", "json"]
Declaration = Literal["json", "typescript"]

_DECLARED = """\
    {{- 'Each line between <tools> and </tools> describes one of them as JSON:\\n<tools>\\n' -}}
    {%- for tool in tools -%}
        {{- tool | tojson(ensure_ascii=False) + '\\n' -}}
    {%- endfor -%}
"""
_DECLARED_TS = """\
    {{- 'Between <tools> and </tools> stand their types:\\n<tools>\\n' -}}
    {%- for tool in tools -%}
        {{- ts_tool(tool) -}}
    {%- endfor -%}
"""
_ASKED = """\
    {{- '</tools>\\n\\nTo call a function, write its name and its arguments in this form:\\n' -}}
    {{- '<tool_call>{name}\\n<arg_key>{argument}</arg_key>\\n<arg_value>{value}</arg_value>\\n' -}}
    {{- '(one key and value for every argument)\\n</tool_call>' -}}
"""
_ASKED_JSON = """\
    {{- '</tools>\\n\\nTo call a function, write its name and its arguments as JSON in this form:\\n' -}}
    {{- '<tool_call>{"name": {name}, "arguments": {arguments}}</tool_call>' -}}
"""
_CALLED = """\
            {{- '\\n<tool_call>' + call.name + '\\n' -}}
            {%- for key, value in call.arguments.items() -%}
                {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' -}}
                {{- value if value is string else value | tojson(ensure_ascii=False) -}}
                {{- '</arg_value>\\n' -}}
            {%- endfor -%}
            {{- '</tool_call>' -}}
"""
_CALLED_JSON = """\
            {{- '\\n<tool_call>{"name": ' + call.name | tojson(ensure_ascii=False) + ', "arguments": ' -}}
            {{- call.arguments | tojson(ensure_ascii=False) + '}</tool_call>' -}}
"""


@functools.cache
def styled(calls: Calls = "tags", declaration: Declaration = "json") -> str:
    """The training template, with marks, in a style; both defaults give GLM-4.5's own."""
    source = training_template()
    if declaration == "typescript":
        types = resources.files("glmctl.data").joinpath("tool_types.jinja").read_text(encoding="utf-8")
        source = types + _exchanged(source, _DECLARED, _DECLARED_TS)
    if calls == "json":
        source = _exchanged(_exchanged(source, _ASKED, _ASKED_JSON), _CALLED, _CALLED_JSON)
    return source


@functools.cache
def styles() -> Mapping[str, tuple[Calls, Declaration]]:
    """Every template of ours, with and without marks, and the style that it is."""
    found: dict[str, tuple[Calls, Declaration]] = {}
    for calls in ("tags", "json"):
        for declaration in ("json", "typescript"):
            source = styled(calls, declaration)
            found |= dict.fromkeys((source, without_marks(source)), (calls, declaration))
    assert found[exported_template()] == ("tags", "json")
    return found


def _exchanged(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, "the template has this part once"
    return source.replace(old, new)
