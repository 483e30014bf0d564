"""What each step computes: who decodes, whose prompt is worked on, and in which blocks. No tensors of the model.

First come, first served. A sequence has a slot (a row of the block table) and blocks from its admission to its end.
When blocks run out, the youngest gives everything up, goes back to the head of the queue, and is computed again from
its tokens, what it had generated included.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glmctl.engine.blocks import BlockManager, chain
from glmctl.engine.sequence import Sequence

SCORED_CHUNK = 256
"""most prompt tokens a step of a request that wants their log-probabilities: each needs a row of logits"""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens start..start+count-1 of a sequence, then its drafts."""

    sequence: Sequence
    start: int
    count: int
    drafts: list[int]
    newest: bool
    """whether the piece ends in the sequence's newest token, so that the step chooses the next"""


@dataclass(frozen=True)
class Plan:
    """One step."""

    works: list[Work]
    admitted: list[Sequence]
    """those that got their slot in this step"""


class Scheduler:
    """Continuous batching over `max_slots` sequences; at most `prefill_tokens` prompt tokens a step, so that those
    that decode keep moving. `lookahead`: places behind the newest token that drafting writes to.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        block_size: int,
        max_slots: int,
        max_length: int,
        prefill_tokens: int,
        lookahead: int = 0,
    ) -> None:
        assert blocks.total * block_size >= max_length, "one sequence must always fit"
        self.blocks, self.block_size = blocks, block_size
        self.max_slots, self.max_length, self.prefill_tokens = max_slots, max_length, prefill_tokens
        self.lookahead = lookahead
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """in the order of their admission"""
        self.table_SM: npt.NDArray[np.int32] = np.zeros((max_slots, self._blocks_for(max_length)), np.int32)
        self.weights = 0
        """how often the weights have changed: blocks of different weights are never shared"""
        self.drafting = lookahead > 0
        """whether requests that are admitted now keep the MTP layer's cache; they share with their like only"""
        self.reused = 0
        """prompt tokens found in the cache"""
        self.preemptions = 0
        self._slots = list(range(max_slots))[::-1]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, queued or running; its blocks are free at once."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._vacate(sequence)

    def schedule(self) -> Plan:
        """What the next step computes; `computed` is for the engine to advance when it has been."""
        works: list[Work] = []
        budget = self.prefill_tokens
        before = self.preemptions
        # the list shrinks at its end while blocks are being found
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            missing = len(sequence.tokens) - sequence.computed
            count = missing if missing == 1 else min(missing, budget, _largest_piece(sequence))
            if count == 0:
                continue
            if self._reserve(sequence, count):
                works.append(self._work(sequence, count))
                budget -= count if missing > 1 else 0
        admitted: list[Sequence] = []
        while self.waiting and budget > 0 and self._slots and self.preemptions == before:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            admitted.append(sequence)
            count = min(len(sequence.tokens) - sequence.computed, budget, _largest_piece(sequence))
            works.append(self._work(sequence, count))
            budget -= count
        return Plan(works, admitted)

    # ------------------------------------------------------------------ inside

    def _root(self) -> bytes:
        """What the name of a first block is chained to."""
        return f"{self.weights} {self.drafting}".encode()

    def _blocks_for(self, places: int) -> int:
        return -(-places // self.block_size)

    def _work(self, sequence: Sequence, count: int) -> Work:
        start = sequence.computed
        newest = start + count == len(sequence.tokens)
        self._publish(sequence, start + count)
        return Work(sequence, start, count, sequence.drafts if newest else [], newest)

    def _publish(self, sequence: Sequence, places: int) -> None:
        """Name the blocks that this step completes: those behind it in the very step may share them already."""
        if not sequence.shares:
            return
        size, names = self.block_size, sequence.chain
        while (len(names) + 1) * size <= places:
            at = len(names) * size
            name = chain(names[-1] if names else sequence.root, sequence.tokens[at : at + size])
            self.blocks.publish(sequence.blocks[len(names)], name)
            names.append(name)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence its slot, the blocks that already hold its beginning, and new ones for the rest.

        False, and nothing changed, when there are too few: every running sequence keeps one block to grow into.
        """
        shared, names = self._match(sequence)
        idle = sum(self.blocks.users(block) == 0 for block in shared)
        new = self._blocks_for(self._places(len(sequence.tokens))) - len(shared)
        if new > self.blocks.free - idle - len(self.running):
            return False
        for block in shared:
            self.blocks.share(block)
        sequence.slot = self._slots.pop()
        sequence.root, sequence.shares, sequence.drafting = self._root(), True, self.drafting
        sequence.chain = names
        sequence.computed = len(shared) * self.block_size
        sequence.mtp_filled = max(1, sequence.computed)
        self.reused += min(sequence.computed, sequence.prompt_length)
        self._extend(sequence, shared)
        self._extend(sequence, self.blocks.take(new))
        self.running.append(sequence)
        return True

    def _match(self, sequence: Sequence) -> tuple[list[int], list[bytes]]:
        """Cached blocks that hold the sequence's beginning; never its newest token, whose logits are needed."""
        blocks: list[int] = []
        names: list[bytes] = []
        if sequence.request.params.prompt_logprobs is not None:
            return blocks, names
        size, tokens = self.block_size, sequence.tokens
        name = self._root()
        for at in range(0, (len(tokens) - 1) // size * size, size):
            name = chain(name, tokens[at : at + size])
            block = self.blocks.find(name)
            if block is None:
                break
            blocks.append(block)
            names.append(name)
        return blocks, names

    def _places(self, end: int) -> int:
        """Places that a step which computes up to `end` writes to."""
        return min(end + self.lookahead, self.max_length)

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Blocks for the next `count` tokens and the drafts; preempts from the youngest on. False when that was it."""
        places = self._places(sequence.computed + count + len(sequence.drafts))
        if places <= len(sequence.blocks) * self.block_size:
            return True
        need = self._blocks_for(places) - len(sequence.blocks)
        while self.blocks.free < need:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._extend(sequence, self.blocks.take(need))
        return True

    def _extend(self, sequence: Sequence, blocks: list[int]) -> None:
        held = len(sequence.blocks)
        sequence.blocks += blocks
        self.table_SM[sequence.slot, held : held + len(blocks)] = blocks

    def _preempt(self, sequence: Sequence) -> None:
        assert self.running[-1] is sequence
        self.running.pop()
        self._vacate(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        """Give up slot and blocks; the sequence could be computed again from its tokens."""
        self.blocks.release(sequence.blocks)
        self.table_SM[sequence.slot, : len(sequence.blocks)] = 0
        self._slots.append(sequence.slot)
        sequence.slot, sequence.computed, sequence.mtp_filled = -1, 0, 1
        sequence.blocks, sequence.chain, sequence.drafts = [], [], []


def _largest_piece(sequence: Sequence) -> int:
    scored = sequence.request.params.prompt_logprobs is not None and sequence.computed < sequence.prompt_length
    return SCORED_CHUNK if scored else len(sequence.tokens)
