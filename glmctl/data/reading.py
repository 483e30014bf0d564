"""Reading files that others wrote: packed or not, damaged or hostile, always with bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from glmctl.errors import DataError, EnvironmentProblem, RecipeError

MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_EXPANSION = 200
"""a packed file that grows by more than this (past 8 MB) is taken for a bomb"""


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

    DataError naming the file when it is truncated, damaged, or unpacks to over 200 times its size.
    """
    import zstandard

    try:
        with open(path, "rb") as raw:
            if path.suffix in PACKED:
                limit = max(8 * 1024 * 1024, MAX_EXPANSION * path.stat().st_size)
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
        self._decompressor = zstandard.ZstdDecompressor()
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
            raise DataError(f"{self._path}: unpacks to more than {MAX_EXPANSION} times its size")
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


def parquet_rows(
    path: Path, *, columns: Sequence[str] | None = None, group: int | None = None, first: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:row`, row) of a Parquet file, or of its row group `group`, whose first row has the number `first`.

    DataError when the file is damaged or lacks one of `columns` (None: all of them).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: no column '{missing[0]}'; one of: {', '.join(file.schema_arrow.names[:12])}")
            groups = None if group is None else [group]
            number = first
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    yield f"{path}:{number}", row
                    number += 1
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged Parquet file: {error}") from error
