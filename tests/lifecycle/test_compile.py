"""`compile: true`: the small operations by torch.compile give the gradients that they give without it."""

from __future__ import annotations

import random

import pytest
import torch

from glmctl.data.batches import pad_batch
from glmctl.kernels import registry
from glmctl.kernels.fused.library import in_torch
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.training.loss import LossModule, main_loss

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_losses_and_gradients_are_those_without(tiny_config: ModelConfig, dtype: torch.dtype, recompute: bool) -> None:
    """Packed rows of several lengths, so that shapes change from batch to batch; autocast as Accelerate does it."""

    def run() -> list[torch.Tensor]:
        rng = random.Random(0)
        model = GlmMoe(tiny_config, seed=0)
        model.recompute = recompute
        found = []
        for lengths in ((30, 17, 24), (5,), (40, 40)):
            rows = [([rng.randrange(512) for _ in range(n)], [1] * n) for n in lengths]
            batch = pad_batch(rows, pad_id=0)
            # the backward too: a recomputed layer must take the passes that the forward took
            with in_torch():
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    losses = LossModule(model)(batch, True, True)
                (losses.main + 0.3 * losses.mtp + losses.balance).backward()
            found += [losses.main.detach(), losses.mtp.detach(), torch.tensor(main_loss(model, batch)[0])]
        # rounded to bf16 a tie may send a token to another expert, whose gradients are then others
        grads = [p.grad for p in model.parameters() if p.grad is not None] if dtype == torch.float32 else []
        return [*found, *grads]

    plain = run()
    with registry.compiled_small(True, torch.device("cpu")):
        compiled = run()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert len(plain) == len(compiled)
    for a, b in zip(plain, compiled, strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(a.abs().max()) + 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
