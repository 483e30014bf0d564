"""Drafts of the MTP layer: what it expects to follow the newest token, one to three tokens ahead.

The model sees a request's newest token and its drafts in one pass. What is emitted is always the sampler's own choice
from the model's logits, with the request's own random number; a draft only decides whether the next place of the pass
is of use: it is accepted iff it is that very choice. This is rejection sampling (Leviathan et al. 2023, algorithm 1)
for a proposal that is certain of its draft: accepted with the model's probability of it, otherwise the token follows
the model's distribution without it. The random number that decides is the one plain decoding uses, so a request's
tokens are not only distributed alike but the same with and without drafts, whenever drafting is switched on or off
(up to the rounding of a pass over more rows).

The first draft reads the model's hidden state, each further one the MTP layer's own; what these leave in the cache
is written again once the true hidden states are known.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glmctl.engine.runner import Runner, StepBatch
from glmctl.engine.scheduler import Work
from glmctl.engine.sequence import Sequence

MAX_DRAFTS = 3


@dataclass(frozen=True)
class Computed:
    """A piece of a sequence that the step has computed."""

    work: Work
    row: int
    """its first row in the step"""
    end: int
    """places below it are in the cache: known tokens and accepted drafts"""


class Drafter:
    """Keeps the MTP layer's cache along with the model's and drafts for sequences that go on.

    `tail_BD` holds the hidden state of each block's last place: the MTP layer's entry at the first place of a block
    needs it, also when the block before was shared and not computed.
    """

    def __init__(
        self, runner: Runner, table_SM: npt.NDArray[np.int32], tail_BD: Tensor, block_size: int, drafts: int
    ) -> None:
        assert 1 <= drafts <= MAX_DRAFTS
        self.drafts = drafts
        self._runner, self._table_SM, self._tail_BD, self._block_size = runner, table_SM, tail_BD, block_size
        self._tokens_S: Tensor | None = None

    def limit(self, tokens_S: Tensor | None) -> None:
        """Draft among these tokens (`engine.draft_vocabulary`); None: among all."""
        self._tokens_S = tokens_S
        self._runner.limit_drafts(tokens_S)

    def remember(self, batch: StepBatch, hidden_ND: Tensor) -> None:
        """Keep the hidden states of rows that end a block. A rejected draft's is written again by the true token."""
        position, sequence = batch.position_N.numpy(), batch.sequence_N.numpy()
        rows = np.flatnonzero(position % self._block_size == self._block_size - 1)
        if len(rows):
            blocks = batch.block_table_SM.numpy()[sequence[rows], position[rows] // self._block_size]
            device = hidden_ND.device
            self._tail_BD[torch.from_numpy(blocks).long().to(device)] = hidden_ND[torch.from_numpy(rows).to(device)]

    def follow(self, pieces: Seq[Computed], hidden_ND: Tensor) -> int:
        """Fill the MTP layer's places of what was computed, and draft for every sequence that goes on.

        Returns the drafts made.
        """
        rows = _Rows()
        ahead: list[Sequence] = []
        for piece in pieces:
            sequence = piece.work.sequence
            # the newest token of one that has ended needs no entry: nobody will ever share it
            stop = piece.end if sequence.finished else piece.end + 1
            places = range(sequence.mtp_filled, min(stop, len(sequence.tokens)))
            if not places:
                continue
            rows.begin(sequence, places[0], sequence.tokens[places[0] : places.stop])
            for place in places:
                source = piece.row + place - 1 - piece.work.start
                rows.hidden.append(source if place > piece.work.start else -self._tail_block(sequence, place))
            sequence.mtp_filled = places.stop
            if self._wanted(sequence) > 0 and places.stop == len(sequence.tokens):
                rows.wanted.append(len(rows.hidden) - 1)
                ahead.append(sequence)
        if not rows.hidden:
            return 0
        out = self._runner.draft(rows.batch(self._table_SM, self._sources(rows.hidden, hidden_ND)))
        made = self._append(ahead, out.logits_RV)
        state_RD = out.hidden_ND[torch.tensor(rows.wanted, dtype=torch.long, device=hidden_ND.device)]
        for depth in range(1, self.drafts):
            deeper = [index for index, sequence in enumerate(ahead) if self._wanted(sequence) > depth]
            if not deeper:
                break
            ahead = [ahead[index] for index in deeper]
            rows = _Rows()
            for row, sequence in enumerate(ahead):
                rows.begin(sequence, len(sequence.tokens) - 1 + depth, sequence.drafts[-1:])
                rows.wanted.append(row)
            out = self._runner.draft(rows.batch(self._table_SM, state_RD[torch.tensor(deeper)]))
            made += self._append(ahead, out.logits_RV)
            state_RD = out.hidden_ND
        return made

    def _wanted(self, sequence: Sequence) -> int:
        """Drafts of use: the pass that verifies them emits one token more than are accepted."""
        return min(self.drafts, sequence.limit - len(sequence.tokens) - 1) if not sequence.finished else 0

    def _tail_block(self, sequence: Sequence, place: int) -> int:
        """The block before `place`, where the step's first row follows a block that was shared."""
        assert place % self._block_size == 0
        return sequence.blocks[place // self._block_size - 1]

    def _sources(self, index: list[int], hidden_ND: Tensor) -> Tensor:
        """Hidden states by row of the step; a negative one is that of the last place of block `-index`."""
        index_N = torch.tensor(index, device=hidden_ND.device)
        sources_ND = hidden_ND[index_N.clamp_min(0)]
        tails = index_N < 0
        if min(index) < 0:
            sources_ND[tails] = self._tail_BD[-index_N[tails]]
        return sources_ND

    def _append(self, sequences: Seq[Sequence], logits_RV: Tensor) -> int:
        best_R = logits_RV.argmax(-1).cpu()
        drafts_R = best_R if self._tokens_S is None else self._tokens_S[best_R]
        for sequence, token in zip(sequences, drafts_R.tolist(), strict=True):
            sequence.drafts.append(token)
        return len(sequences)


class _Rows:
    """The rows of one pass through the MTP layer, as they are collected."""

    def __init__(self) -> None:
        self.token: list[int] = []
        self.start: list[int] = []
        self.count: list[int] = []
        self.slot: list[int] = []
        self.hidden: list[int] = []
        self.wanted: list[int] = []

    def begin(self, sequence: Sequence, place: int, tokens: list[int]) -> None:
        """The next rows are of `sequence`: these tokens from this place on."""
        self.token += tokens
        self.start.append(place)
        self.count.append(len(tokens))
        self.slot.append(sequence.slot)

    def batch(self, table_SM: npt.NDArray[np.int32], hidden_ND: Tensor) -> StepBatch:
        """The rows as the runner takes them."""
        return StepBatch.of(self.token, self.start, self.count, table_SM[self.slot], self.wanted, hidden_ND)
