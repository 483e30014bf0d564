"""Tool calls as JSON, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: the way back from text.

Everything around the calls is read by `parsing.StreamParser`, which this one is: what a `<think>` block quotes is no
call. A call is passed on when its end tag has come, for until then nobody knows whether it is JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from glmctl.data.arguments import json_text, read_json
from glmctl.data.parsing import StreamParser
from glmctl.data.tags import Tags

_END_OF_BLOCK = Tags(("</tool_call>",))
_MARKS = re.compile(r'\\[^\n]|["\n]')


class JsonCallParser(StreamParser):
    """`StreamParser` for a template that writes calls as JSON.

    An end tag inside a JSON string is text, as the template writes it there without an escape. A line break inside a
    string means that a quote is missing: the block is no JSON then, and ends at the next end tag.
    """

    def __init__(self, thinking: bool = True, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        super().__init__(thinking, tools)
        self._block: list[str] = []
        self._quoted = False
        """whether what has come of the block ends inside a string"""
        self._torn = False
        """whether a string of the block has a line break in it"""

    def _in_name(self) -> bool:
        found = self._collect(_END_OF_BLOCK)
        if found is None:
            return False
        self._block.append(found[0])
        self._follow_quotes(found[0])
        if self._quoted and not self._torn:
            self._block.append(found[1])
            return True
        block = "".join(self._block)
        self._block, self._quoted, self._torn = [], False, False
        self._call(block)
        return True

    def _follow_quotes(self, text: str) -> None:
        for mark in _MARKS.findall(text):
            if mark == '"':
                self._quoted = not self._quoted
            elif mark == "\n" and self._quoted:
                self._torn = True

    def _call(self, block: str) -> None:
        try:
            value = read_json(block)
            name, arguments = (value.get("name"), value.get("arguments", {})) if isinstance(value, dict) else (None, {})
            text = json_text(arguments)
        except (ValueError, RecursionError) as error:
            self._break(f"a tool call is not JSON: {error}", closed=True)
            return
        if not isinstance(name, str) or not name.strip():
            self._break("a tool call has no proper name", closed=True)
        elif not isinstance(arguments, dict):
            self._break("the arguments of a tool call are no object", closed=True)
        else:
            self._begin_call(name)
            self._arguments = arguments
            self._end_call(text)
