"""Muon and AdamW against torch's own, and against the formulas written out one matrix at a time.

Moonlight (arXiv 2502.16982): M <- mu M + G; O = NS5(mu M + G); W <- W - lr (0.2 sqrt(max(A, B)) O + wd W).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training.optim import build_optimizer


class Matrices(nn.Module):
    """Wide, tall, square, odd and tiny matrices."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(16, 48), (48, 16), (32, 32), (7, 5), (2, 64)]
        for index, shape in enumerate(shapes):
            self.register_parameter(f"w{index}", nn.Parameter(torch.randn(shape, generator=generator) * 0.02))


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equal_to_torch_muon_within_its_bf16() -> None:
    """torch runs Newton-Schulz in bf16 (8 bits of mantissa); the direction agrees to about a per cent."""
    ours, theirs = Matrices(), Matrices()
    mine = build_optimizer(ours, MuonSpec())
    reference = torch.optim.Muon(
        theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    mine.set_lr(0.02)
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(5):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        reference.step()
    for first, a, b in zip(start, ours.parameters(), theirs.parameters(), strict=True):
        moved = float((b.detach() - first).norm())
        assert float((a - b).detach().norm()) < 0.03 * moved, tuple(a.shape)


def reference_update(weight: Tensor, momentum: Tensor, gradient: Tensor, lr: float) -> None:
    """One step on one logical matrix, in place, straight from the paper."""
    momentum.mul_(0.95).add_(gradient)
    x = gradient + 0.95 * momentum
    x = x / (x.norm() + 1e-7)
    rows, columns = x.shape
    if rows > columns:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if rows > columns:
        x = x.T
    weight.sub_(lr * (0.2 * math.sqrt(max(rows, columns)) * x + 0.1 * weight))


def logical(name: str, tensor: Tensor) -> list[Tensor]:
    """Views of the logical matrices: each expert apart, and of gate_up its two halves apart."""
    if tensor.dim() == 2:
        return [tensor]
    if name.endswith("gate_up_proj"):
        half = tensor.shape[1] // 2
        return [part for expert in tensor for part in (expert[:half], expert[half:])]
    return list(tensor)


def test_equal_to_the_formula_per_logical_matrix_of_the_model(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    assert optimizer.muon is not None
    optimizer.set_lr(0.02)
    expected = {n: p.detach().clone() for n, p in optimizer.muon.named.items()}
    momenta = {n: torch.zeros_like(p) for n, p in expected.items()}
    for step in range(3):
        gradients(model, step)
        for name, parameter in optimizer.muon.named.items():
            assert parameter.grad is not None
            for w, m, g in zip(
                *(logical(name, t) for t in (expected[name], momenta[name], parameter.grad)), strict=True
            ):
                reference_update(w, m, g, 0.02)
        optimizer.step()
    for name, parameter in optimizer.muon.named.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_update_rms_is_the_one_asked_for() -> None:
    """RMS of O is about 1 / sqrt(max(A, B)); five steps leave the singular values in 0.7 ... 1.2."""
    for rms in (0.2, 0.4):
        model = Matrices()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(model, MuonSpec(update_rms=rms, weight_decay=0.0))
        optimizer.set_lr(1.0)
        gradients(model, 0)
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            if old.shape in ((7, 5), (2, 64)):
                continue  # too small for the statement: a matrix of rank r has RMS sqrt(r / (A B))
            update = (new.detach() - old).square().mean().sqrt()
            expected = rms * math.sqrt(max(old.shape) * min(old.shape) / old.numel())
            assert float(update) == pytest.approx(expected, rel=0.25)


def test_decay_is_decoupled() -> None:
    """With a zero gradient the direction is zero and only W <- W (1 - lr wd) remains."""
    model = Matrices()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, MuonSpec(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_lr(0.1)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_adamw_is_torch_adamw_with_decay_on_matrices_only(tiny_config: ModelConfig, decay: float) -> None:
    ours, theirs = GlmMoe(tiny_config, seed=0), GlmMoe(tiny_config, seed=0)
    mine = build_optimizer(ours, AdamWSpec(weight_decay=decay, betas=(0.9, 0.95), eps=1e-8))
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, foreach=False)
    mine.set_lr(0.01)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # the fused kernel orders the same fp32 operations differently: some units in the last place
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8, msg=name)


def test_beside_muon_adamw_decays_vectors_too_at_the_same_rate(tiny_config: ModelConfig) -> None:
    ours, theirs = GlmMoe(tiny_config, seed=0), GlmMoe(tiny_config, seed=0)
    mine = build_optimizer(ours, MuonSpec())
    assert mine.muon is not None
    rest = [(n, p) for n, p in theirs.named_parameters() if n not in mine.muon.named]
    reference = torch.optim.AdamW([p for _, p in rest], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine.set_lr(0.01)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        reference.step()
    own = dict(ours.named_parameters())
    for name, parameter in rest:
        torch.testing.assert_close(own[name], parameter, rtol=2e-6, atol=1e-8, msg=name)
