"""Loss-free balancing: the sign rule, and that it evens the load out."""

from __future__ import annotations

import pytest
import torch

from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe, RouterStats
from glmctl.training.balance import expert_load, max_vio, update_router_bias


def counts(model: GlmMoe, rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows * len(model.routers()))[: len(model.routers())]


def test_bias_moves_by_the_sign_of_what_is_missing(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    load = [8, 0, 4, 4, 5, 3, 4, 4]  # mean 4
    update_router_bias(model, counts(model, [load]), 0.1)
    for router in model.routers():
        expected = torch.tensor([-0.1, 0.1, 0, 0, -0.1, 0.1, 0, 0])
        assert torch.equal(router.e_score_correction_bias, expected)
        assert router.e_score_correction_bias.dtype == torch.float32


def test_the_centred_variant_keeps_the_sum_of_the_biases(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    for load in ([9, 1, 1, 1, 1, 1, 1, 1], [0, 0, 3, 3, 3, 3, 2, 2]):
        update_router_bias(model, counts(model, [load]), 0.1, center=True)
    for router in model.routers():
        assert float(router.e_score_correction_bias.sum()) == pytest.approx(0, abs=1e-6)
        assert float(router.e_score_correction_bias.abs().max()) > 0


def test_max_vio_and_load() -> None:
    assert max_vio(torch.tensor([[4, 4, 4, 4]])) == 0
    assert max_vio(torch.tensor([[16, 0, 0, 0]])) == 3
    assert max_vio(torch.tensor([[16, 0, 0, 0], [4, 4, 4, 4]])) == 1.5
    assert max_vio(torch.zeros(0, 4, dtype=torch.int64)) == 0
    assert max_vio(torch.zeros(1, 4, dtype=torch.int64)) == 0
    assert expert_load(torch.tensor([[3, 1, 0, 0]])) == [[0.75, 0.25, 0.0, 0.0]]


def test_max_vio_falls_when_the_bias_moves(tiny_config: ModelConfig) -> None:
    """Fixed weights and tokens, an initially lopsided router: only the selection bias acts."""
    model = GlmMoe(tiny_config, seed=3)
    with torch.no_grad():
        for router in model.routers():
            router.weight[:2] *= 20  # two loud experts
    tokens_BT = torch.randint(0, tiny_config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    seen = []
    for _ in range(150):
        stats = RouterStats(sequence_balance=False)
        with torch.no_grad():
            model(tokens_BT, stats=stats)
        seen.append(max_vio(stats.counts_LE))
        update_router_bias(model, stats.counts_LE, 0.005)
    assert seen[0] > 1.0
    assert sum(seen[-10:]) / 10 < 0.5 * seen[0]
