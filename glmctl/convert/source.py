"""What a conversion starts from: a model folder, a training checkpoint, or a run that has one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from glmctl.errors import DataError, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_config, load_model, open_tensors
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import TensorFile
from glmctl.model.weights import entries, memory_shapes
from glmctl.run import atomic

WEIGHTS = "model.safetensors"
STATE = "state.json"

_STEP = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Source:
    """A place that holds one model."""

    kind: Literal["hf", "checkpoint"]
    path: Path
    tokenizer_folder: Path | None
    """where its tokenizer lies, if anywhere"""


def find_source(path: Path) -> Source:
    """What `path` is. A run means its newest checkpoint, or its export when it keeps no checkpoints.

    Raises RecipeError when nothing is there and DataError when what is there holds no model.
    """
    if not path.exists():
        raise RecipeError(f"{path}: no such model, checkpoint or run")
    if (path / "config.json").is_file():
        return Source("hf", path, _with_tokenizer(path))
    if (path / STATE).is_file():
        return Source("checkpoint", path, _with_tokenizer(path, path.parent.parent / "export"))
    steps = {int(m[1]): entry for entry in _entries(path / "checkpoints") if (m := _STEP.match(entry.name))}
    if steps:
        return Source("checkpoint", steps[max(steps)], _with_tokenizer(path / "export"))
    if path.name != "export" and (path / "export").is_dir():
        return find_source(path / "export")
    raise DataError(f"{path}: neither a model folder, nor a checkpoint, nor a run with one of them")


def load_source(source: Source) -> GlmMoe:
    """The model, in the dtype it is stored in. DataError names what is damaged, missing or extra."""
    if source.kind == "hf":
        return load_model(source.path)
    atomic.verify(source.path)
    config, copies = read_state(source.path)
    file = _checked(source.path / WEIGHTS, config)
    model = GlmMoe(config, device="meta", dtype=file.slots["embed_tokens.weight"].dtype)
    model.to_empty(device="cpu")
    model.stores_mtp_copies = copies
    for name, tensor in model.state_dict().items():
        if file.slots[name].dtype != tensor.dtype:
            raise DataError(f"{file.path}: tensor '{name}' is {file.slots[name].dtype}, expected {tensor.dtype}")
        tensor.copy_(file.read(name))
    return model


def read_state(checkpoint: Path) -> tuple[ModelConfig, bool]:
    """The model's shape as a checkpoint's state.json records it, and whether its folder repeats embedding and head."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))["state"]
        config = ModelConfig.model_validate(state["model"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise DataError(f"{path}: does not describe a model: {what}") from error
    return config, bool(state.get("mtp_copies", True))


class StoredTensors:
    """The tensors of a stored model under their Hugging Face names, read when asked for.

    A checkpoint's stacked experts are shown one by one, and the MTP layer's repetitions as their originals.
    """

    def __init__(self, source: Source) -> None:
        self._files: Mapping[str, TensorFile] = {}
        self._views: dict[str, tuple[TensorFile, Any]] = {}
        if source.kind == "hf":
            load_config(source.path)
            self._files = open_tensors(source.path)
            self.names = set(self._files)
            return
        config, copies = read_state(source.path)
        file = _checked(source.path / WEIGHTS, config)
        self._views = {e.disk: (file, e) for e in entries(config) if copies or not e.copy}
        self.names = set(self._views)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file."""
        if name in self._files:
            return self._files[name].read(name)
        file, entry = self._views[name]
        view: Tensor = entry.view(file.read(entry.memory))
        return view


def _checked(path: Path, config: ModelConfig) -> TensorFile:
    """The weights file of a checkpoint, if it holds exactly the tensors that `config` asks for."""
    file = TensorFile(path)
    shapes = memory_shapes(config)
    for name in [*shapes, *file.slots]:
        if name not in file.slots:
            raise DataError(f"{path}: tensor '{name}' is missing")
        if name not in shapes:
            raise DataError(f"{path}: tensor '{name}' is not part of this model")
        if file.slots[name].shape != shapes[name]:
            raise DataError(f"{path}: tensor '{name}' has shape {file.slots[name].shape}, expected {shapes[name]}")
    return file


def is_router_bias(name: str) -> bool:
    """Whether a tensor is one of those that stay fp32 in every format."""
    return name.endswith("e_score_correction_bias")


def stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor gets when a model is saved as `dtype` (None = as it is)."""
    return tensor.dtype if dtype is None or is_router_bias(name) else dtype


def _with_tokenizer(*folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
