"""Layers of a recipe: defaults < extended files left to right < the file < overrides by dotted key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmctl.errors import RecipeError
from glmctl.recipe.document import Document, KeyPath, describe, dotted, parse, read
from glmctl.recipe.names import SUFFIXES, find

TAGS = ("type", "preset")
"""keys that decide which other keys a section has; a layer that changes one replaces the whole section"""

MAX_DEPTH = 10
"""files that may extend one another in a row"""


def read_extended(path: Path, depth: int = 0) -> Document:
    """Read `path` over everything it extends. `name` is a file's own and never inherited.

    Raises:
        RecipeError: as `document.read`; a missing or circular `extends`; a parent of another type.
    """
    own = read(path)
    parents = own.data.pop("extends", [])
    where = own.marks.get(("extends",), str(path))
    names = [parents] if isinstance(parents, str) else parents
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{where}: extends: expected a recipe or a list of recipes, got {describe(parents)}")
    if depth >= MAX_DEPTH:
        raise RecipeError(f"{where}: extends: more than {MAX_DEPTH} files in a row (do they extend each other?)")
    base = Document({})
    for name in names:
        beside = path.parent / name
        try:
            parent_path = beside if name.endswith(SUFFIXES) and beside.is_file() else find(name)
        except RecipeError as error:
            raise RecipeError(f"{where}: extends: {error.message}", hint=error.hint) from error
        parent = read_extended(parent_path, depth + 1)
        parent.data.pop("name", None)
        if "type" in own.data and parent.data.get("type", own.data["type"]) != own.data["type"]:
            raise RecipeError(
                f"{where}: extends: '{name}' is a '{parent.data['type']}' recipe, this is a '{own.data['type']}' one"
            )
        base = over(base, parent)
    return over(base, own)


def over(base: Document, top: Document) -> Document:
    """`top` laid over `base`: sections merge key by key, everything else (lists too) is replaced."""
    return Document(merge(base.data, top.data), {**base.marks, **top.marks})


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge recursively; `top` wins. A changed `type` or `preset` replaces its section whole."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if key == "model" and isinstance(below, str) and isinstance(value, dict):
            below = {"preset": below}
        merged[key] = value
        if isinstance(below, dict) and isinstance(value, dict):
            replaced = any(tag in value and value[tag] != below.get(tag) for tag in TAGS)
            merged[key] = value if replaced else merge(below, value)
    return merged


def override(document: Document, overrides: Sequence[str] | Mapping[str, Any], recipe: str = "") -> None:
    """Apply `a.b.0.c=value` words (or a mapping of dotted keys to values) to `document`, in order, tags first.

    `recipe` names what is overridden in messages about a mapping, which has no `--set` to point to.

    Raises:
        RecipeError: no `=`, a value that is not YAML, an index outside its list, a key inside a plain value.
    """
    changes = []
    if isinstance(overrides, Mapping):
        changes = [(key, value, f"{recipe}: set {key}") for key, value in overrides.items()]
    else:
        for word in overrides:
            key, equals, text = word.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"--set {word}: expected key=value, as in --set seed=1")
            label = f"--set {key.strip()}"
            changes.append((key.strip(), parse(text, label), label))
    # a tag replaces its section, so it must not wipe out what another override put there
    changes.sort(key=lambda change: change[0].rpartition(".")[2] not in TAGS)
    for key, value, label in changes:
        _set(document, key.split("."), value, label)


def _set(document: Document, parts: list[str], value: Any, label: str) -> None:
    if not all(parts):
        raise RecipeError(f"{label}: an empty key in the path")
    path: KeyPath = ()
    here: Any = document.data
    for part in parts[:-1]:
        step = _step(here, part, label)
        path = (*path, step)
        document.marks.setdefault(path, label)
        if isinstance(here, list):
            here = here[int(step)]
            continue
        below = here.get(part)
        if below is None or (part == "model" and isinstance(below, str) and document.data.get("type") == "pretrain"):
            here[part] = {"preset": below} if isinstance(below, str) else {}
        here = here[part]
    last = _step(here, parts[-1], label)
    path = (*path, last)
    if isinstance(here, dict) and last in TAGS and len(path) > 1 and here.get(str(last), value) != value:
        here.clear()
    here[last] = value
    _mark(document.marks, path, value, label)


def _step(here: object, part: str, label: str) -> str | int:
    """The key or index that `part` means in `here`."""
    if isinstance(here, dict):
        return part
    if isinstance(here, list):
        if not part.isdecimal():
            raise RecipeError(f"{label}: '{part}' should be a number: an index from 0 to {len(here) - 1}")
        if int(part) >= len(here):
            raise RecipeError(f"{label}: index {part} is out of range: there are {len(here)} entries, from 0")
        return int(part)
    raise RecipeError(f"{label}: '{part}' is inside a plain value ({describe(here)}), not a section")


def _mark(marks: dict[KeyPath, str], path: KeyPath, value: object, label: str) -> None:
    for old in [other for other in marks if other[: len(path)] == path]:
        del marks[old]
    marks[path] = label
    assert dotted(path), "an override has a key"
