"""What a pretraining leaves on its way: rows, trackers, validation; and that a stop and a resume take nothing of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from glmctl import console
from glmctl.errors import DivergedError, Interrupted
from glmctl.kernels import registry
from glmctl.recipe.schema import PretrainRecipe
from glmctl.run.directory import Run
from glmctl.training import checkpoint, pretrain
from glmctl.training.session import Session


@pytest.fixture
def recipe(tmp_path: Path, training_harness: ModuleType) -> PretrainRecipe:
    """The harness's two stages: 15 steps, a checkpoint and a validation every fourth."""
    training_harness.prepare(tmp_path)
    found = training_harness.pretrain_recipe(tmp_path)
    assert isinstance(found, PretrainRecipe)
    return found


def train(recipe: PretrainRecipe, path: Path) -> list[dict[str, Any]]:
    with Run.open(recipe, path) as run:
        pretrain.run(recipe, run)
        return run.metrics.rows()


def train_until(
    step: int, recipe: PretrainRecipe, path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None
) -> None:
    """The run ends with `error` (as by a signal) after `step`; what was begun of its checkpoints is on disk."""
    real = Session.end_step

    def end_step(self: Session, number: int, total: int, stop: Any) -> None:
        real(self, number, total, stop)
        if number == step:
            raise error or Interrupted("stopped", exit_code=143)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "end_step", end_step)
        with pytest.raises(type(error) if error else Interrupted):
            train(recipe, path)


# ----------------------------------------------------------------------------- compile


def test_compile_holds_for_its_stage_and_its_checkpoints_say_so(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_compiled", lambda name: registry.variants(name)["reference"])
    compiled = recipe.model_copy(update={"compile": True})
    train_until(5, compiled, tmp_path / "run", monkeypatch)
    assert not registry.compiling_small()
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["state"]["arithmetic"]["compile"] is True


# ----------------------------------------------------------------------------- rows


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_sync, real_submit = os.fsync, checkpoint.BackgroundWriter.submit

    def fsync(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_sync(handle)

    def submit(self: checkpoint.BackgroundWriter, work: Callable[[], object]) -> None:
        order.append("submit")
        real_submit(self, work)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint.BackgroundWriter, "submit", submit)
    train_until(4, recipe, tmp_path / "run", monkeypatch)
    before = order[: order.index("submit")]
    assert {"metrics.jsonl", "samples.jsonl"} <= set(before[-6:])


def test_rows_that_a_machine_forgot_are_said(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(9, recipe, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))
    said: list[str] = []
    monkeypatch.setattr(console, "note", said.append)
    rows = train(recipe, tmp_path / "run")
    assert [row["step"] for row in rows] == [*range(1, 7), *range(9, 16)]
    [line] = [one for one in said if "metrics.jsonl" in one]
    assert "the last row is of step 6, the checkpoint of step 8" in line


# ----------------------------------------------------------------------------- trackers


class Notebook(GeneralTracker):
    """In TensorBoard's place: writes down what it is told."""

    name = "tensorboard"
    requires_logging_directory = True
    lives: list[Notebook]

    def __init__(self, run_name: str, logging_dir: str, **settings: Any) -> None:
        super().__init__()
        self.run_name, self.settings = run_name, settings
        self.config: dict[str, Any] = {}
        self.steps: list[int] = []
        self.finished = False
        self.lives.append(self)

    @property
    def tracker(self) -> Notebook:
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        assert values["loss"] > 0
        self.steps.append(step)

    def finish(self) -> None:
        self.finished = True


class Online(Notebook):
    """In W&B's place."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name: str, **settings: Any) -> None:
        super().__init__(run_name, "", **settings)


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> list[Notebook]:
    Notebook.lives = []
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: list(tracking.LoggerType))
    for kind in (Notebook, Online):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    return Notebook.lives


def test_trackers_know_the_recipe_and_go_on_with_the_run_that_was_stopped(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[Notebook]
) -> None:
    tracked = recipe.model_copy(update={"trackers": ["tensorboard", "wandb"]})
    train_until(6, tracked, tmp_path / "run", monkeypatch)
    assert len(train(tracked, tmp_path / "run")) == 15
    boards = [one for one in lives if one.name == "tensorboard"]
    assert [one.steps for one in boards] == [list(range(1, 7)), list(range(5, 16))]
    # steps 5 and 6 were done again: what the first life wrote of them is hidden
    assert [one.settings for one in boards] == [{"purge_step": 1}, {"purge_step": 5}]
    online = [one.settings for one in lives if one.name == "wandb"]
    assert online[0] == online[1]
    assert (online[0]["name"], online[0]["resume"]) == ("run", "allow")
    assert len(online[0]["id"]) == 16
    assert all(one.finished and one.run_name == "tiny" for one in lives)
    config = lives[0].config
    assert (config["schedule.peak_lr"], json.loads(config["stages"])[1]["name"]) == (0.01, "b")
    assert all(value is None or isinstance(value, bool | int | float | str) for value in config.values())


@pytest.mark.parametrize("error", [DivergedError("three steps in a row"), OSError(28, "No space left on device")])
def test_trackers_are_closed_however_the_run_ends(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[Notebook], error: Exception
) -> None:
    tracked = recipe.model_copy(update={"trackers": ["tensorboard"]})
    train_until(2, tracked, tmp_path / "run", monkeypatch, error)
    assert [one.finished for one in lives] == [True]


def test_trackers_are_closed_when_the_checkpoint_could_not_be_written(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lives: list[Notebook]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(OSError, match="No space left"):
        train(recipe.model_copy(update={"trackers": ["tensorboard"]}), tmp_path / "run")
    assert [one.finished for one in lives] == [True]


# ----------------------------------------------------------------------------- validation


def test_each_domain_is_validated_along_the_run_and_nothing_else_notices(
    recipe: PretrainRecipe, tmp_path: Path
) -> None:
    """Another interval gives the same training, bit for bit."""
    body = recipe.model_dump(mode="json")
    body["validation"]["every_steps"] = 3
    often = train(PretrainRecipe.model_validate(body), tmp_path / "often")
    plain = train(recipe, tmp_path / "plain")
    for rows, every in ((often, 3), (plain, 4)):
        ends = [row["step"] for row in rows if row["tokens"] in (640, 970)]
        due = {*range(every, 16, every), *ends}
        for key in ("validation_loss", "validation_loss_even", "validation_loss_odd"):
            assert {row["step"] for row in rows if key in row} == due
    assert [row["loss"] for row in often] == [row["loss"] for row in plain]
    both = [row for row in often if "validation_loss" in row and "validation_loss" in plain[row["step"] - 1]]
    assert len(both) >= 2
    for row in both:
        assert row["validation_loss_even"] == plain[row["step"] - 1]["validation_loss_even"]
