"""Memory for weights: of the right size, at cache lines, of its own, and in huge pages where the system has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from glmctl.model.memory import LINE, bytes_in_lines, empty

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_a_tensor_is_what_was_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made, other = empty(shape, dtype, "cpu"), empty(shape, dtype, "cpu")
    assert (made.shape, made.dtype, made.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert made.untyped_storage().nbytes() == made.nbytes
    if made.numel():
        assert made.data_ptr() % LINE == 0
        assert made.data_ptr() != other.data_ptr()


def test_other_devices_get_torch_s_own() -> None:
    assert empty((2, 3), torch.float32, "meta").device.type == "meta"


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the system has no huge pages")
def test_large_tensors_lie_in_huge_pages() -> None:
    """What is asked of the kernel; how much of it there is to give depends on how scattered its free memory lies."""
    room = bytes_in_lines(64 << 20)
    address, flags = room.data_ptr() + (32 << 20), ""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(edge, 16) for edge in mapping.split(" ", 1)[0].split("-"))
        if first <= address < last:
            (flags,) = re.findall(r"VmFlags: (.*)", mapping)
    assert "hg" in flags.split()
