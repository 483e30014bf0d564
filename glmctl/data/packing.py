"""Laying documents into rows of a fixed number of tokens. Pure functions of lengths, no text and no tensors.

Two packings (spec section 2, Packing): concatenate-and-cut for pre-training, where the random cuts act as
augmentation, and best-fit (Ding et al. 2024) for mid-training and SFT, which cuts only what is longer than a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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
    """One epoch of best-fit packing; the number of rows depends on the lengths alone, never on the seed."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, rng: np.random.Generator) -> None:
        pieces = cut(lengths, sequence_length)
        order = rng.permutation(len(pieces))
        shuffled = [pieces[i] for i in order]
        bins = best_fit([piece.stop - piece.start for piece in shuffled], sequence_length)
        self._rows = [[shuffled[i] for i in members] for members in bins]
        self._order = rng.permutation(len(bins))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> list[Piece]:
        """The pieces of row `index`; together they have at most a row's tokens."""
        return self._rows[int(self._order[index])]


def cut(lengths: np.ndarray, sequence_length: int) -> list[Piece]:
    """Every document as one piece, or, when longer than a row, as full pieces and a remainder. Loses no token."""
    return [
        Piece(document, start, min(start + sequence_length, int(length)))
        for document, length in enumerate(lengths)
        for start in range(0, int(length), sequence_length)
    ]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` by row; each goes to the row with the least sufficient room.

    Equal lengths keep their given order, so shuffling the input shuffles who shares a row with whom.
    O(n log n + n * distinct rooms).
    """
    assert all(0 < length <= capacity for length in lengths), "pieces are cut before they are packed"
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the distinct rooms that some row has, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms.pop(at)
        rows[row].append(index)
        left = room - length
        if left:
            if not rows_by_room.setdefault(left, []):
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows
