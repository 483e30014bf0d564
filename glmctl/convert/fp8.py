"""FP8 weights in the two layouts that are in use, both directions (spec section 1.6, `model.fp8`).

`fp8-channel` is that of the released GLM-4.5-FP8 checkpoints, `fp8-block` DeepSeek-V3's, which rollout engines take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmctl.convert.stored import BLOCK_BYTES, Stored, from_file
from glmctl.model.fp8 import BLOCK, LARGEST, SCALE, Scaled, is_scale, scale_of, scaled_weights
from glmctl.model.tensor_file import TensorFile

# ---------------------------------------------------------------------------------------------------- reading


def dequantised(files: Mapping[str, TensorFile], description: Any, where: Path) -> dict[str, Stored]:
    """The tensors of an FP8 folder without their scales, FP8 ones as fp32 (exactly), the others as they are.

    description: the `quantization_config` of `where`. DataError as `model.fp8.scaled_weights` raises it.
    """
    scaled = scaled_weights(files, description, where)
    result: dict[str, Stored] = {}
    for name, file in files.items():
        if name in scaled:
            scale = from_file(files[scaled[name].name], scaled[name].name)
            result[name] = _dequantised(from_file(file, name), scale, scaled[name])
        elif not is_scale(name):
            result[name] = from_file(file, name)
    return result


def _dequantised(weight: Stored, scale: Stored, scaled: Scaled) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        scales = scale.read_rows(start // scaled.height, math.ceil(stop / scaled.height))
        return weight.read_rows(start, stop).float() * scaled.spread(scales, start, stop, weight.width)

    return Stored(weight.shape, torch.float32, read)


# ---------------------------------------------------------------------------------------------------- writing


@dataclass
class ErrorReport:
    """How far quantised weights are from the exact ones, by the kind of matrix."""

    squared_error: dict[str, float] = field(default_factory=dict)
    squared: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """All of it, by name; changing it changes the report."""
        return {"squared_error": self.squared_error, "squared": self.squared, "worst": self.worst}

    def add(self, kind: str, exact: Tensor, rounded: Tensor) -> None:
        """Count some rows of one matrix, both in fp32."""
        error = exact - rounded
        self.squared_error[kind] = self.squared_error.get(kind, 0.0) + float(error.square().sum(dtype=torch.float64))
        self.squared[kind] = self.squared.get(kind, 0.0) + float(exact.square().sum(dtype=torch.float64))
        largest = float(exact.abs().max())
        relative = float(error.abs().max()) / largest if largest else 0.0
        self.worst[kind] = max(self.worst.get(kind, 0.0), relative)

    def summary(self) -> dict[str, dict[str, float]]:
        """By kind: `relative_rms` = |w - q| / |w| over all its matrices, `worst` = largest |w - q| / largest |w|."""
        return {
            kind: {
                "relative_rms": math.sqrt(self.squared_error[kind] / (self.squared[kind] or 1.0)),
                "worst": self.worst[kind],
            }
            for kind in sorted(self.squared)
        }


def quantisable(name: str, tensor: Stored) -> bool:
    """Projections of attention and feed-forward; not embedding, head, router, norms, biases and MTP's eh_proj."""
    matrix = name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")
    return matrix and len(tensor.shape) == 2


def quantised(tensors: Mapping[str, Stored], layout: str, report: ErrorReport) -> dict[str, Stored]:
    """`tensors` with each quantisable matrix in FP8 and its scales behind it. `report` fills as they are read."""
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not quantisable(name, tensor):
            result[name] = tensor
            continue
        kind = name.split(".")[-2]
        if ".experts." in name:
            kind = f"experts.{kind}"
        result[name] = _quantised(tensor, layout, kind, report)
        result[name + SCALE[layout]] = _scales(tensor, layout)
    return result


def _quantised(source: Stored, layout: str, kind: str, report: ErrorReport) -> Stored:
    height = BLOCK if layout == "fp8-block" else 1

    def read(start: int, stop: int) -> Tensor:
        first, last = start // height * height, min(source.rows, math.ceil(stop / height) * height)
        rows = source.read_rows(first, last).float()
        scales = _spread(_amax(rows, layout), rows, layout)
        packed = (rows / scales).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)[start - first : stop - first]
        report.add(kind, rows[start - first : stop - first], packed.float() * scales[start - first : stop - first])
        return packed

    return Stored(source.shape, torch.float8_e4m3fn, read)


def _scales(source: Stored, layout: str) -> Stored:
    height = BLOCK if layout == "fp8-block" else 1
    columns = math.ceil(source.width / BLOCK) if layout == "fp8-block" else 1
    shape = (math.ceil(source.rows / height), columns)
    step = max(1, BLOCK_BYTES // (source.width * height * 4))

    def read(start: int, stop: int) -> Tensor:
        parts = []
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows = source.read_rows(first * height, min(last * height, source.rows)).float()
            parts.append(_amax(rows, layout))
        return torch.cat(parts)

    return Stored(shape, torch.float32, read)


def _amax(rows: Tensor, layout: str) -> Tensor:
    """max(largest absolute value, 1e-12) / 448 of each row [n, 1] or block [ceil(n / 128), ceil(width / 128)]."""
    if layout == "fp8-channel":
        largest = rows.abs().amax(dim=1, keepdim=True)
    else:
        n, width = rows.shape
        padded = torch.nn.functional.pad(rows, (0, -width % BLOCK, 0, -n % BLOCK))
        largest = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).abs().amax(dim=(1, 3))
    return scale_of(largest)


def _spread(scales: Tensor, rows: Tensor, layout: str) -> Tensor:
    if layout == "fp8-channel":
        return scales
    return scales.repeat_interleave(BLOCK, 0)[: rows.shape[0]].repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]


def description(tensors: Mapping[str, Stored], layout: str) -> dict[str, Any]:
    """The `quantization_config` that tells a reader what `quantised` did to `tensors`."""
    skipped = sorted(
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not quantisable(name, tensor)
    )
    if layout == "fp8-block":
        body: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {**body, "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": skipped}
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False, "observer": "minmax", "observer_kwargs": {}},
        "input_activations": {**common, "strategy": "token", "dynamic": True, "observer": None, "observer_kwargs": {}},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in skipped if not name.endswith("embed_tokens")],
        "kv_cache_scheme": None,
    }
