"""Where text comes from: files, JSON lines, source trees, and prose that is at hand without a network.

Order is fixed: source by source as the recipe lists them, within one by path, within a file by line.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.data import repository
from glmctl.data.chat import render_text
from glmctl.data.conversations import Conversation, conversation_of
from glmctl.data.reading import BadRows, decoded, numbered_lines, open_maybe_gzip
from glmctl.errors import DataError, RecipeError

if TYPE_CHECKING:
    from glmctl.recipe.schema import BundledText, ConversationsSource, JsonLinesSource, Source, SourceTree, TextSource

MAX_DOCUMENT_CHARS = 1_000_000
"""a longer text becomes several documents, cut after a line"""
REPOSITORY_DOCUMENT_CHARS = 65_536
"""about 16k tokens, so that a document of several files fits the 32k rows of mid-training"""


@dataclass(frozen=True)
class Document:
    """One document to train on."""

    text: str
    domain: str
    path: str
    is_code: bool = False
    copy: int = 0
    """0, 1, ... when the source's weight shows it more than once an epoch"""
    conversation: Conversation | None = None
    """what `text` is the rendering of; its tokens are then the chat template's, so contents cannot open a turn"""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text: decides everything random about a document, wherever it stands."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()


def documents(sources: Sequence[Source], seed: int, *, bad: BadRows | None = None) -> Iterator[Document]:
    """Every document of `sources`, each as often as its source's weight says.

    A weight of 2.5 gives every document twice and half of them, chosen by content hash and `seed`, a third time.
    RecipeError for a path that does not exist; DataError for a truncated file or too many bad rows (see `bad`).
    """
    bad = BadRows() if bad is None else bad
    for source in sources:
        before, rows = bad.total, 0
        for document in _limited(_read(source, bad), source.max_bytes):
            rows += 1
            for copy in range(_times(document, source.weight, seed)):
                yield replace(document, copy=copy)
        bad.check(before, rows + bad.total - before, _name(source))


def size_hint(sources: Sequence[Source]) -> int:
    """A rough number of UTF-8 bytes that `documents` will give; for progress bars only."""
    total = 0.0
    for source in sources:
        if source.type == "bundled":
            size = 1_300_000 if source.text == "jargon-file" else 700_000
        elif source.type == "source_tree":
            size = source.max_bytes or 12_000_000
        else:
            size = sum(path.stat().st_size * (3 if path.suffix == ".gz" else 1) for path in _files(source.paths))
        total += min(size, source.max_bytes or size) * source.weight
    return max(1, int(total))


def _times(document: Document, weight: float, seed: int) -> int:
    whole = int(weight)
    draw = hashlib.sha256(b"weight:%d:" % seed + document.digest).digest()
    return whole + (int.from_bytes(draw[:8], "big") < (weight - whole) * 2.0**64)


def _limited(found: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Documents up to `max_bytes` of UTF-8 text; the one that would pass it is the last not given."""
    left = float("inf") if max_bytes is None else max_bytes
    for document in found:
        left -= len(document.text.encode("utf-8", "surrogatepass"))
        if left < 0:
            return
        yield document


def _name(source: Source) -> str:
    if source.type == "bundled":
        return source.text
    return source.root if source.type == "source_tree" else ", ".join(source.paths)


def _read(source: Source, bad: BadRows) -> Iterator[Document]:
    if source.type == "text":
        return _read_text(source, bad)
    if source.type == "jsonl":
        return _read_json_lines(source, bad)
    if source.type == "source_tree":
        return _read_tree(source, bad)
    if source.type == "conversations":
        return _read_conversations(source, bad)
    return _read_bundled(source)


# ------------------------------------------------------------------ files


def _files(paths: Sequence[str]) -> list[Path]:
    """Files that `paths` (files, folders, glob patterns) name, in order of the list, then by name."""
    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise RecipeError(f"{name}: no such file or folder")
            found += [p for p in matches if p.is_file()]
    return found


def split_long(text: str, limit: int = MAX_DOCUMENT_CHARS) -> Iterator[str]:
    """`text` in parts of at most `limit` characters, cut after a line where there is one. Loses nothing."""
    at = 0
    while len(text) - at > limit:
        line = text.rfind("\n", at, at + limit) + 1
        cut = line if line > at else at + limit
        yield text[at:cut]
        at = cut
    yield text[at:]


def _read_text(source: TextSource, bad: BadRows) -> Iterator[Document]:
    for path in _files(source.paths):
        with open_maybe_gzip(path) as stream:
            text = decoded(stream.read(), str(path), bad)
        if text is not None and not text.strip():
            bad.add("empty", str(path))
        elif text is not None:
            for part in split_long(text):
                yield Document(part, source.domain, str(path))


def _read_json_lines(source: JsonLinesSource, bad: BadRows) -> Iterator[Document]:
    for path in _files(source.paths):
        with open_maybe_gzip(path) as stream:
            for number, line in numbered_lines(stream):
                text = _row_text(line, source.field, f"{path}:{number}", bad)
                if text is not None:
                    for part in split_long(text):
                        yield Document(part, source.domain, f"{path}:{number}")


def _read_conversations(source: ConversationsSource, bad: BadRows) -> Iterator[Document]:
    for path in _files(source.paths):
        with open_maybe_gzip(path) as stream:
            for number, line in numbered_lines(stream):
                place = f"{path}:{number}"
                row = _json_row(line, place, bad)
                if row is None:
                    continue
                try:
                    talk = conversation_of(row)
                    text = render_text(talk.messages, talk.tools, enable_thinking=talk.enable_thinking)
                except DataError as error:
                    bad.add(f"not a conversation ({error.message})", place)
                    continue
                yield Document(text, source.domain, place, conversation=talk)


def _json_row(line: bytes | None, place: str, bad: BadRows) -> dict[str, Any] | None:
    """The JSON object of a line; None for an empty line, or a bad row."""
    if line is None:
        bad.add("too long", place)
        return None
    if not line.strip():
        return None
    text = decoded(line, place, bad)
    if text is None:
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        bad.add("not JSON", place)
        return None
    if not isinstance(row, dict):
        bad.add("not an object", place)
        return None
    return row


def _row_text(line: bytes | None, name: str, place: str, bad: BadRows) -> str | None:
    row = _json_row(line, place, bad)
    if row is None:
        return None
    if name not in row:
        bad.add(f"no field '{name}'", place)
    elif not isinstance(row[name], str):
        bad.add(f"'{name}' is not text", place)
    elif not row[name].strip():
        bad.add("empty", place)
    elif "\0" in row[name]:
        bad.add("holds NUL", place)
    else:
        text: str = row[name]
        return text
    return None


# ------------------------------------------------------------------ source trees


def _tree_root(root: str) -> Path:
    path = Path(sysconfig.get_path("stdlib")) if root == "python:stdlib" else Path(root).expanduser()
    if not path.is_dir():
        raise RecipeError(f"{root}: no such folder")
    return path


def _tree_files(source: SourceTree, root: Path) -> dict[str, list[str]]:
    """Group -> relative paths. A group is a top folder; a loose file is its own, unless the root is a package."""
    groups: dict[str, list[str]] = {}

    def excluded(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in source.exclude)

    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not excluded(name) and not name.startswith("."))
        for name in sorted(names):
            if excluded(name) or not any(fnmatch(name, pattern) for pattern in source.include):
                continue
            path = (Path(folder) / name).relative_to(root).as_posix()
            loose = "/" not in path and not (root / "__init__.py").is_file()
            groups.setdefault(path if loose else path.split("/")[0] if "/" in path else ".", []).append(path)
    # by hash of the name, so that a limit on bytes takes a fair sample of the tree
    return {key: groups[key] for key in sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())}


def _read_tree(source: SourceTree, bad: BadRows) -> Iterator[Document]:
    root = _tree_root(source.root)
    for paths in _tree_files(source, root).values():
        files: dict[str, str] = {}
        for path in paths:
            text = decoded((root / path).read_bytes(), str(root / path), bad)
            if text is not None and text.strip():
                files[path] = text
        if source.repo_level:
            joined = list(repository.join(files, REPOSITORY_DOCUMENT_CHARS))
        else:
            joined = [(path, repository.headed(path, text)) for path, text in files.items()]
        for path, text in joined:
            for part in split_long(text):
                yield Document(part, source.domain, path, is_code=True)


# ------------------------------------------------------------------ bundled


def _read_bundled(source: BundledText) -> Iterator[Document]:
    if source.text == "python-topics":
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Document(topics[name].strip() + "\n", source.domain, f"pydoc_data.topics:{name}")
        return
    name = "jargon-4.4.7.jsonl.gz"
    packed = resources.files("glmctl.data").joinpath("corpora", name).read_bytes()
    for number, line in enumerate(gzip.decompress(packed).decode("utf-8").splitlines(), start=1):
        yield Document(json.loads(line)["text"], source.domain, f"{name}:{number}")
