"""What a run is trained on is what it was begun on: damaged shards and changed inputs are refused, not learnt from."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glmctl import console
from glmctl.errors import DataError, Interrupted
from glmctl.recipe.schema import PretrainRecipe
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.training import pretrain
from glmctl.training.session import Session


@pytest.fixture
def recipe(tmp_path: Path, training_harness: ModuleType) -> PretrainRecipe:
    """The harness's recipe on published shards, which have a manifest."""
    training_harness.prepare(tmp_path)
    with atomic.publish(tmp_path / "made" / "export") as folder:
        for split in ("train", "validation"):
            (tmp_path / "data" / split).rename(folder / split)
    body = training_harness.pretrain_recipe(tmp_path).model_dump(mode="json")
    body["stages"][0]["data"] = body["stages"][1]["data"] = str(tmp_path / "made")
    recipe: PretrainRecipe = PretrainRecipe.model_validate(body)
    return recipe


def train(recipe: PretrainRecipe, path: Path) -> list[dict[str, Any]]:
    with Run.open(recipe, path) as run:
        pretrain.run(recipe, run)
        return run.metrics.rows()


def train_until(step: int, recipe: PretrainRecipe, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends as by a signal once `step` is saved."""
    real = Session.end_step

    def end_step(self: Session, number: int, total: int, stop: Any) -> None:
        real(self, number, total, stop)
        if number == step:
            self._writer.wait()
            raise Interrupted("stopped", exit_code=143)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "end_step", end_step)
        with pytest.raises(Interrupted):
            train(recipe, path)


def flip(path: Path) -> None:
    """One bit of the first token; the id stays in the vocabulary."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_the_shards_is_found_before_the_first_step(recipe: PretrainRecipe, tmp_path: Path) -> None:
    flip(tmp_path / "made" / "export" / "train" / "tokens-00000.bin")
    with pytest.raises(DataError, match=r"tokens-00000\.bin: damaged"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    unread = recipe.model_copy(update={"verify_data": False})
    assert len(train(unread, tmp_path / "trusting")) == 15


def test_a_resumed_run_refuses_other_data(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(8, recipe, tmp_path / "run", monkeypatch)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    export = tmp_path / "made" / "export"
    sound = {name: (export / name).read_bytes() for name in ("train/tokens-00000.bin", atomic.MANIFEST)}
    # prepared anew: other bytes, and a manifest that agrees with them
    flip(export / "train" / "tokens-00000.bin")
    atomic._seal(export, {})
    with pytest.raises(DataError, match="made is not what it was when this run began") as found:
        train(recipe, tmp_path / "run")
    assert found.value.hint == "put it back, or start again with --fresh"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    for name, content in sound.items():
        (export / name).write_bytes(content)
    assert len(train(recipe, tmp_path / "run")) == 15


def test_a_resumed_run_says_that_its_arithmetic_is_another(
    recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    train_until(8, recipe, tmp_path / "run", monkeypatch)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    train(recipe, tmp_path / "run")
    [line] = [one for one in said if one.startswith("threads")]
    assert line.startswith(f"threads: {threads} before, {threads + 1} now")


def test_the_base_of_rope_is_that_of_the_stage(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """Another base in the second stage changes the second stage's losses and nothing before."""
    other = recipe.model_dump(mode="json")
    other["stages"][1]["rope_theta"] = 100.0
    curves = [train(PretrainRecipe.model_validate(body), tmp_path / name) for name, body in
              (("a", recipe.model_dump(mode="json")), ("b", other))]  # fmt: skip
    for one, two in zip(*curves, strict=True):
        assert (one["loss"] == two["loss"]) == (one["stage"] == "a"), one["step"]
    bases = [json.loads((tmp_path / name / "export" / "config.json").read_text()) for name in ("a", "b")]
    assert ["100.0" in json.dumps(base) for base in bases] == [False, True]


def test_padding_is_counted_apart(recipe: PretrainRecipe, tmp_path: Path) -> None:
    """The second stage packs whole documents: its rows have empty places, which are no tokens a second."""
    rows = train(recipe, tmp_path / "run")
    whole = [row for row in rows if row["stage"] == "a"]
    packed = [row for row in rows if row["stage"] == "b"]
    assert all(row["filled_tokens"] == row["batch_tokens"] for row in whole)
    assert all(0 < row["filled_tokens"] <= row["batch_tokens"] for row in packed)
    assert any(row["filled_tokens"] < row["batch_tokens"] for row in packed)
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["filled_tokens"] / row["seconds"])
