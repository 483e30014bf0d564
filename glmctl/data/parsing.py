"""Text that the model wrote back to reasoning, content and tool calls: the inverse of the chat template.

One state machine serves both whole texts (`parse`) and streams (`StreamParser`), so they cannot disagree. It looks
for fixed tags only and never looks at a character twice, so its time is linear in the text whatever the text is.
How the text of an argument becomes a value stands in `arguments.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from glmctl.data.arguments import argument_types, value_of
from glmctl.data.tags import Tags, Trimmed

CLOSING = ("<|user|>", "<|observation|>", "<|endoftext|>")

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_KEY, _END_KEY = "<arg_key>", "</arg_key>"
_VALUE, _END_VALUE = "<arg_value>", "</arg_value>"

# strings that never belong inside an answer: seeing one means the model lost the format
_ROLES = (*CLOSING, "<|system|>", "<|assistant|>", "[gMASK]", "<sop>")
_STRAY = (*_ROLES, _THINK, _END_THINK, _END_CALL, _KEY, _END_KEY, _VALUE, _END_VALUE, "<tool_response>")


@dataclass(frozen=True)
class Parsed:
    """What a text says. `tool_calls` holds the complete calls only, as {"name": str, "arguments": dict}."""

    reasoning: str | None
    content: str
    tool_calls: list[dict[str, Any]]
    well_formed: bool
    problem: str | None
    """the first thing that is not as the template would have written it"""

    def message(self) -> dict[str, Any]:
        """As an assistant message that the chat template renders."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": dict(call)} for call in self.tool_calls]
        return message


@dataclass(frozen=True)
class Delta:
    """One increment of a stream; exactly one of the first three, or `tool_name`/`arguments` with `tool_index`."""

    reasoning: str | None = None
    content: str | None = None
    tool_index: int | None = None
    tool_name: str | None = None
    """set once, when call `tool_index` starts"""
    arguments: str | None = None
    """the next piece of the call's arguments as JSON text; the pieces of a complete call join to an object"""


class _State(Enum):
    START = auto()
    REASONING = auto()
    CONTENT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    KEY = auto()
    BEFORE_VALUE = auto()
    VALUE = auto()
    BROKEN_CALL = auto()
    AFTER_CALL = auto()


def parse(text: str, *, thinking: bool = True, tools: Sequence[Mapping[str, Any]] | None = None) -> Parsed:
    """Read one assistant turn. Never raises: what is amiss is in `problem`.

    With `thinking` the text starts with its think block (which may be empty); without, it is what follows the
    `<think></think>` that the prompt gave, though an empty block at the start is accepted too. One closing role
    token at the end is dropped. Calls are read to their end tag in order, so a value may contain anything but
    `</arg_value>`.
    """
    return StreamParser(thinking=thinking, tools=tools).read(text)


class StreamParser:
    """`parse` for text that arrives in pieces: `feed` each one, then `finish`; `parsed` is the whole.

    What stands in a `<tool_call>` is read by `_in_name` and the states that it leads to; another style of calls
    overrides it (`json_calls`), so that everything around the calls is read alike.
    """

    def __init__(self, thinking: bool = True, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._thinking = thinking
        self._schemas = argument_types(tools or ())
        self._state = _State.START
        self._buffer = ""
        self._at = 0  # everything before it has been read
        self._deltas: list[Delta] = []
        self._reasoning = Trimmed(lambda text: self._deltas.append(Delta(reasoning=text)))
        self._content = Trimmed(lambda text: self._deltas.append(Delta(content=text)))
        self._parts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._name = ""
        self._key = ""
        self._arguments: dict[str, Any] = {}
        self._started = 0
        self._problem: str | None = None
        self._finished = False
        self._steps: dict[_State, Callable[[], bool]] = {
            _State.START: self._start,
            _State.REASONING: self._in_reasoning,
            _State.CONTENT: self._in_content,
            _State.NAME: self._in_name,
            _State.ARGUMENTS: self._in_arguments,
            _State.KEY: self._in_key,
            _State.BEFORE_VALUE: self._before_value,
            _State.VALUE: self._in_value,
            _State.BROKEN_CALL: self._in_broken_call,
            _State.AFTER_CALL: self._after_call,
        }

    def feed(self, text: str) -> list[Delta]:
        """What became certain with `text`. Anything that may be the start of a tag is held back."""
        assert not self._finished, "the stream has ended"
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the text."""
        self._finished = True
        deltas = self._advance()
        if self._state is _State.REASONING:
            self._trouble("<think> is not closed")
        elif self.called and self._state is not _State.AFTER_CALL:
            self._trouble("<tool_call> is not closed")
        elif self._state is _State.START and self._thinking:
            self._trouble("there is no <think> block")
        return deltas

    def read(self, text: str) -> Parsed:
        """A whole turn at once, as `parse` takes it."""
        closing = next((token for token in CLOSING if text.endswith(token)), "")
        self.feed(text.removesuffix(closing))
        self.finish()
        return self.parsed

    @property
    def called(self) -> bool:
        """Whether a tool call has begun; one that is quoted in the reasoning is none."""
        return self._state not in (_State.START, _State.REASONING, _State.CONTENT)

    @property
    def parsed(self) -> Parsed:
        """Everything read so far."""
        return Parsed(
            reasoning=self._reasoning.text or None,
            content=self._content.text,
            tool_calls=list(self._calls),
            well_formed=self._problem is None,
            problem=self._problem,
        )

    # ------------------------------------------------------------------ machinery

    def _advance(self) -> list[Delta]:
        while self._steps[self._state]():
            pass
        self._buffer, self._at = self._buffer[self._at :], 0
        deltas, self._deltas = self._deltas, []
        return deltas

    def _trouble(self, problem: str) -> None:
        self._problem = self._problem or problem

    def _until(self, tags: Tags) -> tuple[str, str | None]:
        """Consume text up to and including the first of `tags`; without one, all that cannot begin a tag."""
        match = tags.pattern.search(self._buffer, self._at)
        begin = self._at
        if match:
            self._at = match.end()
            return self._buffer[begin : match.start()], match.group()
        tail = self._buffer[max(begin, len(self._buffer) - tags.longest) :]
        self._at = len(self._buffer) - (0 if self._finished else tags.partial(tail))
        return self._buffer[begin : self._at], None

    def _next_tag(self, tags: Tags) -> str | None:
        """Skip white space; consume and return a tag that stands there, "" if something else does, None to wait."""
        space = _SPACE.match(self._buffer, self._at)
        assert space is not None, "the pattern matches the empty string"
        self._at = space.end()
        head = self._buffer[self._at : self._at + tags.longest]
        found = next((tag for tag in tags.all if head.startswith(tag)), None)
        if found is not None:
            self._at += len(found)
            return found
        if not head or (not self._finished and head in tags.beginnings):
            return None
        return ""

    def _collect(self, tags: Tags) -> tuple[str, str] | None:
        """Text before the next of `tags`, gathered over feeds; None while the tag has not come."""
        text, tag = self._until(tags)
        self._parts.append(text)
        if tag is None:
            return None
        whole = "".join(self._parts)
        self._parts = []
        return whole, tag

    # ------------------------------------------------------------------ states: each returns whether to go on

    def _start(self) -> bool:
        tag = self._next_tag(_OPENING)
        if tag is None:
            return False
        if tag == _THINK:
            self._state = _State.REASONING
        else:
            if self._thinking:
                self._trouble("there is no <think> block")
            self._state = _State.CONTENT
        return True

    def _in_reasoning(self) -> bool:
        text, tag = self._until(_IN_REASONING)
        self._reasoning.add(text)
        if tag is None:
            return False
        if tag == _END_THINK:
            if self._reasoning.text and not self._thinking:
                self._trouble("there is reasoning in a /nothink answer")
            self._state = _State.CONTENT
        else:
            self._trouble(f"{tag} inside the reasoning")
            self._reasoning.add(tag)
        return True

    def _in_content(self) -> bool:
        text, tag = self._until(_IN_CONTENT)
        self._content.add(text)
        if tag is None:
            return False
        if tag == _CALL:
            self._state = _State.NAME
        else:
            self._trouble(f"{tag} inside the content")
            self._content.add(tag)
        return True

    def _in_name(self) -> bool:
        found = self._collect(_AFTER_NAME)
        if found is None:
            return False
        name, tag = found[0].strip(), found[1]
        if not name or _NOT_IN_NAME.search(name):
            self._break("a tool call has no proper name", closed=tag == _END_CALL)
            return True
        self._begin_call(name)
        if tag == _END_CALL:
            self._end_call()
        else:
            self._state = _State.KEY if tag == _KEY else _State.ARGUMENTS
        return True

    def _in_arguments(self) -> bool:
        tag = self._next_tag(_NEXT_ARGUMENT)
        if tag is None:
            return False
        if tag == _KEY:
            self._state = _State.KEY
        elif tag == _END_CALL:
            self._end_call()
        else:
            self._break("text between the arguments of a tool call")
        return True

    def _in_key(self) -> bool:
        found = self._collect(_END_OF_KEY)
        if found is None:
            return False
        if found[1] != _END_KEY:
            self._break("<arg_key> is not closed")
            return True
        self._key = found[0]
        self._state = _State.BEFORE_VALUE
        return True

    def _before_value(self) -> bool:
        tag = self._next_tag(_OPEN_VALUE)
        if tag is None:
            return False
        if tag == _VALUE:
            self._state = _State.VALUE
        else:
            self._break("an <arg_key> has no <arg_value>")
        return True

    def _in_value(self) -> bool:
        found = self._collect(_END_OF_VALUE)
        if found is None:
            return False
        if self._key in self._arguments:
            self._break(f"argument {self._key!r} is given twice")
            return True
        value, text = value_of(found[0], self._schemas.get(self._name, {}).get(self._key))
        opening = ", " if self._arguments else "{"
        self._arguments[self._key] = value
        text = f"{opening}{json.dumps(self._key, ensure_ascii=False)}: {text}"
        self._deltas.append(Delta(tool_index=self._started - 1, arguments=text))
        self._state = _State.ARGUMENTS
        return True

    def _in_broken_call(self) -> bool:
        _, tag = self._until(_END_OF_CALL)
        if tag is None:
            return False
        self._state = _State.AFTER_CALL
        return True

    def _after_call(self) -> bool:
        tag = self._next_tag(_NEXT_CALL)
        if tag is None:
            return False
        if tag == _CALL:
            self._state = _State.NAME
            return True
        self._trouble("text after a tool call")
        _, tag = self._until(_NEXT_CALL)
        if tag == _CALL:
            self._state = _State.NAME
        return tag is not None

    def _begin_call(self, name: str) -> None:
        self._name, self._arguments = name, {}
        self._started += 1
        self._deltas.append(Delta(tool_index=self._started - 1, tool_name=name))

    def _end_call(self, text: str | None = None) -> None:
        """text: what is still to be passed on of the arguments, for one that has not passed them on as they came."""
        text = text or ("}" if self._arguments else "{}")
        self._deltas.append(Delta(tool_index=self._started - 1, arguments=text))
        self._calls.append({"name": self._name, "arguments": self._arguments})
        self._state = _State.AFTER_CALL

    def _break(self, problem: str, *, closed: bool = False) -> None:
        """Leave a call out. closed: its end tag is read."""
        self._trouble(problem)
        self._state = _State.AFTER_CALL if closed else _State.BROKEN_CALL


_OPENING = Tags((_THINK,))
_IN_REASONING = Tags((_END_THINK, _THINK, *_ROLES))
_IN_CONTENT = Tags((_CALL, *_STRAY))
# a literal backslash-n in place of the newline is a slip that released models make
_AFTER_NAME = Tags(("\n", "\\n", _KEY, _END_CALL))
_NEXT_ARGUMENT = Tags((_KEY, _END_CALL))
_END_OF_KEY = Tags((_END_KEY, _VALUE, _END_CALL, _KEY))
_OPEN_VALUE = Tags((_VALUE,))
_END_OF_VALUE = Tags((_END_VALUE,))
_END_OF_CALL = Tags((_END_CALL,))
_NEXT_CALL = Tags((_CALL,))
_SPACE = re.compile(r"\s*")
_NOT_IN_NAME = re.compile(r"[\s<>]")
