"""What a model has answered, on disk the moment it is known: a killed evaluation goes on where it stopped.

One JSON line an answer: the digest of everything that decides it (weights, tokens, sampling) and the answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from glmctl import __version__
from glmctl.errors import DataError
from glmctl.run import atomic
from glmctl.run.fingerprint import digest


class Responses:
    """Answers of one model by key, read when opened and appended to. Use as a context manager.

    Opening takes the file for this process: EnvironmentProblem when another one has it. What a kill left of the last
    line is cut off; DataError names a line that is no answer.
    """

    def __init__(self, path: Path, owner: str) -> None:
        """owner: what all keys depend on, `fingerprint(folder)` for a model."""
        self.path, self.owner = path, owner
        self._known: dict[str, Any] = {}
        with atomic.machine_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = atomic.acquire_lock(path.with_suffix(".lock"))
            try:
                self._read()
                self._file = path.open("ab", buffering=0)
            except BaseException:
                os.close(self._lock)
                raise

    def key(self, kind: str, *parts: Any) -> str:
        """The name of an answer: what was asked, JSON-able, under this owner."""
        return digest([self.owner, kind, *parts])

    def get(self, key: str) -> Any:
        """The answer, None when there is none yet."""
        return self._known.get(key)

    def put(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keep answers, all in one write. EnvironmentProblem when the disk is full."""
        rows = dict(answers)
        text = "".join(json.dumps([key, value], ensure_ascii=False) + "\n" for key, value in rows.items())
        with atomic.machine_errors(self.path):
            self._file.write(text.encode())
        self._known |= rows

    def close(self) -> None:
        """Give the file back; a second time does nothing."""
        if not self._file.closed:
            self._file.close()
            os.close(self._lock)

    def delete(self) -> None:
        """Close, and remove what the answers have been turned into results of."""
        self.close()
        self.path.unlink()
        self.path.with_suffix(".lock").unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            os.truncate(self.path, end)
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                key, value = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{self.path}:{number}: not an answer: {error}", hint="without the file, all is asked again"
                ) from error
            self._known[key] = value


def fingerprint(folder: Path) -> str:
    """Digest of all files of a model folder by content, and of this version: what an answer is a function of.

    Files that the folder's manifest lists at their size count by its SHA-256; others are read.
    """
    listed = atomic.read_manifest(folder) if (folder / atomic.MANIFEST).is_file() else {}
    found = {}
    for path in sorted(folder.iterdir()):
        entry = listed.get(path.name)
        if path.is_file() and path.name != atomic.MANIFEST:
            same = entry is not None and entry["size"] == path.stat().st_size
            found[path.name] = entry["sha256"] if entry is not None and same else atomic.sha256_file(path)
    return digest([__version__, found])
