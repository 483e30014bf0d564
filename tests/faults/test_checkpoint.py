"""Checkpoints under damage and full disks: nothing wrong is ever loaded, and the good one before it is found."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmctl import console
from glmctl.errors import DataError, EnvironmentProblem
from glmctl.model import tensor_file
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training import checkpoint
from glmctl.training.optim import MixedOptimizer, build_optimizer

MUTATIONS = int(os.environ.get("GLMCTL_SOAK_DAMAGES", "50"))


def trained(config: ModelConfig, seed: int = 0) -> tuple[GlmMoe, MixedOptimizer]:
    model = GlmMoe(config, seed=seed)
    optimizer = build_optimizer(model, MuonSpec())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.set_lr(0.01)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias.add_(0.25)
    return model, optimizer


def tensors_of(model: GlmMoe, optimizer: MixedOptimizer) -> dict[str, Tensor]:
    return {**checkpoint.model_tensors(model), **optimizer.state_tensors()}


@pytest.fixture(scope="module")
def small(tiny_config: ModelConfig) -> ModelConfig:
    return tiny_config.model_copy(update={"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64})


@pytest.fixture(scope="module")
def original(small: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 5 and 10, of different weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (5, 10):
        model, optimizer = trained(small, seed=step)
        checkpoint.save(folder, model, optimizer, {"step": step, "note": "ü"}, {"extra": torch.arange(3)})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoints"))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr(console, "warn", heard.append)
    return heard


def test_everything_comes_back_bit_for_bit(small: ModelConfig, folder: Path) -> None:
    model, optimizer = trained(small, seed=10)
    fresh = GlmMoe(small, seed=77)
    other = build_optimizer(fresh, MuonSpec())
    found = checkpoint.load_latest(folder, fresh, other)
    assert found is not None
    state, extra = found
    assert state == {"step": 10, "note": "ü"}
    assert torch.equal(extra["extra"], torch.arange(3))
    assert list(extra) == ["extra"]
    want, have = tensors_of(model, optimizer), tensors_of(fresh, other)
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)
    assert float(fresh.routers()[0].e_score_correction_bias[0]) == 0.25


def test_random_numbers_continue(small: ModelConfig, tmp_path: Path) -> None:
    import numpy as np

    model, optimizer = trained(small)
    checkpoint.save(tmp_path, model, optimizer, {"step": 1})
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    torch.rand(7)
    checkpoint.load_latest(tmp_path, model, optimizer)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_no_checkpoint_is_none(small: ModelConfig, tmp_path: Path) -> None:
    model, optimizer = trained(small)
    assert checkpoint.load_latest(tmp_path / "absent", model, optimizer) is None
    assert checkpoint.load_latest(tmp_path, model, optimizer) is None


def mutate(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del data[rng.randrange(len(data)) :]
    elif how == "extend":
        data += bytes([rng.randrange(256)])
    elif how == "zero":
        at = rng.randrange(len(data))
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    if bytes(data) == path.read_bytes():
        data[-1] ^= 1
    path.write_bytes(data)


def test_every_damage_is_caught_and_the_checkpoint_before_is_taken(
    small: ModelConfig, original: Path, tmp_path: Path, warnings: list[str]
) -> None:
    rng = random.Random(0)
    names = sorted(p.name for p in (original / "step-00000010").iterdir())
    assert len(names) == 5
    model = GlmMoe(small, seed=1)
    for index in range(MUTATIONS):
        folder = Path(shutil.copytree(original, tmp_path / str(index)))
        newest = folder / "step-00000010"
        name = names[index % len(names)]
        how = rng.choice(["flip", "flip", "truncate", "extend", "zero", "delete"])
        if how == "delete":
            (newest / name).unlink()
        else:
            mutate(newest / name, how, rng)
        with pytest.raises(DataError) as caught:
            checkpoint.load(newest, model, build_optimizer(model, MuonSpec()))
        assert str(newest) in caught.value.message, (name, how)
        warnings.clear()
        found = checkpoint.load_latest(folder, model, build_optimizer(model, MuonSpec()))
        assert found is not None
        assert found[0]["step"] == 5, (name, how)
        assert len(warnings) == 1, (name, how)
        assert "step-00000005" in warnings[0]
        shutil.rmtree(folder)


def test_files_of_two_steps_do_not_mix(small: ModelConfig, folder: Path, warnings: list[str]) -> None:
    shutil.copy(folder / "step-00000005" / "optimizer.safetensors", folder / "step-00000010")
    model, optimizer = trained(small)
    found = checkpoint.load_latest(folder, model, optimizer)
    assert found is not None
    assert found[0]["step"] == 5
    assert "optimizer.safetensors" in warnings[0]


def test_when_all_are_damaged_training_does_not_start_over_silently(
    small: ModelConfig, folder: Path, warnings: list[str]
) -> None:
    for path in checkpoint.list_checkpoints(folder).values():
        mutate(path / "model.safetensors", "flip", random.Random(1))
    model, optimizer = trained(small)
    with pytest.raises(DataError, match="no checkpoint is intact") as caught:
        checkpoint.load_latest(folder, model, optimizer)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "change", [{"hidden_size": 32}, {"num_hidden_layers": 3}, {"num_nextn_predict_layers": 0}, {"use_qk_norm": False}]
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(
    small: ModelConfig, folder: Path, change: dict[str, int]
) -> None:
    model = GlmMoe(small.model_copy(update=change), seed=3)
    before = {name: value.clone() for name, value in checkpoint.model_tensors(model).items()}
    with pytest.raises(DataError, match=r"model\.safetensors: tensor '"):
        checkpoint.load_latest(folder, model, build_optimizer(model, MuonSpec()))
    assert all(torch.equal(before[name], value) for name, value in checkpoint.model_tensors(model).items())


def test_a_checkpoint_of_another_optimizer_is_refused(small: ModelConfig, folder: Path) -> None:
    model = GlmMoe(small, seed=3)
    with pytest.raises(DataError, match=r"optimizer\.safetensors"):
        checkpoint.load_latest(folder, model, build_optimizer(model, AdamWSpec()))


def test_only_the_newest_are_kept_and_an_abandoned_future_goes(small: ModelConfig, tmp_path: Path) -> None:
    model, optimizer = trained(small)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, model, optimizer, {"step": step}, keep=2)
    assert sorted(checkpoint.list_checkpoints(tmp_path)) == [2, 3]
    mutate(tmp_path / "step-00000003" / "state.json", "flip", random.Random(0))
    # the run fell back to 2 and saves again before it reaches 3: the damaged one must not count as the newest
    checkpoint.save(tmp_path, model, optimizer, {"step": 2}, keep=1)
    assert list(checkpoint.list_checkpoints(tmp_path)) == [2]
    checkpoint.atomic.verify(tmp_path / "step-00000002")


Write = Callable[..., int]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_failing_disk_leaves_the_earlier_checkpoint_and_no_rubbish(
    small: ModelConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    """Each of the files fails in turn; the fourth is state.json, whose failure is that of its fsync."""
    model, optimizer = trained(small)
    calls = 0

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(code, os.strerror(code), str(args[0]) if isinstance(args[0], Path) else None)
            return real(*args)

        return wrapped

    if call < 4:
        monkeypatch.setattr(checkpoint, "write_tensors", failing(tensor_file.write_tensors))
    else:
        monkeypatch.setattr(os, "fsync", failing(os.fsync))
    with pytest.raises(EnvironmentProblem) as caught:
        checkpoint.save(folder, model, optimizer, {"step": 15})
    monkeypatch.undo()
    assert caught.value.exit_code == 4
    assert "step-00000015" in caught.value.message
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000005", "step-00000010"]
    found = checkpoint.load_latest(folder, model, optimizer)
    assert found is not None
    assert found[0]["step"] == 10


def test_a_checkpoint_holds_no_pickle(folder: Path) -> None:
    for path in sorted((folder / "step-00000010").iterdir()):
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            tensor_file.TensorFile(path)
