"""Reading files that others wrote: packed or not, damaged or hostile, always with bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from glmctl.errors import DataError, EnvironmentProblem, RecipeError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_EXPANSION = 200
"""a packed file that grows by more than this (past 8 MB) is taken for a bomb"""
MIN_BOMB_BYTES = 8 * 1024 * 1024
MAX_WINDOW_BYTES = 1 << 31
"""of a zstd frame: what `zstd --long=31` writes, and takes to read"""


@dataclass
class BadRows:
    """Rows and files that could not be used, counted by kind, with the first few places of each."""

    limit: float = 0.01
    """share of the rows of one source that may be bad"""
    kinds: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Rows left out so far."""
        return sum(self.kinds.values())

    def add(self, kind: str, place: str) -> None:
        """Count one bad row at `place` (file:line)."""
        self.kinds[kind] += 1
        known = self.places.setdefault(kind, [])
        if len(known) < 5:
            known.append(place)

    def summary(self) -> str:
        """One line: how many of each kind, and where the first is."""
        return "; ".join(f"{count} x {kind} (first: {self.places[kind][0]})" for kind, count in self.kinds.items())

    def merge(self, kinds: Mapping[str, int], places: Mapping[str, Sequence[str]]) -> None:
        """Take over what another reader counted, behind what is known here."""
        self.kinds.update(kinds)
        for kind, found in places.items():
            known = self.places.setdefault(kind, [])
            known += found[: 5 - len(known)]

    def check(self, before: int, rows: int, where: str) -> None:
        """DataError if more than the tolerated share of `rows` went bad since the count was `before`."""
        bad = self.total - before
        if bad and bad > self.limit * rows:
            raise DataError(f"{where}: {bad} of {rows} rows are unreadable: {self.summary()}")


def decoded(data: bytes, place: str, bad: BadRows) -> str | None:
    """`data` as text, or None and a bad row when it is not UTF-8 text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        bad.add("not UTF-8", place)
        return None
    if "\0" in text:
        bad.add("holds NUL", place)
        return None
    return text.removeprefix("\ufeff")


PACKED = (".gz", ".zst")


@contextmanager
def open_maybe_packed(path: Path) -> Iterator[BinaryIO]:
    """A binary stream of `path`, unpacked when its name ends in .gz or .zst.

    DataError naming the file when it is empty, truncated, damaged, or unpacks to over 200 times its size.
    """
    import zstandard

    try:
        with open(path, "rb") as raw:
            if path.suffix in PACKED:
                size = path.stat().st_size
                if size == 0:
                    raise DataError(f"{path}: empty; a packed file of nothing has at least its head")
                limit = max(MIN_BOMB_BYTES, MAX_EXPANSION * size)
                stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else _Zstandard(raw)
                yield io.BufferedReader(_Capped(stream, limit, path))
            else:
                yield raw
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{path}: truncated or damaged {path.suffix[1:]}: {error}") from error
    except PermissionError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from error


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Zstandard:
    """Frames one after the other. zstandard's own reader takes a cut-off file for one that ends; this raises."""

    # a block of 4 bytes may stand for 128 KB, so little is fed at a time
    _FEED = 1024

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._pending = b""
        self._ready = b""
        self._given = 0

    def read(self, size: int) -> bytes:
        while self._given == len(self._ready):
            if not self._pending:
                self._pending = self._raw.read(self._FEED)
            if not self._pending:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return b""
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready, self._given = self._frame.decompress(self._pending), 0
            self._pending = b""
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        data = self._ready[self._given : self._given + size]
        self._given += len(data)
        return data


class _Capped(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes."""

    def __init__(self, stream: _Readable, limit: int, path: Path) -> None:
        self._stream, self._left, self._path = stream, limit, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _bomb(self._path)
        buffer[: len(data)] = data
        return len(data)


def numbered_lines(stream: BinaryIO, first: int = 1) -> Iterator[tuple[int, bytes | None]]:
    """(line number from `first`, line), the line None when it is longer than 16 MB."""
    number = first - 1
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) <= MAX_ROW_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW_BYTES)
        yield number, None


def json_row(line: bytes | None, place: str, bad: BadRows) -> dict[str, Any] | None:
    """The JSON object of a line; None for an empty line, or a bad row (a line of None is one that was too long)."""
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


# ------------------------------------------------------------------ Parquet

_ROWS_AT_ONCE = 256
_DICTIONARY_PAGE = 2
MAX_BATCH_BYTES = 256 * 1024 * 1024
"""most text that is unpacked from a Parquet column's dictionary at once"""


def parquet_texts(
    path: Path, columns: Sequence[str], bad: BadRows, *, group: int | None = None, first: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:row`, row) of flat columns of a Parquet file, or of its row group `group`, whose first row is `first`.

    Text that is no UTF-8, holds NUL, or is longer than 16 MB makes a bad row. DataError when the file is damaged, lacks
    one of `columns`, or unpacks to over 200 times its size.
    """
    with open_parquet(path) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise DataError(f"{path}: no column '{missing[0]}'; one of: {', '.join(file.schema_arrow.names[:12])}")
        number = first
        for batch in _batches(path, file, columns, group):
            values = [_undecoded(column) for column in batch.columns]
            for at in range(len(batch)):
                place = f"{path}:{number}"
                number += 1
                row = _text_row(batch.schema.names, values, at, place, bad)
                if row is not None:
                    yield place, row


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(`path:row`, row with whatever its columns hold, or what is wrong with it).

    DataError when the file is damaged, or unpacks to over 200 times its size.
    """
    number = 0
    with open_parquet(path) as file:
        for batch in _batches(path, file, None, None):
            for at in range(len(batch)):
                number += 1
                yield f"{path}:{number}", _row(batch.slice(at, 1))


def _row(batch: pa.RecordBatch) -> dict[str, Any] | DataError:
    if batch.nbytes > MAX_ROW_BYTES:
        return DataError(f"the row is longer than {MAX_ROW_BYTES >> 20} MB")
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 text: {error}")
    found: dict[str, Any] = row
    return found


def _text_row(
    names: Sequence[str], columns: Sequence[tuple[bool, list[Any]]], at: int, place: str, bad: BadRows
) -> dict[str, Any] | None:
    """Row `at` of some columns as `_undecoded` gives them; None and one bad row when a cell of text is bad."""
    row: dict[str, Any] = {}
    for name, (is_text, cells) in zip(names, columns, strict=True):
        row[name] = cells[at]
        if not is_text or cells[at] is None:
            continue
        if len(cells[at]) > MAX_ROW_BYTES:
            bad.add("too long", place)
            return None
        row[name] = decoded(cells[at], place, bad)
        if row[name] is None:
            return None
    return row


def _undecoded(column: pa.Array) -> tuple[bool, list[Any]]:
    """(whether a column is text, its values): text as bytes, because one cell that is no UTF-8 would fail them all."""
    import pyarrow as pa

    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text, (column.cast(pa.large_binary()) if is_text else column).to_pylist()


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The Parquet file at `path`. What goes wrong with it inside the context names it: DataError when it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file") from error
    except PermissionError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a name in the metadata
        raise DataError(f"{path}: damaged Parquet file: {error}") from error


def _batches(
    path: Path, file: pq.ParquetFile, columns: Sequence[str] | None, group: int | None
) -> Iterator[pa.RecordBatch]:
    """Rows a few at a time: a few bytes of a dictionary's index may each stand for megabytes."""
    import pyarrow as pa

    about = file.metadata
    leaves = range(about.num_columns)
    wanted = [at for at in leaves if columns is None or file.schema.column(at).path.split(".")[0] in columns]
    for number in range(about.num_row_groups) if group is None else [group]:
        part = about.row_group(number)
        # an error of damaged metadata is an exception in the reader, and the end of the process in `part.column`
        if next(file.iter_batches(batch_size=1, row_groups=[number], columns=columns), None) is None:
            continue
        chunks = [part.column(at) for at in wanted]
        packed = sum(chunk.total_compressed_size for chunk in chunks)
        left = max(MIN_BOMB_BYTES // about.num_row_groups, MAX_EXPANSION * packed)
        dictionaries = sum(_dictionary_bytes(path, chunk) for chunk in chunks)
        if sum(chunk.total_uncompressed_size for chunk in chunks) > left or dictionaries > MAX_BATCH_BYTES:
            raise _bomb(path)
        rows = max(1, min(_ROWS_AT_ONCE, MAX_BATCH_BYTES // max(1, dictionaries)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=columns):
            arrays = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns]
            unpacked = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)
            left -= unpacked.nbytes
            if left < 0:
                raise _bomb(path)
            yield unpacked


def _dictionary_bytes(path: Path, chunk: pq.ColumnChunkMetaData) -> int:
    """Unpacked size of the page of values that a column's part begins with, 0 when it begins with another page.

    The file's metadata does not tell, the page's head does: Thrift's compact protocol, field 1 its kind, field 2 this.
    """
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    with open(path, "rb") as stream:
        stream.seek(start)
        head = stream.read(16)
    # a field is 0x15 (the next one, an i32) and a number in groups of 7 bits, twice its value
    found = re.match(rb"\x15([\x80-\xff]{0,4}[\x00-\x7f])\x15([\x80-\xff]{0,4}[\x00-\x7f])", head, re.DOTALL)
    if found is None:
        raise DataError(f"{path}: damaged Parquet file: no page at byte {start}")
    kind, size = (sum((byte & 0x7F) << 7 * at for at, byte in enumerate(field)) >> 1 for field in found.groups())
    return size if kind == _DICTIONARY_PAGE else 0


def _bomb(path: Path) -> DataError:
    return DataError(f"{path}: unpacks to more than {MAX_EXPANSION} times its size")
