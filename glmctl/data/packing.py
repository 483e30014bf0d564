"""Laying documents into rows of a fixed number of tokens. Pure functions of lengths, no text and no tensors.

Two packings (spec section 2, Packing): concatenate-and-cut for pre-training, where the random cuts act as
augmentation, and best-fit (Ding et al. 2024) for mid-training and SFT, which cuts only what is longer than a row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 16
"""pieces whose lengths are Python numbers at a time"""


def stage_seed(seed: int, stage: int) -> int:
    """The seed by which stage number `stage` (from 0) of a pretrain recipe with `seed` lays out its rows.

    Each stage has its own, so that two stages over the same text see it in another order.
    """
    return seed * 1009 + stage


class Piece(NamedTuple):
    """Tokens `start` ... `stop` (exclusive) of document `document`."""

    document: int
    start: int
    stop: int


class ConcatPlan:
    """One epoch of concatenate-and-cut: documents in random order, joined, cut every `sequence_length` tokens."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, rng: np.random.Generator) -> None:
        """`lengths` [documents] int64, tokens of each."""
        self._order = rng.permutation(len(lengths))
        self._ends = np.cumsum(lengths[self._order])
        self._length = sequence_length
        total = int(self._ends[-1]) if len(lengths) else 0
        self._total = total
        self._windows = rng.permutation(-(-total // sequence_length))

    def __len__(self) -> int:
        return len(self._windows)

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`; only the window at the end of the epoch holds fewer than a row's tokens."""
        at = int(self._windows[index]) * self._length
        stop = min(at + self._length, self._total)
        place = int(np.searchsorted(self._ends, at, side="right"))
        pieces = []
        while at < stop:
            end = int(self._ends[place])
            document = int(self._order[place])
            begin = int(self._ends[place - 1]) if place else 0
            upto = min(end, stop)
            if upto > at:
                pieces.append(Piece(document, at - begin, upto - begin))
            at, place = upto, place + 1
        return pieces


class BestFitPlan:
    """One epoch of best-fit packing; the number of rows depends on the lengths alone, never on the seed.

    Holds three numbers a piece and two a row, as narrow as they allow: documents are counted in hundreds of millions.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, rng: np.random.Generator) -> None:
        """`lengths` [documents] int64, tokens of each."""
        pieces = cut(lengths, sequence_length)
        shuffled = rng.permutation(len(pieces.documents))
        members, self._ends = _pack((pieces.stops - pieces.starts)[shuffled], sequence_length)
        placed = shuffled[members]
        self._pieces = Pieces(*(column[placed] for column in pieces))
        self._order = rng.permutation(len(self._ends))

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`; together they have at most a row's tokens."""
        row = int(self._order[index])
        inside = slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        return [Piece(*one) for one in zip(*(column[inside].tolist() for column in self._pieces), strict=True)]


class Pieces(NamedTuple):
    """Many pieces, as arrays [pieces] of `Piece`'s fields."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def cut(lengths: np.ndarray, sequence_length: int) -> Pieces:
    """Every document as one piece, or, when longer than a row, as full pieces and a remainder. Loses no token."""
    counts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence_length
    stops = np.minimum(starts + sequence_length, lengths[documents])
    return Pieces(_narrow(documents), _narrow(starts), _narrow(stops))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` by row; each goes to the row with the least sufficient room.

    Equal lengths keep their given order, so shuffling the input shuffles who shares a row with whom.
    O(n log n + n * distinct rooms).
    """
    members, ends = _pack(np.asarray(lengths, np.int64), capacity)
    return [row.tolist() for row in np.split(members, ends[:-1])] if len(ends) else []


def _pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """`best_fit` as the members of all rows in turn and where in them each row ends."""
    assert ((lengths > 0) & (lengths <= capacity)).all(), "pieces are cut before they are packed"
    order = np.argsort(-lengths, kind="stable")
    row_of = array("q")  # by place in `order`
    # the rows of each room are a stack: the top one, and below each row the next
    top, below = [-1] * (capacity + 1), array("q")
    rooms: list[int] = []  # the distinct rooms that some row has, sorted
    for begin in range(0, len(order), _BLOCK):
        for length in lengths[order[begin : begin + _BLOCK]].tolist():
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, row = capacity, len(below)
                below.append(-1)
            else:
                room = rooms[at]
                row = top[room]
                top[room] = below[row]
                if top[room] < 0:
                    rooms.pop(at)
            row_of.append(row)
            left = room - length
            if left:
                if top[left] < 0:
                    insort(rooms, left)
                below[row] = top[left]
                top[left] = row
    rows = np.frombuffer(row_of, np.int64) if row_of else np.zeros(0, np.int64)
    # stable: a row's members stay in the order in which they came
    members = order[np.argsort(rows, kind="stable")]
    return members, np.cumsum(np.bincount(rows, minlength=len(below)))


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same numbers (none negative) in 4 bytes each where they fit."""
    return values.astype(np.int32) if values.max(initial=0) <= np.iinfo(np.int32).max else values
