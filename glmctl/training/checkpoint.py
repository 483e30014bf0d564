"""Checkpoints to resume from: complete by construction, checked by hash before use, no pickle.

step-00000040/  model.safetensors      parameters and router biases, by the names they have in memory
                optimizer.safetensors  MixedOptimizer.state_tensors()
                tensors.safetensors    random-number states and what the driver adds
                state.json             the driver's counters
                manifest.json          size and SHA-256 of each file
"""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from glmctl import console
from glmctl.errors import DataError
from glmctl.model.tensor_file import write_tensors
from glmctl.run import atomic
from glmctl.training.optim import MixedOptimizer

_NAME = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Snapshot:
    """Everything of one moment, to be written while training goes on."""

    step: int
    files: dict[str, dict[str, Tensor]]
    """file name -> tensors"""
    body: str
    """state.json"""


def snapshot(
    model: nn.Module,
    optimizer: MixedOptimizer,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    copy: bool = True,
) -> Snapshot:
    """Model, optimizer, `state` (with its "step"), `tensors`, and the random-number states of torch, numpy and Python.

    With `copy`, in host memory of its own, so that later steps do not change it.
    """
    rng_tensors, rng_state = _rng()
    files = {
        "model.safetensors": model_tensors(model),
        "optimizer.safetensors": optimizer.state_tensors(),
        "tensors.safetensors": {**rng_tensors, **(tensors or {})},
    }
    if copy:
        files = {
            file: {name: t.detach().to("cpu", copy=True) for name, t in held.items()} for file, held in files.items()
        }
    body = json.dumps({"version": 1, "state": dict(state), "rng": rng_state}, allow_nan=False)
    return Snapshot(int(state["step"]), files, body)


def write(folder: Path, taken: Snapshot, *, keep: int = 2, keep_every: int | None = None) -> Path:
    """Publish `folder/step-<step>`; then remove those of later steps (left by a run that fell back to an earlier one),
    and `prune`.

    Raises EnvironmentProblem when the disk does not take it; what was there before stays valid.
    """
    target = folder / f"step-{taken.step:08d}"
    size = sum(tensor.nbytes for held in taken.files.values() for tensor in held.values())
    with atomic.publish(target, needed=size) as temporary:
        for file, tensors in taken.files.items():
            write_tensors(temporary / file, tensors.items())
        (temporary / "state.json").write_text(taken.body, encoding="utf-8")
    with atomic.machine_errors(folder):
        found = list_checkpoints(folder)
    _remove(path for number, path in found.items() if number > taken.step)
    prune(folder, taken.step, keep=keep, keep_every=keep_every)
    return target


def prune(folder: Path, step: int, *, keep: int = 2, keep_every: int | None = None) -> None:
    """Of the checkpoints up to `step`, remove all but the newest `keep` and those of every `keep_every`-th step."""
    with atomic.machine_errors(folder):
        found = {number: path for number, path in list_checkpoints(folder).items() if number <= step}
    kept = set(sorted(found)[-keep:])
    kept |= {number for number in found if keep_every is not None and number % keep_every == 0}
    _remove(path for number, path in found.items() if number not in kept)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with atomic.machine_errors(path):
            shutil.rmtree(path)


def save(
    folder: Path,
    model: nn.Module,
    optimizer: MixedOptimizer,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """`snapshot` and `write` at once."""
    return write(folder, snapshot(model, optimizer, state, tensors, copy=False), keep=keep)


class BackgroundWriter:
    """Writes snapshots in a thread, one at a time: a step waits only for the copy, or for a write that still runs.

    A write that failed is raised by the next `submit`, `check` or `wait`, in the thread that trains.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, work: Callable[[], object]) -> None:
        """Run `work` in the background, after what was submitted before has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what a write that has ended died of."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise what the write died of."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that trains, whatever it is
            self._error = error


def load_latest(
    folder: Path, model: nn.Module, optimizer: MixedOptimizer
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Load the newest undamaged checkpoint into `model` and `optimizer`; returns its state and extra tensors.

    None when there is no checkpoint. A damaged one is named in a warning and the one before it is taken; when
    all are damaged that is a DataError, never a silent start from nothing.
    """
    found = sorted(list_checkpoints(folder).items(), reverse=True)
    for index, (_, path) in enumerate(found):
        try:
            atomic.verify(path)
        except DataError as error:
            if index == len(found) - 1:
                raise DataError(f"no checkpoint is intact: {error.message}", hint="--fresh starts again") from error
            console.warn(f"{error.message}; falling back to {found[index + 1][1].name}")
            continue
        return load(path, model, optimizer, verified=True)
    return None


def load(
    path: Path, model: nn.Module, optimizer: MixedOptimizer, *, verified: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load one checkpoint, after checking it (unless just done). DataError names what is damaged or does not fit."""
    if not verified:
        atomic.verify(path)
    try:
        body = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state, rng_state = dict(body["state"]), body["rng"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / 'state.json'}: not a checkpoint's state: {error!r}") from error
    load_model_tensors(model, _load_file(path / "model.safetensors"), where=path / "model.safetensors")
    try:
        optimizer.load_state_tensors(_load_file(path / "optimizer.safetensors"))
    except DataError as error:
        raise DataError(f"{path / 'optimizer.safetensors'}: {error.message}") from error
    tensors = _load_file(path / "tensors.safetensors")
    _restore_rng(tensors, rng_state, path)
    return state, {name: value for name, value in tensors.items() if not name.startswith("rng.")}


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Published checkpoints of a run by step, damaged ones included."""
    if not folder.is_dir():
        return {}
    matches = ((_NAME.match(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return {int(match[1]): entry for match, entry in matches if match is not None}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter (a tied one once) and every persistent buffer, by name."""
    kept = set(model.state_dict().keys())
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in kept}


@torch.no_grad()
def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """Copy `tensors` into the model. DataError names the first that is missing, extra or of another shape or dtype."""
    own = model_tensors(model)
    for name in [*own, *tensors]:
        if name not in tensors:
            raise DataError(f"{where}: tensor '{name}' is missing")
        if name not in own:
            raise DataError(f"{where}: tensor '{name}' is not one of this model's")
        new, old = tensors[name], own[name]
        if new.shape != old.shape or new.dtype != old.dtype:
            raise DataError(
                f"{where}: tensor '{name}' is {new.dtype} {list(new.shape)}, expected {old.dtype} {list(old.shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: {error}") from error
    return tensors


def _rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.int32).copy())
    version, words, gauss = random.getstate()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
    }
    return tensors, state


def _restore_rng(tensors: Mapping[str, Tensor], state: Mapping[str, Any], path: Path) -> None:
    try:
        torch.set_rng_state(tensors["rng.torch"])
        kind, position, has_gauss, cached = state["numpy"]
        keys = tensors["rng.numpy"].numpy().view(np.uint32)
        version, words, gauss = state["python"]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: random-number state is missing or malformed: {error!r}") from error
    np.random.set_state((kind, keys, position, has_gauss, cached))
    random.setstate((version, tuple(words), gauss))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
