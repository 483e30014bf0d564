"""Packing changes where documents lie, never what is learnt: packed rows and padded rows give the same loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmctl.data.batches import PretrainBatches, SftBatches, pad_batch
from glmctl.data.chat import Encoded
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.training.loss import LossModule

LENGTHS = [31, 7, 19, 2, 1, 40, 12, 12, 26, 5, 64, 3]


class Stream:
    """Token shards in memory."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.flat = np.concatenate([np.array(document) for document in documents])
        self.document_starts = np.cumsum([0, *map(len, documents)])[:-1]
        self.total_tokens, self.pad_id = len(self.flat), 0

    def tokens(self, start: int, count: int) -> np.ndarray:
        return self.flat[start : start + count]


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 512, (length,), generator=generator).tolist() for length in LENGTHS]


def losses(model: GlmMoe, batch: object) -> tuple[float, float, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = LossModule(model)(batch, mtp=True, balance=False)
    (found.main + 0.3 * found.mtp).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found.main.item(), found.mtp.item(), grads


@pytest.mark.parametrize("masked", [False, True], ids=["pretrain best-fit", "sft"])
def test_packed_rows_learn_what_padded_rows_learn(tiny_config: ModelConfig, masked: bool) -> None:
    texts = documents()
    masks = [[int(not masked or at % 3 > 0) for at in range(len(text))] for text in texts]
    if masked:
        packer = SftBatches([Encoded(t, m) for t, m in zip(texts, masks, strict=True)], 64, pad_id=0)
        packed = packer.batch(0, packer.rows_per_epoch)
    else:
        batches = PretrainBatches(Stream(texts), 64, "best_fit", seed=3)
        packed = batches.batch(0, batches.sequences_per_epoch)
    padded = pad_batch(list(zip(texts, masks, strict=True)), pad_id=0)
    assert len(packed) < len(padded)
    assert packed.target_count == padded.target_count
    assert packed.mtp_target_count == padded.mtp_target_count
    model = GlmMoe(tiny_config, seed=0).double()
    one, two = losses(model, packed), losses(model, padded)
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    assert one[1] == pytest.approx(two[1], rel=1e-6)
    for name, grad in one[2].items():
        # relative to the parameter's largest gradient: elements near zero are sums that cancel
        torch.testing.assert_close(grad, two[2][name], rtol=0, atol=1e-6 * float(two[2][name].abs().max()), msg=name)
