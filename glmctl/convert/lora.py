"""LoRA adapters in PEFT's layout, merged into the weights they were trained on (Hu et al. 2021, section 4.1)."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmctl.convert.source import StoredModel
from glmctl.convert.stored import Stored
from glmctl.errors import DataError, nearest
from glmctl.model.folder import read_json
from glmctl.model.tensor_file import TensorFile

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_NAME = re.compile(r"^base_model\.model\.(.+)\.lora_(A|B)\.weight$")
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}
"""key -> values under which merging is W + scale * B A and nothing else"""


def merge_lora(model: StoredModel, adapter: Path) -> StoredModel:
    """W + lora_alpha / r * B A for every adapted matrix, computed in fp32 and rounded once to W's dtype.

    With `use_rslora` the scale is lora_alpha / sqrt(r). DataError for an adapter of another kind, one half of a pair,
    a matrix that the model does not have, or shapes that do not fit.
    """
    path = adapter / CONFIG
    body = read_json(path, "a PEFT adapter is a folder with adapter_config.json and adapter_model.safetensors")
    for key, allowed in _UNSUPPORTED.items():
        if body.get(key, allowed[0]) not in allowed:
            raise DataError(f"{path}: {key} is {body[key]!r}; only {allowed[0]!r} can be merged")
    rank, alpha = body.get("r"), body.get("lora_alpha")
    if not (type(rank) is int and rank > 0 and isinstance(alpha, int | float)):
        raise DataError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}, expected numbers")
    scale = alpha / (math.sqrt(rank) if body.get("use_rslora") else rank)
    file = TensorFile(adapter / WEIGHTS)
    tensors = dict(model.tensors)
    for name in _adapted(file):
        a, b = (f"base_model.model.{name}.lora_{half}.weight" for half in "AB")
        target = f"{name}.weight"
        for half in (a, b):
            if half not in file.slots:
                raise DataError(f"{file.path}: tensor '{half}' is missing")
        if target not in tensors:
            match = nearest(target, tensors)
            hint = f"the closest is '{match}'" if match else None
            raise DataError(f"{file.path}: adapts '{target}', which the model does not have", hint=hint)
        weight = tensors[target]
        shapes = file.slots[a].shape, file.slots[b].shape
        if len(weight.shape) != 2 or shapes != ((rank, weight.shape[1]), (weight.shape[0], rank)):
            raise DataError(f"{file.path}: '{name}' has shapes {shapes} for a weight of {list(weight.shape)}, r={rank}")
        tensors[target] = _merged(weight, file.read(a).float(), file.read(b).float(), scale)
    return replace(model, tensors=tensors)


def _adapted(file: TensorFile) -> list[str]:
    found: dict[str, None] = {}
    for name in file.slots:
        match = _NAME.match(name)
        if match is None:
            raise DataError(f"{file.path}: tensor '{name}' is not part of a LoRA adapter in PEFT's layout")
        found[match[1]] = None
    return list(found)


def _merged(weight: Stored, a_RI: Tensor, b_OR: Tensor, scale: float) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        rows = weight.read_rows(start, stop)
        return torch.addmm(rows.float(), b_OR[start:stop], a_RI, alpha=scale).to(rows.dtype)

    return Stored(weight.shape, weight.dtype, read)
