"""What a conversion starts from: a model folder, a training checkpoint, a GGUF file, or a run that has one of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from glmctl.convert.dense import FAMILIES, dense_config
from glmctl.convert.fp8 import dequantised
from glmctl.convert.gguf_import import read_gguf
from glmctl.convert.megatron import NAMES, from_megatron, to_megatron
from glmctl.convert.stored import Stored, cast, concatenated, equal, from_file, missing, section
from glmctl.errors import DataError, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import check_tensors, load_config, open_tensors, read_json
from glmctl.model.fp8 import is_scale
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import TensorFile
from glmctl.model.weights import Entry, entries, memory_shapes

WEIGHTS = "model.safetensors"
STATE = "state.json"

_STEP = re.compile(r"^step-(\d+)$")

Kind = Literal["hf", "checkpoint", "gguf"]


@dataclass(frozen=True)
class Source:
    """A place that holds one model."""

    kind: Kind
    path: Path
    tokenizer_folder: Path | None
    """where its tokenizer lies, if anywhere"""


@dataclass(frozen=True)
class StoredModel:
    """A model on disk: its shape, and its tensors under GLM-4.5's Hugging Face names, none of them read yet."""

    source: Source
    config: ModelConfig
    tensors: dict[str, Stored]
    """in file order; the MTP layer's repetitions of embedding and head only where the source stores (or means) them"""
    packed_as: torch.dtype | None = None
    """for a source of packed numbers, shown here in fp32: the dtype its config names for them unpacked"""
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)
    """text by file name, for a source whose tokenizer is not in files of its own"""

    @property
    def copies(self) -> bool:
        """Whether the MTP layer's repetitions are among the tensors: GLM-4.5 stores them, GLM-4.6 does not."""
        return any(entry.copy and entry.disk in self.tensors for entry in entries(self.config))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The widest among the tensors, router biases left out."""
        found = {tensor.dtype for name, tensor in self.tensors.items() if not is_router_bias(name)}
        result, *others = found
        for other in others:
            result = torch.promote_types(result, other)
        return result


def find_source(path: Path) -> Source:
    """What `path` is. A run means its newest checkpoint, or its export when it keeps no checkpoints.

    Raises RecipeError when nothing is there and DataError when what is there holds no model.
    """
    if not path.exists():
        raise RecipeError(f"{path}: no such model, checkpoint or run")
    if path.suffix == ".gguf" and path.is_file():
        return Source("gguf", path, None)
    if (path / "config.json").is_file():
        return Source("hf", path, _with_tokenizer(path))
    if (path / STATE).is_file():
        return Source("checkpoint", path, _with_tokenizer(path, path.parent.parent / "export"))
    steps = {int(m[1]): entry for entry in _entries(path / "checkpoints") if (m := _STEP.match(entry.name))}
    if steps:
        return Source("checkpoint", steps[max(steps)], _with_tokenizer(path / "export"))
    if path.name != "export" and (path / "export").is_dir():
        return find_source(path / "export")
    if _pickles(path):
        raise DataError(
            f"{_pickles(path)[0]}: pickled weights are never opened, since opening them can run code",
            hint="convert them to safetensors where they come from",
        )
    raise DataError(f"{path}: neither a model folder, a checkpoint, a .gguf file, nor a run with one of them")


def open_model(path: Path) -> StoredModel:
    """The model at `path`, headers read, names and shapes checked against its config in both directions.

    DataError names what is damaged, missing or extra.
    """
    source = find_source(path)
    openers: dict[Kind, Callable[[Source], StoredModel]] = {
        "hf": _open_folder,
        "checkpoint": _open_checkpoint,
        "gguf": _open_gguf,
    }
    return openers[source.kind](source)


def _open_gguf(source: Source) -> StoredModel:
    config, tensors, tokenizer = read_gguf(source.path)
    return StoredModel(source, config, tensors, tokenizer_files=tokenizer)


def _open_folder(source: Source) -> StoredModel:
    path = source.path / "config.json"
    body = read_json(path, "a model folder has a config.json")
    dense = body.get("model_type") in FAMILIES
    config = dense_config(body, path) if dense else load_config(source.path)
    files = open_tensors(source.path)
    description = body.get("quantization_config")
    if body.get("tensor_names") == NAMES:
        found = _under_hf_names(source.path, config, files)
        if body.get("mtp_copies"):
            originals = {entry.memory: entry.disk for entry in entries(config) if not entry.copy}
            found |= {entry.disk: found[originals[entry.memory]] for entry in entries(config) if entry.copy}
        return StoredModel(source, config, {e.disk: found[e.disk] for e in entries(config) if e.disk in found})
    if description is None:
        check_tensors(source.path, config, files)
        found = {name: from_file(file, name) for name, file in files.items()}
    else:
        check_tensors(source.path, config, {name: file for name, file in files.items() if not is_scale(name)})
        found = dequantised(files, description, path)
    tensors = {entry.disk: found[entry.disk] for entry in entries(config) if entry.disk in found}
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise DataError(f"{files[name].path}: tensor '{name}' is {tensor.dtype}, expected floating point")
    named = getattr(torch, str(body.get("torch_dtype") or body.get("dtype")), None)
    unpacked = named if isinstance(named, torch.dtype) and named.is_floating_point else torch.bfloat16
    return StoredModel(source, config, tensors, packed_as=None if description is None else unpacked)


def _under_hf_names(folder: Path, config: ModelConfig, files: Mapping[str, TensorFile]) -> dict[str, Stored]:
    """Tensors of a folder with Megatron's names, checked both ways; shapes are checked against the table's."""
    shapes = {entry.disk: entry.shape for entry in entries(config)}
    wanted = to_megatron(config, {name: missing(shape) for name, shape in shapes.items()})
    for name in [*wanted, *files]:
        if name not in files:
            raise DataError(f"{folder}: tensor '{name}' is missing")
        if name not in wanted:
            raise DataError(f"{files[name].path}: tensor '{name}' is not part of this model")
        if files[name].slots[name].shape != wanted[name].shape:
            shape = list(files[name].slots[name].shape)
            raise DataError(
                f"{files[name].path}: tensor '{name}' has shape {shape}, expected {list(wanted[name].shape)}"
            )
    return from_megatron(config, {name: from_file(file, name) for name, file in files.items()})


def _open_checkpoint(source: Source) -> StoredModel:
    """A checkpoint's stacked experts are shown one by one, and the MTP layer's repetitions as their originals."""
    config, copies = _read_state(source.path)
    file = TensorFile(source.path / WEIGHTS)
    shapes = memory_shapes(config)
    for name in [*shapes, *file.slots]:
        if name not in file.slots:
            raise DataError(f"{file.path}: tensor '{name}' is missing")
        if name not in shapes:
            raise DataError(f"{file.path}: tensor '{name}' is not part of this model")
        if file.slots[name].shape != shapes[name]:
            found = list(file.slots[name].shape)
            raise DataError(f"{file.path}: tensor '{name}' has shape {found}, expected {list(shapes[name])}")
    listed = [entry for entry in entries(config) if copies or not entry.copy]
    return StoredModel(source, config, {e.disk: _part(file, e) for e in listed})


def _part(file: TensorFile, entry: Entry) -> Stored:
    whole = from_file(file, entry.memory)
    if entry.whole:
        return whole
    rows_an_expert = whole.shape[1]
    if entry.expert is None:
        first = (entry.half or 0) * (rows_an_expert // 2)
        starts = (e * rows_an_expert + first for e in range(entry.shape[0]))
        return concatenated([section(whole, start, entry.shape[1:]) for start in starts], entry.shape)
    first = entry.expert * rows_an_expert + (entry.half or 0) * (rows_an_expert // 2)
    return section(whole, first, entry.shape)


def _read_state(checkpoint: Path) -> tuple[ModelConfig, bool]:
    """The model's shape as a checkpoint's state.json records it, and whether its folder repeats embedding and head."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))["state"]
        config = ModelConfig.model_validate(state["model"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise DataError(f"{path}: does not describe a model: {what}") from error
    return config, bool(state.get("mtp_copies", True))


def in_memory(model: StoredModel) -> dict[str, Stored]:
    """The tensors under their in-memory names, experts stacked, repetitions left out (`model.weights`).

    A stacked tensor whose parts differ in dtype gets the widest.
    """
    shapes = memory_shapes(model.config)
    parts: dict[str, dict[tuple[int, int], Stored]] = {}
    result: dict[str, Stored] = {}
    for entry in entries(model.config):
        if entry.copy:
            continue
        tensor = model.tensors[entry.disk]
        if entry.whole:
            result[entry.memory] = tensor
        elif entry.expert is None:
            for e in range(entry.shape[0]):
                one = section(tensor, e * entry.shape[1], entry.shape[1:])
                parts.setdefault(entry.memory, {})[e, entry.half or 0] = one
            result.setdefault(entry.memory, tensor)
        else:
            parts.setdefault(entry.memory, {})[entry.expert, entry.half or 0] = tensor
            result.setdefault(entry.memory, tensor)  # keeps the order of the file
    for name, found in parts.items():
        stack = [found[key] for key in sorted(found)]
        dtype = stack[0].dtype
        for tensor in stack:
            dtype = torch.promote_types(dtype, tensor.dtype)
        result[name] = concatenated([cast(tensor, dtype) for tensor in stack], shapes[name])
    return result


def check_copies(model: StoredModel) -> None:
    """DataError unless the MTP layer's repetitions of embedding and head equal the originals."""
    originals = {entry.memory: entry.disk for entry in entries(model.config) if not entry.copy}
    for entry in entries(model.config):
        if not entry.copy or entry.disk not in model.tensors:
            continue
        original = originals[entry.memory]
        a, b = model.tensors[entry.disk], model.tensors[original]
        if a is not b and (a.dtype != b.dtype or not equal(a, b)):
            raise DataError(
                f"{model.source.path}: tensor '{entry.disk}' differs from '{original}'; "
                "the MTP layer shares embedding and head with the model"
            )


def load(model: StoredModel) -> GlmMoe:
    """The network itself, in the widest dtype of its tensors. For models that fit into memory."""
    network = GlmMoe(model.config, device="meta", dtype=model.dtype)
    network.to_empty(device="cpu")
    network.stores_mtp_copies = model.copies
    stored = in_memory(model)
    for name, tensor in network.state_dict().items():
        tensor.copy_(stored[name].whole())
    return network


def is_router_bias(name: str) -> bool:
    """Whether a tensor is one of those that stay fp32 in every format."""
    return name.endswith("e_score_correction_bias")


def stored_dtype(name: str, tensor: Stored, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor gets when a model is saved as `dtype` (None = as it is)."""
    if is_router_bias(name):
        return torch.float32
    return tensor.dtype if dtype is None else dtype


def _with_tokenizer(*folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _pickles(path: Path) -> list[Path]:
    endings = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".metadata")
    return sorted(p for p in [path, *_entries(path)] if p.is_file() and p.name.endswith(endings))
