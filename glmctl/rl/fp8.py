"""The policy as an FP8 rollout engine would hold it: block-wise E4M3, rounded again at every update.

The report trains in BF16 and quantises the weights block-wise at each policy update for rollout (spec sections 1.6 and
3.6). Here the rounded weights are computed with in fp32, so that what FP8 does to the log-probs can be measured on any
machine; its speed needs a GPU whose engine takes `glmctl convert`'s fp8-block folders.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.model.fp8 import BLOCK, LARGEST, scale_of
from glmctl.model.network import GlmMoe

_MATRICES = ("_proj.weight", "_proj_with_mqa.weight", ".wq.weight", "experts.down_proj")
_STACKED = "experts.gate_up_proj"


@torch.no_grad()
def load_rounded(target: GlmMoe, source: GlmMoe) -> None:
    """Copy `source` into `target`, of the same shape, with the matrices that FP8 holds rounded.

    Embedding, head, router, norms, biases and MTP's eh_proj stay exact.
    """
    of = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        exact = of[name]
        if name.endswith(_STACKED):
            # gate and up are two matrices in the folder, each with blocks of its own
            tensor.copy_(torch.cat([rounded(half) for half in exact.chunk(2, dim=-2)], dim=-2))
        elif name.endswith(_MATRICES) and not name.endswith("eh_proj.weight"):
            tensor.copy_(rounded(exact))
        else:
            tensor.copy_(exact)


def rounded(weight: Tensor) -> Tensor:
    """weight [..., O, I] -> the nearest that E4M3 with one scale for each 128 x 128 block can hold, same dtype.

    scale = max(largest |w| of the block, 1e-12) / 448; q = E4M3(w / scale); the result is q * scale (spec section 1.6).
    """
    *batch, rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(*batch, padded.shape[-2] // BLOCK, BLOCK, padded.shape[-1] // BLOCK, BLOCK)
    scale = scale_of(blocks.abs().amax(dim=(-3, -1), keepdim=True))
    held = (blocks / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale
    return held.view(padded.shape)[..., :rows, :columns].to(weight.dtype)
