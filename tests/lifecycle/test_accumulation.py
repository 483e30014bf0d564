"""How a batch is cut into micro-batches changes nothing: losses, gradients, loads, biases."""

from __future__ import annotations

import pytest
import torch

from glmctl.data.batches import Batch, pad_batch
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import MuonSpec
from glmctl.training.optim import build_optimizer
from glmctl.training.step import StepMetrics, Stepper

ROWS = 8


def batch(seed: int) -> Batch:
    """Rows of very unequal numbers of targets: a mean of micro-batch means would be off by a lot."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(ROWS):
        tokens = torch.randint(0, 512, (4 + 3 * row,), generator=generator).tolist()
        mask = [int(i % (row + 1) == 0) for i in range(len(tokens))]
        rows.append((tokens, mask))
    return pad_batch(rows, pad_id=0)


def train(config: ModelConfig, micro_rows: int) -> tuple[list[StepMetrics], Stepper]:
    model = GlmMoe(config, seed=0)
    stepper = Stepper(model, build_optimizer(model, MuonSpec()), make_accelerator(), grad_clip=1.0)
    metrics = [
        stepper.lm_step(
            batch(step).split(micro_rows),
            lr=1e-3,
            mtp_weight=0.3,
            sequence_loss_weight=1e-2,
            bias_update_rate=1e-2,
        )
        for step in range(3)
    ]
    return metrics, stepper


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_one_batch_or_many_micro_batches_train_alike(tiny_config: ModelConfig, micro_rows: int) -> None:
    whole, one = train(tiny_config, ROWS)
    cut, other = train(tiny_config, micro_rows)
    first = (whole[0], cut[0])
    # before any update only the order of fp32 sums differs
    assert first[1].loss == pytest.approx(first[0].loss, rel=1e-6)
    assert first[1].mtp_loss == pytest.approx(first[0].mtp_loss, rel=1e-6)
    assert first[1].balance_loss == pytest.approx(first[0].balance_loss, rel=1e-6)
    assert first[1].grad_norm == pytest.approx(first[0].grad_norm, rel=1e-5)
    for a, b in zip(whole, cut, strict=True):
        assert a.targets == b.targets
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
    assert torch.equal(whole[0].counts_LE, cut[0].counts_LE)
    for router, again in zip(one.model.routers(), other.model.routers(), strict=True):
        torch.testing.assert_close(again.e_score_correction_bias, router.e_score_correction_bias, rtol=0, atol=1e-6)
