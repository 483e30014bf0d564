"""One optimizer step: what it sums, what it clips, and that nothing non-finite ever reaches the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glmctl.data.batches import Batch, pad_batch
from glmctl.errors import DivergedError
from glmctl.kernels.linear_cross_entropy import linear_cross_entropy
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training.checkpoint import model_tensors
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper


def batch(rows: int, length: int = 12, seed: int = 0, short: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(rows):
        tokens = torch.randint(0, 512, (length - (short if row == 0 else 0),), generator=generator).tolist()
        made.append((tokens, [1] * len(tokens)))
    return pad_batch(made, pad_id=0, length=length)


def stepper(config: ModelConfig, *, grad_clip: float = 1.0, seed: int = 0, muon: bool = True) -> Stepper:
    model = GlmMoe(config, seed=seed)
    optimizer = build_optimizer(model, MuonSpec() if muon else AdamWSpec())
    return Stepper(model, optimizer, make_accelerator(), grad_clip=grad_clip)


def everything(one: Stepper) -> dict[str, Tensor]:
    tensors = {**model_tensors(one.model), **one.optimizer.state_tensors()}
    return {name: value.clone() for name, value in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_losses_are_means_over_all_targets(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    parts = batch(4, short=5).split(3)
    with torch.no_grad():
        whole = batch(4, short=5)
        hidden = one.model(whole.tokens_BT, positions_BT=whole.positions_BT, documents_BT=whole.documents_BT)
        loss, count = linear_cross_entropy(hidden.flatten(0, 1), one.model.head_weight, whole.targets_BT.flatten())
    metrics = one.lm_step(parts, lr=0.01, mtp_weight=0.3, sequence_loss_weight=1e-4)
    assert metrics.targets == int(count)
    assert metrics.loss == pytest.approx(float(loss / count), rel=1e-5)
    assert 5 < metrics.mtp_loss < 8
    assert metrics.balance_loss == pytest.approx(len(one.model.routers()), rel=0.2)
    assert int(metrics.counts_LE.sum()) == whole.token_count * 2 * len(one.model.routers())
    assert not metrics.skipped


def test_without_mtp_weight_the_mtp_layer_is_left_alone(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    before = everything(one)
    metrics = one.lm_step([batch(2)], lr=0.01)
    assert metrics.mtp_loss == 0
    after = everything(one)
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("mtp."))
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_router_bias_moves_once_a_step_by_the_summed_counts(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    metrics = one.lm_step(batch(4).split(1), lr=0.01, mtp_weight=0.1, bias_update_rate=0.25)
    for router, counts_E in zip(one.model.routers(), metrics.counts_LE, strict=True):
        load_E = counts_E.float()
        assert torch.equal(router.e_score_correction_bias, 0.25 * torch.sign(load_E.mean() - load_E))


def test_the_gradient_is_clipped_to_the_global_norm(tiny_config: ModelConfig) -> None:
    """AdamW's first moment after one step is (1 - beta1) times the clipped gradient."""
    one = stepper(tiny_config, grad_clip=0.01, muon=False)
    norm = one.lm_step([batch(2)], lr=0.0, mtp_weight=0.3).grad_norm
    assert norm > 0.05
    state = one.optimizer.state_tensors()
    moments = [value for name, value in state.items() if name.startswith("adamw.exp_avg.")]
    total = torch.cat([m.flatten() for m in moments]).norm() / 0.1
    assert float(total) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("poison", ["loss", "gradient", "infinite gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tiny_config: ModelConfig, poison: str) -> None:
    one = stepper(tiny_config)
    one.lm_step([batch(2)], lr=0.01, mtp_weight=0.3, bias_update_rate=0.1)
    before = everything(one)
    parameter = one.model.layers[1].self_attn.q_proj.weight
    if poison == "loss":
        handle = one.model.norm.register_forward_hook(lambda *_: torch.full_like(_[2], math.nan))
    else:
        value = math.nan if poison == "gradient" else math.inf
        handle = parameter.register_hook(lambda g: torch.full_like(g, value))
    metrics = one.lm_step([batch(2, seed=1)], lr=0.01, mtp_weight=0.3, bias_update_rate=0.1)
    handle.remove()
    assert metrics.skipped
    assert (one.guard.skipped, one.guard.skipped_in_row) == (1, 1)
    assert same(everything(one), before)
    assert all(p.grad is None for p in one.model.parameters())
    assert not one.lm_step([batch(2, seed=2)], lr=0.01, mtp_weight=0.3).skipped
    assert (one.guard.skipped, one.guard.skipped_in_row) == (1, 0)
    assert not same(everything(one), before)


def test_the_third_in_a_row_stops_training(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    before = everything(one)
    one.model.norm.register_forward_hook(lambda *_: torch.full_like(_[2], math.nan))
    for _ in range(2):
        assert one.lm_step([batch(2)], lr=0.01).skipped
    with pytest.raises(DivergedError) as caught:
        one.lm_step([batch(2)], lr=0.01)
    assert caught.value.exit_code == 5
    assert same(everything(one), before)


def test_the_halves_do_what_the_whole_does(tiny_config: ModelConfig) -> None:
    whole, halves = stepper(tiny_config), stepper(tiny_config)
    one = batch(4)
    whole.lm_step([one], lr=0.01)
    for part in one.split(2):
        hidden = halves.model(part.tokens_BT, positions_BT=part.positions_BT)
        loss, _ = linear_cross_entropy(hidden.flatten(0, 1), halves.model.head_weight, part.targets_BT.flatten())
        halves.accumulate(loss / one.target_count)
    norm = halves.update(0.01)
    assert math.isfinite(norm)
    # the momenta are linear in the gradient; AdamW's first step is its sign, in which rounding would show
    for name, value in whole.optimizer.state_tensors().items():
        if "momentum" in name or "exp_avg." in name:
            torch.testing.assert_close(halves.optimizer.state_tensors()[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_an_update_that_is_not_finite_returns_its_norm_and_changes_nothing(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    before = everything(one)
    hidden = one.model(batch(1).tokens_BT)
    one.accumulate(hidden.sum() * math.inf)
    assert not math.isfinite(one.update(0.01))
    assert same(everything(one), before)
    assert (one.guard.skipped, one.guard.skipped_in_row) == (1, 1)


def test_bf16_keeps_fp32_weights_and_comes_near_fp32(tiny_config: ModelConfig) -> None:
    exact = stepper(tiny_config).lm_step([batch(4)], lr=0.01, mtp_weight=0.3)
    model = GlmMoe(tiny_config, seed=0)
    one = Stepper(model, build_optimizer(model, MuonSpec()), make_accelerator("bf16"), grad_clip=1.0)
    metrics = one.lm_step([batch(4)], lr=0.01, mtp_weight=0.3)
    assert metrics.loss == pytest.approx(exact.loss, rel=2e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_idle_rank_counts_for_nothing(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    before = {name: value.clone() for name, value in model_tensors(one.model).items()}
    metrics = one.lm_step([batch(2)], lr=0.0, mtp_weight=0.3, sequence_loss_weight=0.1, bias_update_rate=0.1, idle=True)
    assert (metrics.loss, metrics.mtp_loss, metrics.balance_loss, metrics.grad_norm) == (0, 0, 0, 0)
    assert (metrics.targets, int(metrics.counts_LE.sum())) == (0, 0)
    assert same(model_tensors(one.model), before)
