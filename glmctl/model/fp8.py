"""FP8 weights in a folder, in the two layouts that are in use (spec section 1.6): which are scaled by what.

The released GLM-4.5-FP8 checkpoints (compressed-tensors, E4M3) have one fp32 `weight_scale` for each output row;
DeepSeek-V3's layout, which rollout engines take, has one fp32 `weight_scale_inv` for each 128 x 128 block. In both a
weight is `fp8 * scale`, the "inv" of the second notwithstanding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmctl.errors import DataError
from glmctl.model.tensor_file import TensorFile

BLOCK = 128
LARGEST = 448.0
"""of E4M3"""
SMALLEST_AMAX = 1e-12
"""keeps a row of zeros from dividing by zero"""
SCALE = {"fp8-channel": "_scale", "fp8-block": "_scale_inv"}
"""what is appended to a weight's name, by layout"""

_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def scale_of(largest: Tensor) -> Tensor:
    """max(largest, 1e-12) / 448, of the largest absolute values of rows or blocks: the same bits on every device.

    A GPU multiplies by the reciprocal where the divisor is a plain number, and is off by a bit.
    """
    return largest.clamp(min=SMALLEST_AMAX) / torch.full_like(largest, LARGEST)


@dataclass(frozen=True)
class Scaled:
    """Which scale an FP8 tensor has: one number for every `height` x `width` of its elements."""

    name: str
    """of the scale's tensor"""
    height: int
    width: int

    def spread(self, scale: Tensor, start: int, stop: int, columns: int) -> Tensor:
        """Scales [rows of blocks, columns of blocks], the first row of which covers row `start`, for each element of
        rows [start, stop): [stop - start, columns], or [.., 1] where a row has one scale.
        """
        first = start // self.height * self.height
        by_row = scale.float().repeat_interleave(self.height, 0)[start - first : stop - first]
        return by_row if by_row.shape[1] == 1 else by_row.repeat_interleave(self.width, 1)[:, :columns]


@dataclass(frozen=True)
class Fp8Scales:
    """The scales that a parameter's FP8 weights came with. They outlive a change of the parameter: whoever uses them
    checks that they still give its numbers.
    """

    scale_MRC: Tensor
    """fp32 [M, R, C]: the parameter's M matrices on disk (experts are stacked, gate before up), by block"""
    height: int
    width: int


def is_scale(name: str) -> bool:
    """Whether a tensor of a folder is the scale of another."""
    return name.endswith(tuple("weight" + ending for ending in SCALE.values()))


def scaled_weights(files: Mapping[str, TensorFile], description: Any, where: Path) -> dict[str, Scaled]:
    """The FP8 tensors of a folder by name.

    description: the `quantization_config` of `where`. DataError for another method, a weight without its scale, a
    scale without its weight, or one of the wrong shape.
    """
    height, width = block_size(description, where)
    for name, file in files.items():
        scaled = name.removesuffix("_inv").removesuffix("_scale")
        if is_scale(name) and (scaled not in files or files[scaled].slots[scaled].dtype not in _TYPES):
            raise DataError(f"{file.path}: tensor '{name}' scales nothing: there is no FP8 '{scaled}'")
    result: dict[str, Scaled] = {}
    for name, file in files.items():
        slot = file.slots[name]
        if slot.dtype not in _TYPES:
            continue
        ending = next((e for e in SCALE.values() if name + e in files), None)
        if ending is None:
            raise DataError(f"{file.path}: tensor '{name}' is FP8 and has no scale")
        columns = max(1, slot.shape[-1] if slot.shape else 1)
        one = Scaled(name + ending, *((1, columns) if ending == "_scale" else (height, width)))
        rows = math.prod(slot.shape[:-1])
        expected = (math.ceil(rows / one.height), math.ceil(columns / one.width))
        found = files[one.name].slots[one.name]
        if found.shape != expected or not found.dtype.is_floating_point:
            raise DataError(
                f"{files[one.name].path}: tensor '{one.name}' is {found.dtype} {list(found.shape)}, "
                f"expected float {list(expected)}"
            )
        result[name] = one
    return result


def block_size(description: Any, where: Path) -> tuple[int, int]:
    """Height and width of the blocks that a `quantization_config` names. DataError when it is not of FP8 weights."""
    method = description.get("quant_method") if isinstance(description, dict) else description
    if method not in ("compressed-tensors", "fp8"):
        raise DataError(f"{where}: quantization method {method!r} is not supported; compressed-tensors and fp8 are")
    block = description.get("weight_block_size") or [BLOCK, BLOCK]
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise DataError(f"{where}: weight_block_size is {block!r}, expected two positive numbers")
    return block[0], block[1]
