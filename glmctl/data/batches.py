"""Token batches, each a pure function of (seed, index): the position in the data is the whole state of a run.

Shapes: B rows, T tokens a row. Every tensor is int64. `documents_BT` numbers the documents inside a row (0, 1, ...)
and is -1 on padding; attention stays inside a document and no target crosses one. `targets_BT` is the next token,
`mtp_targets_BT` the one after it; -100 where there is none, or where the loss mask forbids it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch

from glmctl import console
from glmctl.data.packing import BestFitPlan, ConcatPlan, Piece
from glmctl.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """One batch; see the module's docstring for what each tensor holds."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    """0, 1, ... within each document's piece"""
    documents_BT: torch.Tensor
    targets_BT: torch.Tensor
    mtp_tokens_BT: torch.Tensor
    """the next token of the same document, or the padding id"""
    mtp_targets_BT: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        moved = self._map(lambda x: x.to(device, non_blocking=True))
        # known here; asked there, a GPU would first have to end what it does
        vars(moved)["single_document"] = self.single_document
        return moved

    def rows(self, start: int, stop: int) -> Batch:
        """Rows `start` ... `stop` as a smaller batch (views)."""
        return self._map(lambda x: x[start:stop])

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most `rows` rows, in order."""
        return [self.rows(at, min(at + rows, len(self))) for at in range(0, len(self), rows)]

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    @cached_property
    def single_document(self) -> bool:
        """True when every row is one document without padding: plain causal attention is then exact."""
        return bool((self.documents_BT == 0).all())

    @cached_property
    def target_count(self) -> int:
        """Targets that are trained on."""
        return int((self.targets_BT != IGNORE).sum())

    @cached_property
    def mtp_target_count(self) -> int:
        """Targets of the multi-token-prediction layer that are trained on."""
        return int((self.mtp_targets_BT != IGNORE).sum())

    @cached_property
    def token_count(self) -> int:
        """Tokens that are not padding."""
        return int((self.documents_BT >= 0).sum())

    def _map(self, change: _TensorMap) -> Batch:
        return Batch(
            change(self.tokens_BT),
            change(self.positions_BT),
            change(self.documents_BT),
            change(self.targets_BT),
            change(self.mtp_tokens_BT),
            change(self.mtp_targets_BT),
        )


class _TensorMap(Protocol):
    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...


class TokenSource(Protocol):
    """What batches need of token shards: a flat stream and where its documents begin."""

    @property
    def total_tokens(self) -> int: ...

    @property
    def document_starts(self) -> np.ndarray: ...

    @property
    def pad_id(self) -> int: ...

    def tokens(self, start: int, count: int) -> np.ndarray: ...


class _Rows:
    """Row-by-row assembly of a batch in numpy."""

    def __init__(self, rows: int, length: int, pad_id: int) -> None:
        shape = (rows, length)
        self.tokens = np.full(shape, pad_id, np.int64)
        self.positions = np.zeros(shape, np.int64)
        self.documents = np.full(shape, -1, np.int64)
        self.targets = np.full(shape, IGNORE, np.int64)
        self.mtp_tokens = np.full(shape, pad_id, np.int64)
        self.mtp_targets = np.full(shape, IGNORE, np.int64)
        self._filled = [0] * rows
        self._count = [0] * rows

    def add(self, row: int, tokens: np.ndarray, count: int, mask: np.ndarray | None = None) -> None:
        """Append the first `count` of `tokens` as a document of `row`.

        Up to two tokens beyond `count` are only looked at as targets. `mask` (same length as `tokens`) is 1 where
        a token may be a target.
        """
        at = self._filled[row]
        wanted = tokens if mask is None else np.where(mask != 0, tokens, IGNORE)
        self.tokens[row, at : at + count] = tokens[:count]
        self.positions[row, at : at + count] = np.arange(count)
        self.documents[row, at : at + count] = self._count[row]
        one, two = tokens[1 : count + 1], wanted[2 : count + 2]
        self.targets[row, at : at + len(one)] = wanted[1 : count + 1]
        self.mtp_tokens[row, at : at + len(one)] = one
        self.mtp_targets[row, at : at + len(two)] = two
        self._filled[row] += count
        self._count[row] += 1

    def batch(self) -> Batch:
        return Batch(
            torch.from_numpy(self.tokens),
            torch.from_numpy(self.positions),
            torch.from_numpy(self.documents),
            torch.from_numpy(self.targets),
            torch.from_numpy(self.mtp_tokens),
            torch.from_numpy(self.mtp_targets),
        )


def _epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))


class _Epochs:
    """Plans by epoch, the last two kept: a batch may straddle the border between epochs."""

    def __init__(
        self, lengths: np.ndarray, sequence_length: int, packing: Literal["concat", "best_fit"], seed: int
    ) -> None:
        self.lengths = lengths
        self._sequence_length = sequence_length
        self._kind: type[ConcatPlan] | type[BestFitPlan] = ConcatPlan if packing == "concat" else BestFitPlan
        self._seed = seed
        self._plans: dict[int, ConcatPlan | BestFitPlan] = {}
        self.rows_per_epoch = len(self._plan(0))

    def _plan(self, epoch: int) -> ConcatPlan | BestFitPlan:
        if epoch not in self._plans:
            while len(self._plans) > 1:
                del self._plans[min(self._plans)]
            self._plans[epoch] = self._kind(self.lengths, self._sequence_length, _epoch_rng(self._seed, epoch))
        return self._plans[epoch]

    def row(self, index: int) -> list[Piece]:
        epoch, within = divmod(index, self.rows_per_epoch)
        return self._plan(epoch).row(within)


class PretrainBatches:
    """Packed rows of a token stream; documents and rows are reshuffled (and re-cut, when concatenated) each epoch.

    The rows are planned when the first is asked for: a run has stages that it comes to weeks after its start.
    """

    def __init__(
        self,
        shards: TokenSource,
        sequence_length: int,
        packing: Literal["concat", "best_fit"] = "concat",
        seed: int = 0,
    ) -> None:
        """DataError when the stream is empty."""
        if shards.total_tokens == 0:
            raise DataError("the training data holds no tokens")
        self._shards = shards
        self.sequence_length = sequence_length
        self._packing = packing
        self._seed = seed

    @cached_property
    def _epochs(self) -> _Epochs:
        lengths = np.diff(np.append(self._shards.document_starts, self._shards.total_tokens))
        return _Epochs(lengths, self.sequence_length, self._packing, self._seed)

    @property
    def sequences_per_epoch(self) -> int:
        """Rows of one epoch."""
        return self._epochs.rows_per_epoch

    @property
    def total_tokens(self) -> int:
        """Tokens of one epoch, without what packing leaves empty."""
        return self._shards.total_tokens

    def forget(self) -> None:
        """Give back what the plans take; they are made again, alike, when a row is asked for."""
        vars(self).pop("_epochs", None)

    def batch(self, first_sequence: int, count: int) -> Batch:
        """Rows `first_sequence` ... `+ count` of the endless sequence of epochs."""
        rows = _Rows(count, self.sequence_length, self._shards.pad_id)
        starts, lengths = self._shards.document_starts, self._epochs.lengths
        for row in range(count):
            for document, start, stop in self._epochs.row(first_sequence + row):
                end = min(stop + 2, int(lengths[document]))
                tokens = self._shards.tokens(int(starts[document]) + start, end - start)
                rows.add(row, tokens.astype(np.int64), stop - start)
        return rows.batch()


class MaskedTokens(Protocol):
    """A token list with a loss mask of the same length (`chat.Encoded` is one)."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def loss_mask(self) -> Sequence[int]: ...


class SftBatches:
    """Best-fit packed conversations; a token is a target where its loss mask is 1.

    Conversations longer than a row are left out, counted in `dropped` and warned about: cutting one would teach
    an answer without its question. Every row of an epoch appears once; epochs are repacked and reshuffled.
    """

    def __init__(self, encoded: Sequence[MaskedTokens], sequence_length: int, seed: int = 0, *, pad_id: int) -> None:
        """DataError when no conversation fits, or none has a token to learn."""
        fitting = [e for e in encoded if 0 < len(e.tokens) <= sequence_length]
        self.dropped = len(encoded) - len(fitting)
        if not fitting:
            raise DataError(
                f"none of {len(encoded)} conversations fits in {sequence_length} tokens", hint="raise sequence_length"
            )
        if not any(any(e.loss_mask[1:]) for e in fitting):
            raise DataError(f"none of {len(fitting)} conversations has a token to learn")
        if self.dropped:
            console.warn(f"{self.dropped} of {len(encoded)} conversations exceed {sequence_length} tokens: left out")
        self._tokens = [np.asarray(e.tokens, np.int64) for e in fitting]
        self._masks = [np.asarray(e.loss_mask, np.int64) for e in fitting]
        self.sequence_length = sequence_length
        self._pad_id = pad_id
        lengths = np.array([len(tokens) for tokens in self._tokens])
        self._epochs = _Epochs(lengths, sequence_length, "best_fit", seed)
        self.rows_per_epoch = self._epochs.rows_per_epoch

    def batch(self, step: int, rows: int) -> Batch:
        """Rows `step * rows` ... `(step + 1) * rows` of the endless sequence of epochs."""
        built = _Rows(rows, self.sequence_length, self._pad_id)
        for row in range(rows):
            for conversation, _, stop in self._epochs.row(step * rows + row):
                built.add(row, self._tokens[conversation], stop, self._masks[conversation])
        return built.batch()


def pad_batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int, length: int | None = None) -> Batch:
    """One (tokens, loss mask) pair a row, padded on the right to `length` (default: the longest row)."""
    longest = max(len(tokens) for tokens, _ in rows)
    width = longest if length is None else length
    assert longest <= width, f"a row of {longest} tokens does not fit in {width}"
    built = _Rows(len(rows), width, pad_id)
    for row, (tokens, mask) in enumerate(rows):
        assert len(tokens) == len(mask), "a loss mask has one entry a token"
        built.add(row, np.asarray(tokens, np.int64), len(tokens), np.asarray(mask, np.int64))
    return built.batch()
