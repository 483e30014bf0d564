"""Laws of batches: targets are the same document's next tokens, none is lost at a cut, (seed, index) is all."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.batches import IGNORE, Batch, PretrainBatches, SftBatches, pad_batch
from glmctl.data.chat import Encoded
from glmctl.data.packing import BestFitPlan, ConcatPlan
from glmctl.errors import DataError
from glmctl.parallel.accelerate import share

PAD = 0
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)
PACKINGS = st.sampled_from(["concat", "best_fit"])


@dataclass
class Stream:
    """Token shards in memory: document d holds 1000*d + 1, 1000*d + 2, ... so a token tells where it comes from."""

    lengths: list[int]
    pad_id: int = PAD

    def __post_init__(self) -> None:
        self.flat = np.concatenate([1000 * d + 1 + np.arange(n) for d, n in enumerate(self.lengths)])
        self.document_starts = np.cumsum([0, *self.lengths])[:-1]
        self.total_tokens = int(sum(self.lengths))

    def tokens(self, start: int, count: int) -> np.ndarray:
        return self.flat[start : start + count]


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [getattr(batch, name) for name in Batch.__dataclass_fields__]


def equal(one: Batch, two: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 12), PACKINGS)
def test_every_target_of_the_corpus_is_trained_on_exactly_once_an_epoch(
    lengths: list[int], row: int, packing: Any
) -> None:
    batches = PretrainBatches(Stream(lengths), row, packing, seed=3)
    batch = batches.batch(0, batches.sequences_per_epoch)
    found = batch.targets_BT[batch.targets_BT != IGNORE].tolist()
    wanted = [1000 * d + 1 + at for d, n in enumerate(lengths) for at in range(1, n)]
    assert sorted(found) == wanted
    mtp = batch.mtp_targets_BT[batch.mtp_targets_BT != IGNORE].tolist()
    assert sorted(mtp) == [1000 * d + 1 + at for d, n in enumerate(lengths) for at in range(2, n)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 12), PACKINGS)
def test_targets_positions_and_documents_fit_together(lengths: list[int], row: int, packing: Any) -> None:
    batches = PretrainBatches(Stream(lengths), row, packing, seed=1)
    batch = batches.batch(0, batches.sequences_per_epoch)
    tokens, targets = batch.tokens_BT, batch.targets_BT
    real = batch.documents_BT >= 0
    assert bool((tokens[~real] == PAD).all())
    assert bool((targets[~real] == IGNORE).all())
    has = targets != IGNORE
    assert torch.equal(targets[has], tokens[has] + 1)
    assert torch.equal(batch.mtp_tokens_BT[has], targets[has])
    assert bool((batch.mtp_tokens_BT[~has] == PAD).all())
    has_two = batch.mtp_targets_BT != IGNORE
    assert torch.equal(batch.mtp_targets_BT[has_two], tokens[has_two] + 2)
    for b in range(len(batch)):
        for document in set(batch.documents_BT[b].tolist()) - {-1}:
            inside = batch.documents_BT[b] == document
            assert batch.positions_BT[b][inside].tolist() == list(range(int(inside.sum())))
            assert len({token // 1000 for token in tokens[b][inside].tolist()}) == 1


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_batch_is_a_pure_function_of_seed_and_index(packing: Any) -> None:
    stream = Stream([7, 19, 3, 11, 28, 5, 13])
    one, two = (PretrainBatches(stream, 8, packing, seed=5) for _ in range(2))
    n = one.sequences_per_epoch
    two.batch(5 * n, 3)  # where the other one has been must not matter
    for first in (0, n - 1, 2 * n + 1, 1):
        assert equal(one.batch(first, 4), two.batch(first, 4))
    assert equal(one.batch(2, 1), one.batch(0, 4).rows(2, 3))
    assert not equal(one.batch(0, n), PretrainBatches(stream, 8, packing, seed=6).batch(0, n))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_epochs_hold_the_same_tokens_in_another_order(packing: Any) -> None:
    batches = PretrainBatches(Stream([7, 19, 3, 11, 28, 5, 13]), 8, packing, seed=0)
    n = batches.sequences_per_epoch
    one, two = batches.batch(0, n), batches.batch(n, n)
    assert not torch.equal(one.tokens_BT, two.tokens_BT)
    assert sorted(one.tokens_BT.flatten().tolist()) == sorted(two.tokens_BT.flatten().tolist())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 12), PACKINGS, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 4))
def test_ranks_share_a_batch_and_a_resume_at_another_world_size_goes_on_exactly(
    lengths: list[int], row: int, packing: Any, world: int, done: int
) -> None:
    """The only loader state is how many rows are done: any world size that divides the batch sees the same rows."""
    rows = 12
    whole = PretrainBatches(Stream(lengths), row, packing, seed=2).batch(done * rows, rows)
    parts = []
    for rank in range(world):
        mine = PretrainBatches(Stream(lengths), row, packing, seed=2)  # a process of its own
        start, stop = share(rows, SimpleNamespace(process_index=rank, num_processes=world))  # type: ignore[arg-type]
        assert stop - start == rows // world
        parts.append(mine.batch(done * rows + start, stop - start))
    joined = [torch.cat(columns) for columns in zip(*map(tensors, parts), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined, tensors(whole), strict=True))


def test_an_empty_stream_is_refused() -> None:
    class Empty:
        total_tokens, pad_id = 0, 0
        document_starts = np.zeros(0, np.int64)

        def tokens(self, start: int, count: int) -> np.ndarray:
            return np.zeros(0, np.int64)

    with pytest.raises(DataError, match="no tokens"):
        PretrainBatches(Empty(), 8)


def test_single_document_is_true_only_without_padding_and_borders() -> None:
    assert pad_batch([([1, 2, 3], [0, 1, 1]), ([4, 5, 6], [0, 0, 1])], pad_id=PAD).single_document
    assert not pad_batch([([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])], pad_id=PAD).single_document


def test_pad_batch_by_hand() -> None:
    batch = pad_batch([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 4], [0, 1])], pad_id=PAD, length=5)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 0], [9, 4, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 0, -1], [0, 0, -1, -1, -1]]
    assert batch.targets_BT.tolist() == [[-100, 7, 8, -100, -100], [4, -100, -100, -100, -100]]
    assert batch.mtp_tokens_BT.tolist() == [[6, 7, 8, 0, 0], [4, 0, 0, 0, 0]]
    assert batch.mtp_targets_BT.tolist() == [[7, 8, -100, -100, -100], [-100] * 5]
    assert (batch.target_count, batch.mtp_target_count, batch.token_count) == (3, 2, 6)
    assert [len(part) for part in batch.split(1)] == [1, 1]


def conversations(lengths: list[int]) -> list[Encoded]:
    return [
        Encoded([1000 * c + 1 + i for i in range(n)], [0] * (n // 2) + [1] * (n - n // 2))
        for c, n in enumerate(lengths)
    ]


def test_sft_rows_hold_every_masked_token_as_a_target_once_an_epoch() -> None:
    encoded = conversations([4, 9, 6, 3, 10, 2, 7])
    batches = SftBatches(encoded, 10, seed=2, pad_id=PAD)
    batch = batches.batch(0, batches.rows_per_epoch)
    wanted = sorted(t for e in encoded for t, m in list(zip(e.tokens, e.loss_mask, strict=True))[1:] if m)
    assert sorted(batch.targets_BT[batch.targets_BT != IGNORE].tolist()) == wanted


def test_sft_batches_are_a_pure_function_of_seed_and_step() -> None:
    encoded = conversations([4, 9, 6, 3, 10, 2, 7] * 3)
    one, two = (SftBatches(encoded, 10, seed=2, pad_id=PAD) for _ in range(2))
    two.batch(9, 3)
    assert all(equal(one.batch(step, 3), two.batch(step, 3)) for step in (0, 4, 1))
    assert not equal(one.batch(0, 3), SftBatches(encoded, 10, seed=3, pad_id=PAD).batch(0, 3))


def test_conversations_that_do_not_fit_are_counted_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    batches = SftBatches(conversations([4, 11, 6, 12]), 10, pad_id=PAD)
    assert batches.dropped == 2
    assert "2 of 4 conversations exceed 10 tokens" in capsys.readouterr().err
    seen = {t // 1000 for t in batches.batch(0, batches.rows_per_epoch).tokens_BT.flatten().tolist() if t}
    assert seen == {0, 2}


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(DataError, match="fits in 3 tokens"):
        SftBatches(conversations([4, 5]), 3, pad_id=PAD)
    with pytest.raises(DataError, match="no"):
        SftBatches([Encoded([1, 2, 3], [1, 0, 0])], 8, pad_id=PAD)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_are_planned_when_they_are_asked_for_and_can_be_given_back(
    packing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run opens all its stages at its start and comes to the last one weeks later."""
    made: list[str] = []
    for kind in (ConcatPlan, BestFitPlan):
        real = kind.__init__

        def init(self: Any, *args: Any, real: Any = real) -> None:
            made.append(type(self).__name__)
            real(self, *args)

        monkeypatch.setattr(kind, "__init__", init)
    batches = PretrainBatches(Stream([7, 19, 3, 11, 28, 5, 13]), 8, packing, seed=0)
    assert (batches.total_tokens, made) == (86, [])
    first = batches.batch(3, 2)
    assert len(made) == 1
    batches.forget()
    assert equal(batches.batch(3, 2), first)
    assert len(made) == 2
