"""Memory for weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LINE = 64
"""bytes of a cache line: a vector that begins at one does not lie in two"""


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device | str | int | None) -> Tensor:
    """A tensor of undefined contents, on a CPU in memory that numpy asks for.

    numpy asks Linux for huge pages where an array has 4 MB or more (torch does not): reading weights once a token, a
    core spends a third of its time on page tables otherwise.
    """
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=target)
    return bytes_in_lines(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)


def bytes_in_lines(count: int) -> Tensor:
    """`count` bytes (uint8) on the CPU that begin at a cache line."""
    room = np.empty(count + LINE, np.uint8)
    first = -room.ctypes.data % LINE
    return torch.from_numpy(room[first : first + count])
