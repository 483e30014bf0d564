"""YAML text to plain data plus the line of every key.

The dialect is YAML 1.2's core: `true`/`false` are the only booleans, `1e-4` is a number, a date is text.
No tags, so nothing can be constructed; duplicate keys are refused; aliases cannot make a small file large.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glmctl.errors import RecipeError

MAX_BYTES = 1_000_000
"""a larger file is not a recipe (somebody passed a data file)"""
MAX_NODES = 50_000
"""values in one recipe once its aliases are written out"""

KeyPath = tuple[str | int, ...]


@dataclass
class Document:
    """The data of a recipe, and where each key path was written: `file.yaml:12` or `--set a.b`."""

    data: dict[str, Any]
    marks: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The mark of `path` or of the nearest section around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                return self.marks[path[:end]]
        return "recipe"

    def blame(self, path: KeyPath) -> str:
        """Like `where`, but a section that an override reached into is the override's."""
        inside = [mark for key, mark in self.marks.items() if key[: len(path)] == path and "set " in mark]
        return inside[-1] if inside and path else self.where(path)


class _Loader(yaml.SafeLoader):
    """Composes nodes only; scalars get their tags from the table below, not YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name


_TAG = "tag:yaml.org,2002:"
_NUMBER = list("-+0123456789.")
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", _NUMBER),
):
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": lambda text: int(text.replace("_", ""), 16 if text.startswith("0x") else 10),
    _TAG + "float": lambda text: float(re.sub(r"\.(?=inf|Inf|nan|NaN)", "", text.replace("_", ""))),
    _TAG + "str": lambda text: text,
}


def read(path: Path) -> Document:
    """Read one recipe file.

    Raises:
        RecipeError: unreadable, not UTF-8, not YAML, not a mapping, a duplicate key, a tag, or too large.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES:,} bytes; this is not a recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from error
    document = Document({})
    data = parse(text, str(path), document.marks)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {describe(data)}"
        raise RecipeError(f"{path}: {what}; a recipe is a mapping of keys to values")
    document.data = data
    document.marks[()] = str(path)
    return document


def parse(text: str, label: str, marks: dict[KeyPath, str] | None = None) -> Any:
    """The value that YAML `text` holds. With `marks` (a file), its keys' lines go there as `label:line`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return _Builder(label, marks).build(node, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and marks is not None else ""
        raise RecipeError(f"{label}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise RecipeError(f"{label}: nested too deeply") from error


def describe(value: object) -> str:
    """A value as an error message shows it."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Builder:
    """Walks the node graph into plain data, remembering lines, counting every visit of every node."""

    def __init__(self, label: str, marks: dict[KeyPath, str] | None) -> None:
        self.label, self.numbered = label, marks is not None
        self.marks = {} if marks is None else marks
        self.nodes = 0
        self.open: set[int] = set()

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(f"{self.at(node)}: more than {MAX_NODES:,} values once aliases are written out")
        if id(node) in self.open:
            raise RecipeError(f"{self.at(node)}: an alias refers to the value it is part of")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            raise RecipeError(f"{self.at(node)}: the tag '{_shown(node.tag)}' is not allowed in a recipe")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode), node
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.marks[path] = self.at(node)
        return self.build(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self.at(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{where}: a key must be a word")
            key = str(key_node.value)
            if key == "<<" and not key_node.style:
                raise RecipeError(f"{where}: merge keys (<<) are not supported", hint="use `extends: other-recipe`")
            if key in data:
                raise RecipeError(f"{where}: {dotted((*path, key))}: this key was already given")
            self.marks[(*path, key)] = where
            data[key] = self.build(value_node, (*path, key))
        return data

    def scalar(self, node: yaml.ScalarNode) -> Any:
        construct = _SCALARS.get(node.tag)
        if construct is None:
            raise RecipeError(f"{self.at(node)}: the tag '{_shown(node.tag)}' is not allowed in a recipe")
        try:
            return construct(node.value)
        except ValueError as error:  # `!!int word`, or an integer of more digits than Python converts
            raise RecipeError(f"{self.at(node)}: not a number: {describe(node.value)}") from error

    def at(self, node: yaml.Node) -> str:
        return f"{self.label}:{node.start_mark.line + 1}" if self.numbered else self.label


def dotted(path: KeyPath) -> str:
    """A key path as it is typed: `stages.0.tokens`."""
    return ".".join(str(part) for part in path)


def _shown(tag: str) -> str:
    return tag.replace(_TAG, "!!")
