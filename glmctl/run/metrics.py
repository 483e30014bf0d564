"""`metrics.jsonl`: one JSON object a line, appended as training goes, cut back when it resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmctl.errors import DataError
from glmctl.run import atomic

_TAIL = 1 << 16
"""bytes from the end in which the last row is looked for first"""


class MetricsLog:
    """Rows of a JSON-lines file. With `writable` False (every rank but the first) `append` and `truncate` do nothing.

    Floats are written by `repr`, so a row read back holds the very same numbers; a NaN or infinity becomes null.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self.path = path
        self.writable = writable
        self._checked = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line, in one write."""
        if not self.writable:
            return
        line = json.dumps(finite(dict(row)), ensure_ascii=False, allow_nan=False) + "\n"
        with atomic.machine_errors(self.path):
            if not self._checked:
                self._drop_torn_line()
            with self.path.open("ab", buffering=0) as stream:
                stream.write(line.encode())

    def rows(self) -> list[dict[str, Any]]:
        """Every complete row. A last line that a kill left without its end is not one; other bad lines: DataError."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate(lines[:-1], start=1):
            found.append(self._row(line, f"{self.path}:{number}"))
        return found

    def last(self) -> dict[str, Any] | None:
        """The last complete row, found from the file's end; None when there is none. DataError as `rows`."""
        if not self.path.is_file():
            return None
        with self.path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            tail = _TAIL
            while True:
                stream.seek(max(0, size - tail))
                lines = stream.read().split(b"\n")[:-1]
                # in a part of the file the first line may have begun before it
                if len(lines) > 1 or (lines and tail >= size):
                    return self._row(lines[-1], f"{self.path}: last line")
                if tail >= size:
                    return None
                tail *= 8

    def sync(self) -> None:
        """Return when every row is on the disk: what is written after this may count on them."""
        if self.writable and self.path.is_file():
            with atomic.machine_errors(self.path), self.path.open("rb") as stream:
                os.fsync(stream.fileno())
                atomic.fsync_folder(self.path.parent)

    def _row(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not an object")
        return row

    def truncate(self, key: str, after: int) -> None:
        """Drop the rows whose `key` is above `after`: steps that were not in the checkpoint that is resumed."""
        if not self.writable or not self.path.is_file():
            return
        kept = [row for row in self.rows() if not row.get(key, after) > after]
        atomic.write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self._checked = True

    def _drop_torn_line(self) -> None:
        """Cut what follows the last newline, so that a new row never continues half of an old one."""
        if self.path.is_file():
            end = self.path.read_bytes().rfind(b"\n") + 1
            if end != self.path.stat().st_size:
                os.truncate(self.path, end)
        self._checked = True


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
