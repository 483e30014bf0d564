"""Who decodes, who is prefilled next, and in which cache row. Pure bookkeeping, no tensors.

Rows are compact: sequences that decode occupy rows 0..decoding-1, so that a step reads the cache as one slice.
At most one long prompt is in the middle of its prefill; it sits in the row right behind them. When a row becomes
free, the last rows move up, and the moves are handed to whoever owns the tensors.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from glmctl.engine.request import Sequence

# a group is padded to its longest prompt: stop adding prompts that are shorter than this share of it
_PADDING_SHARE = 0.75

Move = tuple[int, int]
"""(from row, to row)"""


@dataclass(frozen=True)
class Prefill:
    """Prompt pieces that go through the model together, one row each.

    `leaders` take rows first_row..; all start at the same prompt position, `start`, and `ends[i]` is where row i's
    piece ends.
    """

    first_row: int
    leaders: list[Sequence]
    start: int
    ends: list[int]

    @property
    def complete(self) -> bool:
        """Whether every prompt is in the cache after this."""
        return all(end == len(seq.request.prompt) for seq, end in zip(self.leaders, self.ends, strict=True))


@dataclass(frozen=True)
class Admission:
    """What one step prefills.

    `copies` are (leader's row, own row, sequence) of requests that repeat a leader's very prompt (samples of one
    question): their rows follow behind all leaders and are copied rather than computed.
    """

    groups: list[Prefill]
    copies: list[tuple[int, int, Sequence]]


class Scheduler:
    """First come, first served over `max_slots` rows, at most `prefill_tokens` prompt tokens a step."""

    def __init__(self, max_slots: int, prefill_tokens: int) -> None:
        assert max_slots > 0
        assert prefill_tokens > 0
        self.max_slots = max_slots
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence] = []
        """sequence of each occupied row"""
        self.decoding = 0
        """how many of `rows` have their whole prompt in the cache; at most one more row is occupied"""

    @property
    def free(self) -> int:
        """Rows without a sequence."""
        return self.max_slots - len(self.rows)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def admit(self) -> Admission:
        """Take what this step prefills; the sequences get their rows now and decode from this step on.

        A prompt above the budget goes alone, in pieces over several steps, while the others keep decoding.
        """
        if len(self.rows) > self.decoding:
            return Admission([self._continue_long()], [])
        if not self.waiting or not self.free:
            return Admission([], [])
        if len(self.waiting[0].request.prompt) > self.prefill_tokens:
            self.rows.append(self.waiting.popleft())
            return Admission([self._continue_long()], [])
        leaders, followers = self._take()
        leaders.sort(key=lambda seq: len(seq.request.prompt), reverse=True)
        first = self.decoding
        self.rows += leaders
        row_of = {tuple(seq.request.prompt): first + index for index, seq in enumerate(leaders)}
        copies = []
        for seq in followers:
            copies.append((row_of[tuple(seq.request.prompt)], len(self.rows), seq))
            self.rows.append(seq)
        self.decoding = len(self.rows)
        for seq in self.rows[first:]:
            seq.filled = len(seq.request.prompt)
        return Admission(_groups(first, leaders), copies)

    def remove(self, row: int) -> list[Move]:
        """Free a row; returns the moves that keep the rows compact, in the order to carry them out."""
        assert 0 <= row < len(self.rows)
        moves = []
        if row < self.decoding:
            self.decoding -= 1
            if row != self.decoding:
                moves.append((self.decoding, row))
            row = self.decoding
        last = len(self.rows) - 1
        if row != last:
            moves.append((last, row))
        for source, target in moves:
            self.rows[target] = self.rows[source]
        self.rows.pop()
        return moves

    def drop_waiting(self, request_id: str) -> Sequence | None:
        """Take a queued request out of the queue."""
        for index, seq in enumerate(self.waiting):
            if seq.request.id == request_id:
                del self.waiting[index]
                return seq
        return None

    def row_of(self, request_id: str) -> int | None:
        """The row of an admitted request."""
        return next((row for row, seq in enumerate(self.rows) if seq.request.id == request_id), None)

    def _continue_long(self) -> Prefill:
        seq = self.rows[-1]
        start, total = seq.filled, len(seq.request.prompt)
        seq.filled = min(total, start + self.prefill_tokens)
        if seq.filled == total:
            self.decoding += 1
        return Prefill(len(self.rows) - 1, [seq], start, [seq.filled])

    def _take(self) -> tuple[list[Sequence], list[Sequence]]:
        """Sequences off the queue while rows and budget last: distinct prompts, and repetitions of those."""
        leaders: list[Sequence] = []
        followers: list[Sequence] = []
        seen: set[tuple[int, ...]] = set()
        budget, free = self.prefill_tokens, self.free
        while self.waiting and len(leaders) + len(followers) < free:
            seq = self.waiting[0]
            prompt = tuple(seq.request.prompt)
            if prompt in seen:
                followers.append(seq)
            elif len(prompt) <= budget:
                leaders.append(seq)
                seen.add(prompt)
                budget -= len(prompt)
            else:
                break
            self.waiting.popleft()
        return leaders, followers


def _groups(first_row: int, leaders: list[Sequence]) -> list[Prefill]:
    """Split prompts, longest first, into runs of similar length: each run is padded to its own longest."""
    groups: list[Prefill] = []
    begin = 0
    for index in range(1, len(leaders) + 1):
        longest = len(leaders[begin].request.prompt)
        if index < len(leaders) and len(leaders[index].request.prompt) >= _PADDING_SHARE * longest:
            continue
        members = leaders[begin:index]
        groups.append(Prefill(first_row + begin, members, 0, [len(seq.request.prompt) for seq in members]))
        begin = index
    return groups
