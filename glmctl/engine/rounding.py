"""A model with its weights rounded as a packed format rounds them.

The native runner over packed weights computes, bit by bit, what it computes over these. So a format's loss of quality
is the difference that `glmctl eval` finds between a model and the same model rounded, on any runner and device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glmctl.engine.native_weights import INT8_GROUP
from glmctl.model.fp8 import BLOCK, LARGEST, scale_of
from glmctl.model.network import GlmMoe
from glmctl.recipe.use import RoundedFormat

_ROWS = 4096
"""rounded at once: a stack of experts has copies a piece at a time"""


@torch.no_grad()
def round_weights(model: GlmMoe, format: RoundedFormat) -> None:
    """Round the model's matrices in place.

    Embedding and routers keep all their bits, with FP8 the head and the MTP layer's `eh_proj` too, as in the released
    FP8 checkpoints. A tied head is the embedding and keeps its own.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
            continue
        if format.startswith("fp8") and name.endswith(("lm_head.weight", "eh_proj.weight")):
            continue
        for matrix_RC in _matrices(name, parameter):
            if format == "fp8-block":
                matrix_RC.copy_(_fp8_blocks(matrix_RC.float()))
            else:
                for rows_RC in torch.split(matrix_RC, _ROWS):
                    rows_RC.copy_(_ROUND[format](rows_RC.float()))


def _matrices(name: str, parameter: Tensor) -> Iterator[Tensor]:
    """The matrices that a parameter stacks, as views: those of each expert, gate apart from up."""
    if parameter.dim() == 2:
        yield parameter
        return
    for expert in parameter:
        yield from expert.chunk(2) if name.endswith("gate_up_proj") else (expert,)


def _bf16(rows_RC: Tensor) -> Tensor:
    return rows_RC.bfloat16().float()


def _int8(rows_RC: Tensor) -> Tensor:
    """Steps of a 127th of the largest of INT8_GROUP neighbours in a row."""
    rows, columns = rows_RC.shape
    groups_RGC = torch.nn.functional.pad(rows_RC, (0, -columns % INT8_GROUP)).view(rows, -1, INT8_GROUP)
    largest = groups_RGC.abs().amax(-1, keepdim=True)
    step = largest / torch.full_like(largest, 127)  # a plain number would be its reciprocal on a GPU
    inverse = torch.where(step > 0, 1 / step, 0.0)
    rounded = (groups_RGC * inverse).round_().clamp_(-127, 127) * step
    return rounded.flatten(1)[:, :columns]


def _fp8(weight: Tensor, largest: Tensor) -> Tensor:
    scale = scale_of(largest)
    return (weight / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def _fp8_rows(rows_RC: Tensor) -> Tensor:
    return _fp8(rows_RC, rows_RC.abs().amax(1, keepdim=True))


def _fp8_blocks(matrix_RC: Tensor) -> Tensor:
    rows, columns = matrix_RC.shape
    padded = torch.nn.functional.pad(matrix_RC, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    rounded = _fp8(blocks, blocks.abs().amax((1, 3), keepdim=True))
    return rounded.reshape(padded.shape)[:rows, :columns]


_ROUND = {"bf16": _bf16, "int8": _int8, "fp8-channel": _fp8_rows}
