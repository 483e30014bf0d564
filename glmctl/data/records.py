"""Rows of JSON values, whatever they lie in: JSON lines, a JSON list, Parquet, or a data set of the `datasets` library.

A row that cannot be read comes out as the DataError that says why, so that a reader can count and go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.data import hub
from glmctl.data.reading import PACKED, numbered_lines, open_maybe_packed, parquet_rows
from glmctl.errors import DataError, RecipeError

if TYPE_CHECKING:
    from glmctl.recipe.schema import ConversationFiles

MAX_JSON_BYTES = 1 << 30
"""of one JSON document, which is read whole; JSON lines have no such limit"""

Record = tuple[str, Any | DataError]
"""`file:line` (or `name:row`), and the row or what is wrong with it"""


def records(source: ConversationFiles) -> Iterator[Record]:
    """Every row of `source` in order.

    RecipeError for a path of nothing; DataError for a file that is damaged as a whole; EnvironmentProblem when the
    hub does not answer.
    """
    if source.dataset is not None:
        found = hub.stream(source.dataset, config=source.config, split=source.split, revision=source.revision)
        yield from _without_nulls(found)
        return
    assert source.path is not None, "the recipe has checked that one of the two is given"
    path = Path(source.path)
    if not path.exists():
        raise RecipeError(f"{path}: no such file", hint="a data set of the hub is named as {dataset: OWNER/NAME}")
    if path.is_dir():
        yield from _without_nulls(_folder(path, source.split))
    elif _suffix(path) == ".parquet":
        yield from _without_nulls(parquet_rows(path))
    elif _suffix(path) == ".json":
        yield from _json(path)
    else:
        yield from _json_lines(path)


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def _folder(path: Path, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A folder of `save_to_disk`, or one in a hub repository's layout."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return hub.saved(path, split)
    return hub.stream(str(path), split=split)


def _json_lines(path: Path) -> Iterator[Record]:
    with open_maybe_packed(path) as stream:
        for number, line in numbered_lines(stream):
            if line is None:
                yield f"{path}:{number}", DataError("the line is longer than 16 MB")
            elif line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Any | DataError:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON: {error}")


def _json(path: Path) -> Iterator[Record]:
    """A JSON list, each item by the line it begins at; a file that is no list is read as JSON lines."""
    with open_maybe_packed(path) as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{path}: a JSON document of over {MAX_JSON_BYTES >> 20} MB; make it JSON lines")
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    yield from _items(text, path)


def _items(text: str, path: Path) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    at, counted, line = text.index("[") + 1, 0, 1
    while True:
        at = _skip(text, at, " \t\r\n")
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not JSON: {error}") from error
        yield f"{path}:{line}", item
        at = _skip(text, at, " \t\r\n")
        if text[at : at + 1] not in (",", "]"):
            raise DataError(f"{path}:{line}: not JSON: a comma or ] is missing behind the item of this line")
        at += text[at] == ","


def _skip(text: str, at: int, passed: str) -> int:
    while at < len(text) and text[at] in passed:
        at += 1
    return at


def _without_nulls(found: Iterator[tuple[str, Mapping[str, Any] | DataError]]) -> Iterator[Record]:
    """Rows of Arrow tables, where every message has every key of any message: those that are null were not there."""
    for place, row in found:
        yield place, _pruned(row)


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value
