"""What the engine asks of whoever computes: one step over a ragged batch of tokens and a paged cache.

N rows (tokens) of a step, S sequences, M blocks of the longest table, R rows whose logits are wanted, D hidden width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """The tokens of one step. Index tensors are on the CPU, contiguous.

    Rows of one sequence stand together, their positions ascending by one; a sequence may bring one token (decode),
    one and its drafts (verification), or a piece of its prompt. A row attends to all cached places of its sequence up
    to its own. Some of those may be written in this very step, by rows of its own sequence *or by rows of another
    sequence earlier in the batch* that shares the block (a common prefix is computed once, by the first who brings it):
    in every layer, all rows' keys and values are stored before any row attends, or rows are worked through in order.
    """

    token_N: Tensor
    """int64"""
    position_N: Tensor
    """int64: the angle of RoPE and the place in the cache"""
    sequence_N: Tensor
    """int64, ascending: row of `block_table_SM`"""
    block_table_SM: Tensor
    """int32: block ids of each sequence, padded with 0"""
    logit_rows_R: Tensor
    """int64, ascending: which of the N rows need logits"""
    hidden_ND: Tensor | None = None
    """for `draft` only, on the runner's device: hidden state of the place *before* each row's"""

    @classmethod
    def of(
        cls,
        token: list[int],
        start: list[int],
        count: list[int],
        table_SM: npt.NDArray[np.int32],
        wanted: list[int],
        hidden_ND: Tensor | None = None,
    ) -> Self:
        """S pieces: their tokens one behind the other, first place and length of each, table rows at full width."""
        count_S = np.array(count, np.int64)
        start_S = np.array(start, np.int64)
        first_row_S = count_S.cumsum() - count_S
        position_N = np.arange(len(token)) + np.repeat(start_S - first_row_S, count_S)
        return cls(
            token_N=torch.from_numpy(np.array(token, np.int64)),
            position_N=torch.from_numpy(position_N),
            sequence_N=torch.from_numpy(np.repeat(np.arange(len(count)), count_S)),
            block_table_SM=torch.from_numpy(table_SM),
            logit_rows_R=torch.from_numpy(np.array(wanted, np.int64)),
            hidden_ND=hidden_ND,
        )


@dataclass(frozen=True)
class StepOutput:
    """What one step computes, on the runner's device."""

    logits_RV: Tensor
    """fp32"""
    hidden_ND: Tensor
    """hidden state of every row after the final norm: what the MTP layer reads"""


class Runner(Protocol):
    """Computes steps for one model and one `PagedCache`. Greedy results do not depend on what else is in the batch."""

    def step(self, batch: StepBatch) -> StepOutput:
        """Feed the rows through the network, storing keys and values of its layers; logits predict the next token."""
        ...

    def draft(self, batch: StepBatch) -> StepOutput:
        """Feed the rows through the MTP layer, storing its keys and values (layer `num_hidden_layers` of the cache).

        A row is (token t_j at place j, `hidden_ND` = hidden state of place j - 1), j >= 1; its logits predict t_{j+1}
        and its hidden state is the MTP layer's, after its norm, which the next draft reads. Place 0 of this layer is
        never written and must not be attended to: a row sees places 1..j. (Position i of the MTP layer in training is
        place i + 1 here; RoPE is relative, so the shift changes nothing but makes a place a function of the tokens up
        to it, which is what sharing blocks by prefix needs.)
        """
        ...

    def limit_drafts(self, tokens_S: Tensor | None) -> None:
        """Draft among these tokens (int64 ids on the CPU, ascending): `draft` gives their logits, [R, S]. None: all."""
        ...

    def refresh_weights(self) -> None:
        """The model's parameters were changed in place: take them again."""
        ...
