"""Whether every number of a tensor is finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glmctl.kernels.cpu.library import compiled
from glmctl.kernels.registry import op, variant


def all_finite(x: Tensor) -> bool:
    """False when any number is infinite or NaN. The reference says so too when the sum overflows."""
    return bool(op("all_finite", x.device.type, x.dtype)(x))


@variant("all_finite", "reference")
def reference(x: Tensor) -> bool:
    """One pass and one number that comes back from the device."""
    return math.isfinite(x.sum())


@variant("all_finite", "native", devices=("cpu",), dtypes=(torch.float32,))
def native(x: Tensor) -> bool:
    """On the calling thread: torch's own would go on spinning beside the step's."""
    library = compiled()
    if library is None or not x.is_contiguous():
        return reference(x)
    return bool(library.glm_all_finite(x.data_ptr(), x.numel()))
