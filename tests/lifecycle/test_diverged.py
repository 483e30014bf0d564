"""A run that diverged goes on as its hint says: the same command with a lower rate, and nothing but that changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from glmctl import console
from glmctl.commands._stage import execute
from glmctl.errors import DivergedError, RecipeError
from glmctl.recipe.load import load
from glmctl.training.loss import Losses, LossModule
from glmctl.training.step import StepMetrics, Stepper

TOO_HIGH = 0.006


@pytest.fixture
def recipe(tmp_path: Path, training_harness: ModuleType) -> Path:
    """Fifteen steps whose rate rises beyond TOO_HIGH after the fourth, where a checkpoint is taken."""
    training_harness.prepare(tmp_path)
    body = training_harness.pretrain_recipe(tmp_path).model_dump(mode="json")
    body["schedule"] = {"peak_lr": 0.02, "final_lr": 0.001, "warmup_fraction": 0.5}
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(body))
    console.configure(quiet=True)
    return path


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose loss is no number at rates above TOO_HIGH."""
    rates = [0.0]
    step, forward = Stepper.lm_step, LossModule.forward

    def lm_step(self: Stepper, *args: Any, lr: float, **kwargs: Any) -> StepMetrics:
        rates.append(lr)
        return step(self, *args, lr=lr, **kwargs)

    def losses(self: LossModule, *args: Any, **kwargs: Any) -> Losses:
        found = forward(self, *args, **kwargs)
        return found._replace(main=found.main * float("nan")) if rates[-1] > TOO_HIGH else found

    monkeypatch.setattr(Stepper, "lm_step", lm_step)
    monkeypatch.setattr(LossModule, "forward", losses)


@pytest.mark.usefixtures("fragile")
def test_a_diverged_run_goes_on_with_a_lower_rate(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(DivergedError) as diverged:
        execute(load(str(recipe)), path)
    assert "a lower schedule.peak_lr" in (diverged.value.hint or "")
    checkpoints = sorted(entry.name for entry in (path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000004"]

    with pytest.raises(RecipeError, match=r"another recipe: seed: 0 -> 1$"):
        execute(load(str(recipe), ["schedule.peak_lr=0.005", "seed=1"]), path)
    assert yaml.safe_load((path / "recipe.yaml").read_text())["schedule"]["peak_lr"] == 0.02

    summary = execute(load(str(recipe), ["schedule.peak_lr=0.005"]), path)
    assert summary["steps"] == 15
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert not any(row.get("skipped") for row in rows)
    assert max(row["lr"] for row in rows[4:]) <= 0.005
    changes = [json.loads(line) for line in (path / "changes.jsonl").read_text().splitlines()]
    assert changes == [{"after_step": 4, "key": "schedule.peak_lr", "old": 0.02, "new": 0.005}]
    assert yaml.safe_load((path / "recipe.yaml").read_text())["schedule"]["peak_lr"] == 0.005
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
