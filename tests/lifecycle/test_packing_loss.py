"""Packing changes where documents lie, never what is learnt: packed rows and padded rows give the same loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmctl.data.batches import Batch, PretrainBatches, SftBatches, pad_batch
from glmctl.data.chat import Encoded
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import MuonSpec
from glmctl.training.loss import LossModule
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper

LENGTHS = [31, 7, 19, 2, 1, 40, 12, 12, 26, 5, 64, 3]


class Stream:
    """Token shards in memory."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.flat = np.concatenate([np.array(document) for document in documents])
        self.document_starts = np.cumsum([0, *map(len, documents)])[:-1]
        self.total_tokens, self.pad_id = len(self.flat), 0

    def tokens(self, start: int, count: int) -> np.ndarray:
        return self.flat[start : start + count]


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
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


def after_training(config: ModelConfig, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """All parameters after a Muon step on each batch, in float64: twenty steps of fp32 amplify rounding (routing)."""
    model = GlmMoe(config, seed=0, dtype=torch.float64)
    stepper = Stepper(model, build_optimizer(model, MuonSpec()), make_accelerator(), grad_clip=1.0)
    for batch in batches:
        stepper.lm_step([batch], lr=2e-3, mtp_weight=0.3, bias_update_rate=1e-3)
    return {name: value.detach() for name, value in model.named_parameters()}


def test_packed_and_padded_rows_train_the_same_parameters(tiny_config: ModelConfig) -> None:
    """Within 1e-6 of every parameter after 20 steps.

    Without the sequence balance loss: it is a mean over rows, so it depends on what shares one.
    """
    packed, padded = [], []
    for step in range(20):
        texts = documents(seed=step)
        batches = PretrainBatches(Stream(texts), 64, "best_fit", seed=step)
        packed.append(batches.batch(0, batches.sequences_per_epoch))
        padded.append(pad_batch([(text, [1] * len(text)) for text in texts], pad_id=0))
    one, two = after_training(tiny_config, packed), after_training(tiny_config, padded)
    for name, value in one.items():
        assert float((two[name] - value).norm()) <= 1e-6 * float(value.norm()) + 1e-12, name
