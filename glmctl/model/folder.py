"""A model folder in Hugging Face's layout: `config.json` and safetensors shards with one tensor per expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from glmctl.errors import DataError, nearest
from glmctl.model.config import ModelConfig
from glmctl.model.fp8 import Fp8Scales, Scaled, block_size, is_scale, scaled_weights
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import MAX_HEADER_BYTES, TensorFile, write_tensors
from glmctl.model.weights import Entry, entries

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json`. Raises DataError when it is absent, unreadable, of another architecture or quantization."""
    body = read_json(folder / "config.json", "a model folder has a config.json")
    path = folder / "config.json"
    if "model_type" not in body:
        raise DataError(f"{path}: no model_type")
    if body.get("quantization_config") is not None:
        block_size(body["quantization_config"], path)
    try:
        return ModelConfig.from_hf(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def load_model(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GlmMoe:
    """Build the model of a folder and fill it.

    dtype None keeps the files' dtype (the widest, where they mix; fp32 for FP8, which that holds exactly). Router
    biases are always fp32. The MTP layer's repetitions of embedding and head may be absent, and must equal the
    originals where present. Raises DataError naming the file and the tensor when one is missing, unknown, of the wrong
    shape, repeated or cut off, and for a quantization other than FP8.
    """
    folder = Path(folder)
    config = load_config(folder)
    files = open_tensors(folder)
    description = read_json(folder / "config.json", "").get("quantization_config")
    scaled = {} if description is None else scaled_weights(files, description, folder / "config.json")
    listed = files if description is None else {name: file for name, file in files.items() if not is_scale(name)}
    wanted = check_tensors(folder, config, listed)
    if dtype is None:
        dtype = _common_dtype(wanted, files, scaled)
    model = GlmMoe(config, device="meta", dtype=dtype)
    model.to_empty(device=device)
    state = dict(model.state_dict())
    for name, entry in wanted.items():
        if not entry.copy:
            entry.view(state[entry.memory]).copy_(_read(files, name, scaled.get(name)))
    _check_copies(wanted, files)
    model.fp8_scales = _scales(wanted, files, scaled)
    model.stores_mtp_copies = any(entry.copy and name in files for name, entry in wanted.items())
    return model


def save_model(
    model: GlmMoe,
    folder: Path | str,
    *,
    tokenizer_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
) -> list[Path]:
    """Write a folder that `load_model`, transformers, vLLM and SGLang read. Returns the files written.

    The folder is created; publishing it atomically is the caller's part. dtype None keeps each tensor's own;
    router biases stay fp32. A single shard is called model.safetensors, several come with an index. The MTP layer is
    layer `num_hidden_layers`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_config(model.config, folder, dtype or model.dtype)
    state = model.state_dict()
    listed = {e.disk: e for e in entries(model.config) if model.stores_mtp_copies or not e.copy}
    sizes = {name: _nbytes(e, state[e.memory], dtype) for name, e in listed.items()}
    shards = plan_shards(sizes, shard_bytes)
    for file_name, names in shards.items():
        parts = (listed[name] for name in names)
        write_tensors(folder / file_name, ((e.disk, _cast(e, e.view(state[e.memory]), dtype)) for e in parts))
        written.append(folder / file_name)
    written += write_index(folder, shards, sizes)
    if tokenizer_folder is not None:
        written += copy_tokenizer(tokenizer_folder, folder)
    return written


def write_config(
    config: ModelConfig, folder: Path, dtype: torch.dtype, extra: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write `config.json` (with `extra` keys) and `generation_config.json`; returns their paths."""
    body = {**config.to_hf(dtype=str(dtype).removeprefix("torch.")), **(extra or {})}
    generation: dict[str, Any] = {"_from_model_config": True}
    if config.eos_token_id:
        generation["eos_token_id"] = list(config.eos_token_id)
    if config.pad_token_id is not None:
        generation["pad_token_id"] = config.pad_token_id
    return [
        _write_json(folder / "config.json", body),
        _write_json(folder / "generation_config.json", generation),
    ]


def plan_shards(sizes: Mapping[str, int], shard_bytes: float) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order, each file as full as fits; one file is not numbered.

    sizes: bytes by tensor. A tensor larger than `shard_bytes` gets a shard of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], sizes: Mapping[str, int]) -> list[Path]:
    """Write the index of several shards (a single one has none); returns the files written."""
    if len(shards) == 1:
        return []
    places = {name: file_name for file_name, names in shards.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    return [_write_json(folder / INDEX, index)]


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy the tokenizer's files and the chat template, those that exist, into `target`."""
    copied = []
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            copied.append(target / name)
    return copied


def open_tensors(folder: Path) -> dict[str, TensorFile]:
    """The file of each tensor in a folder, headers checked, by the tensor's name."""
    index_path = folder / INDEX
    if not index_path.exists():
        if not (folder / SINGLE).exists():
            raise DataError(f"{folder}: neither {SINGLE} nor {INDEX} is there")
        only = TensorFile(folder / SINGLE)
        return dict.fromkeys(only.slots, only)
    places = read_json(index_path, "").get("weight_map")
    if not isinstance(places, dict):
        raise DataError(f"{index_path}: no weight_map")
    opened: dict[str, TensorFile] = {}
    found: dict[str, TensorFile] = {}
    for name, file_name in places.items():
        if not _is_plain(file_name):
            raise DataError(f"{index_path}: tensor '{name}' points to {file_name!r}, not a file name in the folder")
        if file_name not in opened:
            opened[file_name] = TensorFile(folder / file_name)
        if name not in opened[file_name].slots:
            raise DataError(f"{folder / file_name}: tensor '{name}' is missing, though {INDEX} promises it")
        found[name] = opened[file_name]
    for file in opened.values():
        for name in file.slots:
            if name not in found:
                raise DataError(f"{file.path}: tensor '{name}' is not listed in {INDEX}")
            if found[name] is not file:
                raise DataError(f"{file.path}: tensor '{name}' is also in {found[name].path.name}")
    return found


def _is_plain(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and "\\" not in name
        and "\0" not in name
        and PurePosixPath(name).name == name
    )


def check_tensors(folder: Path, config: ModelConfig, files: Mapping[str, TensorFile]) -> dict[str, Entry]:
    """The entries of `config` by name, once names (both ways) and shapes of a folder's tensors agree with them."""
    wanted = {entry.disk: entry for entry in entries(config)}
    _check_names(folder, wanted, files)
    for name, entry in wanted.items():
        if name in files and files[name].slots[name].shape != entry.shape:
            raise DataError(
                f"{files[name].path}: tensor '{name}' has shape {list(files[name].slots[name].shape)}, "
                f"config.json asks for {list(entry.shape)}"
            )
    return wanted


def _check_names(folder: Path, wanted: Mapping[str, Entry], files: Mapping[str, TensorFile]) -> None:
    missing = [name for name, entry in wanted.items() if name not in files and not entry.copy]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{folder}: tensor '{missing[0]}' is missing{more}")
    extra = [name for name in files if name not in wanted]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        match = nearest(extra[0], wanted)
        hint = f"the closest expected name is '{match}'" if match else None
        raise DataError(f"{files[extra[0]].path}: tensor '{extra[0]}' is not part of this model{more}", hint=hint)


def _check_copies(wanted: Mapping[str, Entry], files: Mapping[str, TensorFile]) -> None:
    originals = {entry.memory: name for name, entry in wanted.items() if not entry.copy}
    for name, entry in wanted.items():
        if not entry.copy or name not in files:
            continue
        original = originals[entry.memory]
        if not torch.equal(files[name].read(name), files[original].read(original)):
            raise DataError(
                f"{files[name].path}: tensor '{name}' differs from '{original}'; "
                "the MTP layer shares embedding and head with the model"
            )


def _read(files: Mapping[str, TensorFile], name: str, scaled: Scaled | None) -> Tensor:
    tensor = files[name].read(name)
    if scaled is None:
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1]).float()
    scale = files[scaled.name].read(scaled.name)
    return (rows * scaled.spread(scale, 0, *rows.shape)).view(tensor.shape)


def _scales(
    wanted: Mapping[str, Entry], files: Mapping[str, TensorFile], scaled: Mapping[str, Scaled]
) -> dict[str, Fp8Scales]:
    """By parameter, those whose matrices are all FP8, in blocks of one size."""
    parts: dict[str, list[tuple[int, int, Scaled | None]]] = {}
    for name, entry in wanted.items():
        if not entry.copy and len(entry.shape) == 2:
            parts.setdefault(entry.memory, []).append((entry.expert or 0, entry.half or 0, scaled.get(name)))
    result: dict[str, Fp8Scales] = {}
    for memory, found in parts.items():
        ordered = [one for _, _, one in sorted(found, key=lambda part: part[:2]) if one is not None]
        if len(ordered) == len(found) and len({(one.height, one.width) for one in ordered}) == 1:
            stacked = torch.stack([files[one.name].read(one.name).float() for one in ordered])
            result[memory] = Fp8Scales(stacked, ordered[0].height, ordered[0].width)
    return result


def _common_dtype(
    wanted: Mapping[str, Entry], files: Mapping[str, TensorFile], scaled: Mapping[str, Scaled]
) -> torch.dtype:
    result: torch.dtype | None = None
    for name, entry in wanted.items():
        if name not in files or entry.memory.endswith("e_score_correction_bias"):
            continue
        own = torch.float32 if name in scaled else files[name].slots[name].dtype
        if not own.is_floating_point or own.itemsize < 2:
            raise DataError(f"{files[name].path}: tensor '{name}' is {own}, expected floating point")
        result = own if result is None else torch.promote_types(result, own)
    assert result is not None
    return result


def _target_dtype(entry: Entry, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    keep = dtype is None or entry.memory.endswith("e_score_correction_bias")
    return tensor.dtype if keep or dtype is None else dtype


def _cast(entry: Entry, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(_target_dtype(entry, tensor, dtype))


def _nbytes(entry: Entry, tensor: Tensor, dtype: torch.dtype | None) -> int:
    count = 1
    for n in entry.shape:
        count *= n
    return count * _target_dtype(entry, tensor, dtype).itemsize


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from a stranger. DataError (with `hint`) when it is absent, over 16 MB or not one."""
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise DataError(f"{path}: larger than {MAX_HEADER_BYTES} bytes")
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint=hint or None) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise DataError(f"{path}: not a JSON object")
    return body


def _write_json(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return path
