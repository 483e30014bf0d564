"""Ablations: each variant at its own best setting, every seed once, nothing done twice, and a table with its spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmctl import console
from glmctl.commands._stage import execute
from glmctl.errors import DivergedError, RecipeError
from glmctl.recipe.load import load
from glmctl.recipe.schema import AblationRecipe, PretrainRecipe
from glmctl.run.directory import Run
from glmctl.training import ablation, pretrain

RATES = [{"schedule.peak_lr": rate, "schedule.final_lr": rate / 10} for rate in (0.01, 0.02, 0.04)]


def recipe(**changes: Any) -> AblationRecipe:
    body = {
        "name": "ab",
        "recipe": "laptop/pretrain",
        "variants": [
            {"name": "muon", "search": RATES},
            {"name": "adamw", "set": {"optimizer": {"type": "adamw"}}, "search": RATES[:2]},
        ],
    }
    return AblationRecipe.model_validate({**body, **changes})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PretrainRecipe]:
    """What was trained, in order; the loss is smallest at rate 0.02 for Muon and at 0.01 for AdamW."""
    done: list[PretrainRecipe] = []

    def run(one: PretrainRecipe, run: Run) -> dict[str, Any]:
        done.append(one)
        best, base = (0.02, 3.0) if one.optimizer.type == "muon" else (0.01, 4.0)
        if one.schedule.peak_lr > 2 * best:
            raise DivergedError("three steps in a row")
        loss = base + 10 * abs(one.schedule.peak_lr - best) + 0.1 * one.seed
        run.metrics.append({"step": 1, "tokens": 100, "validation_loss": loss + 1})
        run.metrics.append({"step": 2, "tokens": 200, "validation_loss": loss})
        return {"validation_loss": loss, "tokens": one.total_tokens}

    monkeypatch.setattr(pretrain, "run", run)
    monkeypatch.setattr(console, "note", lambda _: None)
    monkeypatch.setattr(console, "warn", lambda _: None)
    return done


def test_each_variant_searches_on_the_first_seed_and_runs_its_best_on_all(
    trained: list[PretrainRecipe], tmp_path: Path
) -> None:
    summary = execute(recipe(), tmp_path / "ab")
    seen = [(one.optimizer.type, one.schedule.peak_lr, one.seed) for one in trained]
    assert seen == [
        *[("muon", rate, 0) for rate in (0.01, 0.02, 0.04)],
        *[("muon", 0.02, seed) for seed in (1, 2)],
        *[("adamw", rate, 0) for rate in (0.01, 0.02)],
        *[("adamw", 0.01, seed) for seed in (1, 2)],
    ]
    assert summary["muon_validation_loss"] == pytest.approx(3.1)
    assert summary["adamw_minus_muon"] == pytest.approx(1.0)
    assert summary["trials"] == recipe().trials == len(trained)
    found = json.loads((tmp_path / "ab/export/ablation.json").read_text())
    assert [one["trial"] for one in found[0]["chosen"]] == ["muon-1-seed0", "muon-1-seed1", "muon-1-seed2"]
    table = (tmp_path / "ab/export/ablation.md").read_text()
    assert "| muon | peak_lr 0.02, final_lr 0.002 |" in table
    assert "3.100 (3.000 to 3.200)" in table
    assert "+1.000 (+1.000 to +1.000)" in table
    page = (tmp_path / "ab/export/ablation.html").read_text()
    assert page.count('class="line c') == 2


def test_what_is_finished_is_not_done_again(trained: list[PretrainRecipe], tmp_path: Path) -> None:
    first = execute(recipe(), tmp_path / "ab")
    count = len(trained)
    (tmp_path / "ab/status.json").unlink()
    (tmp_path / "ab/trials/adamw-0-seed2/status.json").unlink()
    assert execute(recipe(), tmp_path / "ab") == first
    assert len(trained) == count + 1


def test_a_setting_that_diverges_loses_and_a_variant_that_only_diverges_is_said(
    trained: list[PretrainRecipe], tmp_path: Path
) -> None:
    wide = {"name": "muon", "search": [*RATES, {"schedule.peak_lr": 0.9}]}
    other = {"name": "again", "search": RATES}
    execute(recipe(variants=[wide, other]), tmp_path / "ab")
    assert "| muon | peak_lr 0.9 | diverged |" in (tmp_path / "ab/export/ablation.md").read_text()
    with pytest.raises(DivergedError, match=r"variant 'muon' diverged \(peak_lr 0.9\)"):
        execute(recipe(variants=[{**wide, "search": wide["search"][3:]}, other]), tmp_path / "other")


def test_mistakes_are_found_before_anything_is_trained(trained: list[PretrainRecipe], tmp_path: Path) -> None:
    def message(*variants: dict[str, Any], **changes: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            execute(recipe(variants=list(variants), **changes), tmp_path / "ab", fresh=True)
        return caught.value.message

    plain = {"name": "plain"}
    assert "peak_lrr" in message(plain, {"name": "b", "set": {"schedule.peak_lrr": 1.0}})
    assert "equally many tokens" in message(plain, {"name": "b", "set": {"stages.0.tokens": 5}})
    assert trained == []
    with pytest.raises(ValueError, match="two variants are called 'plain'"):
        recipe(variants=[plain, plain])
    assert "did you mean 'validation_loss'" in message(plain, {"name": "b"}, figure="validation_los")


def test_the_shipped_comparison_is_of_equal_active_parameters() -> None:
    """Dense against MoE: what one token passes differs by the routers alone."""
    shipped = load("ablations/moe-muon/ablation", expect="ablation")
    assert isinstance(shipped, AblationRecipe)
    plans = {variant.name: ablation._plan(shipped, variant) for variant in shipped.variants}
    models = {name: next(iter(plan.recipes.values())).model for name, plan in plans.items()}
    moe, dense = models["moe-muon"], models["dense-muon"]
    routers = moe.num_moe_layers * moe.n_routed_experts * moe.hidden_size
    assert moe.parameter_counts().active - dense.parameter_counts().active == routers
    assert dense.num_moe_layers == 0
    assert moe.parameter_counts().total > 1.2 * dense.parameter_counts().total
    assert models["moe-adamw"] == moe
