"""The published training, value by value, as the shipped recipes state it and the plan carries it out (spec 2)."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest

from glmctl.recipe.derive import derived
from glmctl.recipe.load import load
from glmctl.recipe.schema import MuonSpec, PretrainRecipe
from glmctl.training.plan import PlannedStep, plan_steps

T, B, M = 10**12, 10**9, 10**6


def recipe(name: str) -> PretrainRecipe:
    found = load(name, expect="pretrain")
    assert isinstance(found, PretrainRecipe)
    return found


@cache
def plan(name: str) -> list[PlannedStep]:
    return plan_steps(recipe(name))


@pytest.mark.parametrize("name", ["glm-4.5/pretrain", "glm-4.5-air/pretrain"])
def test_the_recipe_states_the_reports_values(name: str) -> None:
    r = recipe(name)
    assert [(s.tokens, s.sequence_length, s.packing) for s in r.stages] == [
        (15 * T, 4096, "concat"),
        (7 * T, 4096, "concat"),
        (500 * B, 32768, "best_fit"),
        (500 * B, 32768, "best_fit"),
        (100 * B, 131072, "best_fit"),
    ]
    assert [stage["rope_theta"] for stage in derived(r)["stages"].values()] == [1e4, 1e4, 1e6, 1e6, 1e6]
    assert (r.batch.start_tokens, r.batch.tokens, r.batch.ramp_tokens) == (16 * M, 64 * M, 500 * B)
    assert (r.schedule.peak_lr, r.schedule.final_lr) == (2.5e-4, 2.5e-5)
    assert isinstance(r.optimizer, MuonSpec)
    muon = r.optimizer
    assert (muon.momentum, muon.ns_steps, muon.update_rms, muon.weight_decay) == (0.95, 5, 0.2, 0.1)
    assert (muon.betas, muon.eps) == ((0.9, 0.95), 1e-8)
    balance = r.balance
    assert (balance.bias_update_rate, balance.until_tokens, balance.sequence_loss_weight) == (1e-3, 15 * T, 1e-4)
    assert (r.mtp.weight, r.mtp.then_weight, r.mtp.switch_tokens) == (0.3, 0.1, 15 * T)


def test_the_plan_switches_where_the_report_does() -> None:
    """23.1T tokens; batch 16M to 64M over the first 500B; bias rate and MTP weight at 15T; one cosine to the end."""
    steps = plan("glm-4.5/pretrain")
    assert steps[-1].tokens == 23_100 * B
    # whole sequences: a batch is less than one sequence below its tokens
    assert 0 <= 16 * M - steps[0].sequences * 4096 < 4096
    ramped = next(s for s, after in pairwise(steps) if s.tokens >= 500 * B)
    assert all(a.sequences <= b.sequences for a, b in pairwise(steps[: ramped.number]))
    assert steps[ramped.number].sequences == 64 * M // 4096
    half = next(s for s in steps if s.tokens >= 250 * B)
    assert half.sequences * 4096 == pytest.approx(40 * M, rel=2e-3)
    ends = [s for s in steps if s.ends_stage]
    assert [s.tokens for s in ends] == [15 * T, 22 * T, 22 * T + 500 * B, 23 * T, 23_100 * B]
    before, after = ends[0], steps[ends[0].number]
    assert (before.mtp_weight, before.bias_update_rate) == (0.3, 1e-3)
    assert (after.mtp_weight, after.bias_update_rate) == (0.1, 0.0)
    assert max(s.lr for s in steps) == pytest.approx(2.5e-4, rel=1e-6)
    assert steps[-1].lr == pytest.approx(2.5e-5)
    warm = recipe("glm-4.5/pretrain").schedule.warmup_fraction
    middle = next(s for s in steps if s.tokens >= 23_100 * B * (warm + (1 - warm) / 2))
    assert middle.lr == pytest.approx((2.5e-4 + 2.5e-5) / 2, rel=1e-4), "no plateau and no jump between stages"
    assert [s.sequences for s in (steps[ends[1].number], steps[ends[3].number])] == [64 * M // 32768, 64 * M // 131072]


def check_scaled(small: PretrainRecipe, full: PretrainRecipe, tokens: int, batches: float) -> None:
    """Everything but stages and model, token counts divided by `tokens` and batches by `batches`."""
    scale = tokens
    assert small.model.rope_theta == full.model.rope_theta
    assert small.batch.start_tokens is not None
    assert small.batch.start_tokens * batches == full.batch.start_tokens
    assert small.batch.tokens * batches == full.batch.tokens
    assert small.batch.ramp_tokens * scale == full.batch.ramp_tokens
    for theirs, ours in (
        (full.balance.until_tokens, small.balance.until_tokens),
        (full.mtp.switch_tokens, small.mtp.switch_tokens),
    ):
        assert ours is not None
        assert ours * scale == theirs
    assert small.balance.sequence_loss_weight == full.balance.sequence_loss_weight
    assert (small.mtp.weight, small.mtp.then_weight) == (full.mtp.weight, full.mtp.then_weight)
    assert small.optimizer == full.optimizer
    assert small.schedule.final_lr / small.schedule.peak_lr == pytest.approx(0.1)


def test_laptop_is_the_report_by_its_stated_rule() -> None:
    small, full = recipe("laptop/pretrain"), recipe("glm-4.5/pretrain")
    scale, length = 5_000_000, 16
    for a, b in zip(small.stages, full.stages, strict=True):
        assert (a.name, a.tokens * scale, a.sequence_length * length) == (b.name, b.tokens, b.sequence_length)
        assert (a.packing, a.rope_theta) == (b.packing, b.rope_theta)
    check_scaled(small, full, scale, 7812.5)
    active = derived(small)["parameters_active"] + small.model.vocab_size * small.model.hidden_size
    assert 1.5e6 < active < 2.5e6


def test_smoke_is_the_report_by_its_stated_rule() -> None:
    small, full = recipe("smoke/pretrain"), recipe("glm-4.5/pretrain")
    scale, length = 1_000_000_000, 32
    joined = {"pretrain": full.stages[:2], "midtrain": full.stages[2:]}
    assert [stage.name for stage in small.stages] == list(joined)
    for ours, theirs in zip(small.stages, joined.values(), strict=True):
        assert ours.tokens * scale == sum(stage.tokens for stage in theirs)
        assert ours.sequence_length * length == theirs[0].sequence_length
        assert (ours.packing, ours.rope_theta) == (theirs[0].packing, theirs[0].rope_theta)
    check_scaled(small, full, scale, 31_250)
    assert small.balance.bias_update_rate == full.balance.bias_update_rate
    assert len(plan("smoke/pretrain")) == 13


def test_parameter_groups_are_those_of_the_optimizer() -> None:
    """The dry run's counts, by arithmetic, against the optimizer over the network itself."""
    from glmctl.model.config import ModelConfig
    from glmctl.model.network import GlmMoe
    from glmctl.recipe.derive import parameter_groups
    from glmctl.recipe.schema import AdamWSpec
    from glmctl.training.optim import build_optimizer

    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    model = GlmMoe(config, device="meta")
    for spec in (MuonSpec(), MuonSpec(head="muon"), AdamWSpec()):
        optimizer, groups = build_optimizer(model, spec), parameter_groups(config, spec)
        assert sum(group["elements"] for group in groups.values()) == sum(p.numel() for p in model.parameters())
        if optimizer.muon is not None:
            assert groups["muon"]["elements"] == sum(p.numel() for p in optimizer.muon.named.values())
        else:
            decayed = (p.numel() for name, p in optimizer.adamw.named.items() if name in optimizer.adamw.decayed)
            assert groups["adamw"]["elements"] == sum(decayed)
