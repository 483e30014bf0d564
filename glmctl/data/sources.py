"""Where text comes from: files, rows, source trees, repository histories, and prose that is at hand.

Order is fixed: source by source as the recipe lists them, within one by path, within a file by line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from glmctl.data import history, hub, repository, retrieval
from glmctl.data.chat import render_text
from glmctl.data.conversations import Conversation, conversation_of
from glmctl.data.language import programming_language
from glmctl.data.reading import BadRows, decoded, json_row, numbered_lines, open_maybe_packed, parquet_texts
from glmctl.data.repository import Links
from glmctl.data.units import Span, Unit, plan, tree_root
from glmctl.errors import DataError

if TYPE_CHECKING:
    from glmctl.recipe.schema import (
        BundledText,
        HuggingFaceSource,
        JsonLinesSource,
        ParquetSource,
        RepositoryHistory,
        Source,
        SourceTree,
    )

MAX_DOCUMENT_CHARS = 1_000_000
"""a longer text becomes several documents, cut after a line"""
MAX_BLOCK_BYTES = 64 * 1024 * 1024
"""most of a plain text file that is in memory at once"""


@dataclass(frozen=True)
class Document:
    """One document to train on."""

    text: str
    domain: str
    path: str
    is_code: bool = False
    language: str = ""
    """a programming language's name or a natural one's ISO 639-1 code, where it is known"""
    copy: int = 0
    """0, 1, ... when its weight shows it more than once an epoch"""
    conversation: Conversation | None = None
    """what `text` is the rendering of; its tokens are then the chat template's, so contents cannot open a turn"""
    header: str = ""
    """a line that is shown in front of the text, and that no stage looks at"""
    repository: str | None = None
    """which repository of its source it is a file of, when its files are to share contexts"""
    links: Links | None = None
    """what a repository's file refers to"""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text: decides everything random about a document, wherever it stands."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()

    @property
    def size(self) -> int:
        """UTF-8 bytes of header and text."""
        return len((self.header + self.text).encode("utf-8", "surrogatepass"))


def documents(sources: Sequence[Source], seed: int, *, bad: BadRows | None = None) -> Iterator[Document]:
    """Every document of `sources`, each as often as its source's weight says.

    A weight of 2.5 gives every document twice and half of them, chosen by content hash and `seed`, a third time.
    RecipeError for a path that does not exist; DataError for a truncated file or too many bad rows (see `bad`).
    """
    bad = BadRows() if bad is None else bad
    units = plan(sources)
    for place, source in enumerate(sources):
        before, rows = bad.total, 0
        for unit in units:
            for document in read(unit, source, bad) if unit.source == place else ():
                rows += 1
                for copy in range(times(document.digest, source.weight, seed)):
                    yield replace(document, copy=copy)
        bad.check(before, rows + bad.total - before, name_of(source))


def times(digest: bytes, weight: float, seed: int) -> int:
    """How often a document is seen: `weight` rounded down, or up with the probability of its fraction."""
    whole = int(weight)
    draw = hashlib.sha256(b"weight:%d:" % seed + digest).digest()
    return whole + (int.from_bytes(draw[:8], "big") < (weight - whole) * 2.0**64)


def name_of(source: Source) -> str:
    """What a message calls the source."""
    if source.type == "bundled":
        return source.text
    if source.type == "retrieval":
        return source.type
    if source.type == "huggingface":
        return source.dataset
    return source.root if source.type == "source_tree" else ", ".join(source.paths)


def read(unit: Unit, source: Source, bad: BadRows) -> Iterator[Document]:
    """The documents of one unit of `source`, in order, up to the source's `max_bytes`."""
    return _limited(_read(unit, source, bad), source.max_bytes)


def _limited(found: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Documents up to `max_bytes` of UTF-8 text; the one that would pass it is the last not given."""
    left = float("inf") if max_bytes is None else max_bytes
    for document in found:
        left -= document.size
        if left < 0:
            return
        yield document


def _read(unit: Unit, source: Source, bad: BadRows) -> Iterator[Document]:
    if source.type == "source_tree":
        for span in unit.spans:
            yield from _read_files(span, source, bad)
    elif source.type == "repository_history":
        yield from _read_history(unit, source, bad)
    elif source.type == "bundled":
        yield from _read_bundled(source)
    elif source.type == "retrieval":
        (span,) = unit.spans
        assert span.stop is not None, "a span of generated documents has an end"
        for number, text in enumerate(retrieval.documents(source, span.start, span.stop), start=span.start):
            yield Document(text, source.domain, f"retrieval:{number}")
    elif source.type == "text":
        for span in unit.spans:
            yield from _read_text(span, source.domain, bad)
    elif source.type == "conversations":
        for span in unit.spans:
            for place, line in _lines(span):
                yield from _talk(line, source.domain, place, bad)
    else:
        for span in unit.spans:
            for place, row in _rows(span, source, bad):
                yield from _row_documents(row, source, place, bad)


# ------------------------------------------------------------------ files


def split_long(text: str, limit: int = MAX_DOCUMENT_CHARS) -> Iterator[str]:
    """`text` in parts of at most `limit` characters, cut after a line where there is one. Loses nothing."""
    at = 0
    while len(text) - at > limit:
        line = text.rfind("\n", at, at + limit) + 1
        cut = line if line > at else at + limit
        yield text[at:cut]
        at = cut
    yield text[at:]


def _read_text(span: Span, domain: str, bad: BadRows) -> Iterator[Document]:
    with open_maybe_packed(Path(span.path)) as stream:
        for block in _blocks(stream):
            text = decoded(block, span.path, bad)
            if text is not None and not text.strip():
                bad.add("empty", span.path)
            elif text is not None:
                for part in split_long(text):
                    yield Document(part, domain, span.path)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """The whole of a file, a huge one in parts that end with a line."""
    yield stream.read(MAX_BLOCK_BYTES) + stream.readline(MAX_BLOCK_BYTES)
    while block := stream.read(MAX_BLOCK_BYTES):
        yield block + stream.readline(MAX_BLOCK_BYTES)


def _lines(span: Span) -> Iterator[tuple[str, bytes | None]]:
    """(`path:line`, line) of a span, the line None when it is too long."""
    with open_maybe_packed(Path(span.path)) as stream:
        if span.start:
            stream.seek(span.start)
        for number, line in numbered_lines(stream, span.first):
            yield f"{span.path}:{number}", line
            if span.stop is not None and stream.tell() >= span.stop:
                return


def _rows(
    span: Span, source: JsonLinesSource | ParquetSource | HuggingFaceSource, bad: BadRows
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a span of rows."""
    if source.type == "huggingface":
        yield from hub.rows(source)
        return
    if source.type == "parquet":
        wanted = [name for name in (source.field, source.language_field) if name is not None]
        yield from parquet_texts(Path(span.path), wanted, bad, group=span.start, first=span.first)
        return
    for place, line in _lines(span):
        row = json_row(line, place, bad)
        if row is not None:
            yield place, row


def _row_documents(
    row: dict[str, Any],
    source: JsonLinesSource | ParquetSource | HuggingFaceSource,
    place: str,
    bad: BadRows,
) -> Iterator[Document]:
    text = _row_text(row, source.field, place, bad)
    if text is None:
        return
    language = row.get(source.language_field) if source.language_field is not None else None
    for part in split_long(text):
        yield Document(part, source.domain, place, source.code, str(language or "").lower())


def _talk(line: bytes | None, domain: str, place: str, bad: BadRows) -> Iterator[Document]:
    row = json_row(line, place, bad)
    if row is None:
        return
    try:
        talk = conversation_of(row)
        text = render_text(talk.messages, talk.tools, enable_thinking=talk.enable_thinking)
    except DataError as error:
        bad.add(f"not a conversation ({error.message})", place)
        return
    yield Document(text, domain, place, conversation=talk)


def _row_text(row: dict[str, Any], name: str, place: str, bad: BadRows) -> str | None:
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


# ------------------------------------------------------------------ repositories


def _read_files(span: Span, source: SourceTree, bad: BadRows) -> Iterator[Document]:
    root = tree_root(source.root)
    linker = repository.Linker(root)
    for path in span.members:
        try:
            data = (root / path).read_bytes()
        except FileNotFoundError:
            bad.add("link to nothing", str(root / path))
            continue
        text = decoded(data, str(root / path), bad)
        if text is None or not text.strip():
            continue
        document = Document("", source.domain, path, True, programming_language(path), header=repository.header(path))
        if source.repo_level:
            document = replace(document, repository=span.path, links=linker.links(path, text))
        for part in split_long(text):
            yield replace(document, text=part)
            document = replace(document, header="")


def _read_history(unit: Unit, source: RepositoryHistory, bad: BadRows) -> Iterator[Document]:
    records = []
    for span in unit.spans:
        for place, line in _lines(span):
            row = json_row(line, place, bad)
            if row is None:
                continue
            try:
                records.append(history.record_of(row, place))
            except DataError as error:
                bad.add(f"not a record ({error.message})", place)
    root = tree_root(source.root) if source.root is not None else None
    for place, text in history.contexts(records, root, source.max_chars):
        yield Document(text, source.domain, place)


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
