"""Contexts: the tokens of a repository's files one behind the other, in dependency order, up to a limit.

The files of one repository gather in a temporary file as token ids; in memory are their paths, links and lengths, and
one context at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from glmctl.data.repository import Links, ordered, references


@dataclass(frozen=True)
class Context:
    """Some files of one repository, or parts of them, one behind the other."""

    split: str
    documents: list[int]
    """places in the unit of the documents that it holds, in order"""
    tokens: np.ndarray
    """[length] ids, the end token included"""


@dataclass(frozen=True)
class _Piece:
    """A document, or as much of it as fits one context: ids `start` ... `start + length` of the temporary file."""

    document: int
    start: int
    length: int


class Repository:
    """Gathers the files of one repository; use as a context manager."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        """`folder`: where the temporary file is; `dtype`: what holds every id."""
        self._store = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in __exit__
        self._dtype = dtype
        self._links: dict[str, Links] = {}
        self._rounds: dict[tuple[str, int], dict[str, list[_Piece]]] = {}
        self._stored = 0

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def add(
        self, split: str, copy: int, path: str, links: Links | None, document: int, pieces: Sequence[Sequence[int]]
    ) -> None:
        """Add a file's ids for round `copy` of `split`, in pieces that each fit a context."""
        self._links[path] = links or Links()
        held = self._rounds.setdefault((split, copy), {}).setdefault(path, [])
        for ids in pieces:
            held.append(_Piece(document, self._stored, len(ids)))
            self._store.write(np.asarray(ids, self._dtype).tobytes())
            self._stored += len(ids)

    def contexts(self, limit: int, separator: Sequence[int], end: int) -> Iterator[Context]:
        """All contexts, of at most `limit` tokens each: round by round, every file of a round once.

        `separator` stands between two files, `end` behind the last.
        """
        for (split, _), files in sorted(self._rounds.items(), key=lambda item: item[0]):
            needs, every = references({path: self._links[path] for path in files})
            pieces = [(path, piece) for path in ordered(needs, every) for piece in files[path]]
            linked = _linked([path for path, _ in pieces], every)
            lengths = [piece.length for _, piece in pieces]
            for first, stop in cut(lengths, linked, limit - 1, len(separator)):
                held = [piece for _, piece in pieces[first:stop]]
                yield Context(split, [piece.document for piece in held], self._joined(held, separator, end))

    def _joined(self, pieces: Sequence[_Piece], separator: Sequence[int], end: int) -> np.ndarray:
        parts: list[Any] = []
        for piece in pieces:
            parts += [separator] if parts else []
            self._store.seek(piece.start * self._dtype.itemsize)
            data = self._store.read(piece.length * self._dtype.itemsize)
            parts.append(np.frombuffer(data, self._dtype))
        return np.concatenate([*(np.asarray(part, self._dtype) for part in parts), np.array([end], self._dtype)])


def _linked(paths: Sequence[str], every: dict[str, set[str]]) -> list[list[int]]:
    """Of each piece, the pieces that it is linked with: its file's next and last, and files either refers to."""
    first = {path: at for at, path in reversed(list(enumerate(paths)))}
    linked: list[list[int]] = [[] for _ in paths]
    pairs = [(at - 1, at) for at in range(1, len(paths)) if paths[at - 1] == paths[at]]
    pairs += [(first[path], first[other]) for path in first for other in sorted(every[path])]
    for one, two in pairs:
        linked[one].append(two)
        linked[two].append(one)
    return linked


def cut(
    lengths: Sequence[int], linked: Sequence[Collection[int]], limit: int, between: int = 0
) -> Iterator[tuple[int, int]]:
    """Ranges of items that together have at most `limit` tokens, with `between` more from each to the next.

    A range is filled until the next item does not fit, and then ends where the fewest links of its items lead out of
    it, within its last quarter, as long as what it gives up fits together with the item that did not.
    `linked[i]`: items that belong with item i, on either side. No item is longer than the limit.
    """
    ends = list(accumulate((length + between for length in lengths), initial=0))

    def size(first: int, stop: int) -> int:
        return ends[stop] - ends[first] - between

    first = 0
    for at in range(1, len(lengths)):
        if size(first, at + 1) <= limit:
            continue
        best, stop = at, at
        leading = fewest = sum(other >= at for item in range(first, at) for other in linked[item])
        while stop - 1 > first and 4 * size(first, stop - 1) >= 3 * limit and size(stop - 1, at + 1) <= limit:
            stop -= 1
            leading += sum(first <= other < stop for other in linked[stop])
            leading -= sum(other > stop for other in linked[stop])
            if leading < fewest:
                best, fewest = stop, leading
        yield first, best
        first = best
    if lengths:
        yield first, len(lengths)
