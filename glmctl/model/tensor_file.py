"""Safetensors files, read with suspicion and written one tensor at a time.

The format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes. The header comes from
strangers, so it is bounded and checked before anything is allocated from it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmctl.errors import DataError
from glmctl.model.direct import open_direct, read_range

MAX_HEADER_BYTES = 16 << 20
"""GLM-4.5's largest shard needs well under 1 MB."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Slot(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """first byte, from the beginning of the file"""
    nbytes: int


class TensorFile:
    """One safetensors file: `slots` by name; `read` maps a tensor.

    Raises DataError naming the file, and the tensor where there is one, for whatever is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slots = _read_header(path)
        self._map: mmap.mmap | None = None

    def read(self, name: str) -> Tensor:
        """The tensor, backed by a private map of the file: nothing is read before it is touched. Copy to keep it."""
        slot = self.slots[name]
        if slot.nbytes == 0:
            return torch.empty(slot.shape, dtype=slot.dtype)
        if self._map is None:
            with self.path.open("rb") as file:
                # copy-on-write, since torch has no read-only tensors
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=slot.nbytes, offset=slot.start)
        if slot.start % slot.dtype.itemsize:
            raw = raw.clone()
        return raw.view(slot.dtype).view(slot.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor flattened to [rows, last dimension], in memory of their own.

        For files larger than memory: the pages of a map would count as this process's own.
        """
        slot = self.slots[name]
        width = slot.shape[-1] if slot.shape else 1
        size = (stop - start) * width * slot.dtype.itemsize
        if not size:
            return torch.empty((stop - start, width), dtype=slot.dtype)
        handle = open_direct(self.path, os.O_RDONLY)
        try:
            raw = read_range(handle, slot.start + start * width * slot.dtype.itemsize, size)
        finally:
            os.close(handle)
        if len(raw) != size:
            raise DataError(f"{self.path}: tensor '{name}' was cut off while it was read")
        if raw.storage_offset() % slot.dtype.itemsize:
            raw = raw.clone()
        return raw.view(slot.dtype).view(stop - start, width)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"'{twice}' appears twice")
    return result


def _read_header(path: Path) -> dict[str, Slot]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or size < 8 + length:
                if len(prefix) == 8 and length > MAX_HEADER_BYTES:
                    raise DataError(f"{path}: header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
                raise DataError(f"{path}: truncated: the file ends inside its header ({size} bytes)")
            if length > MAX_HEADER_BYTES:
                raise DataError(f"{path}: header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
            raw = file.read(length)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise DataError(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    slots = {name: _slot(path, name, description, 8 + length) for name, description in header.items()}
    _check_extent(path, slots, 8 + length, size)
    return slots


def _slot(path: Path, name: str, description: Any, base: int) -> Slot:
    def refuse(what: str) -> DataError:
        return DataError(f"{path}: tensor '{name}': {what}")

    if not isinstance(description, dict):
        raise refuse("its header entry is not an object")
    dtype = _DTYPES.get(str(description.get("dtype")))
    if dtype is None:
        raise refuse(f"dtype {description.get('dtype')!r} is not supported")
    shape, offsets = _naturals(description.get("shape")), _naturals(description.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("shape or data_offsets is malformed")
    count = math.prod(shape)
    if count * dtype.itemsize != offsets[1] - offsets[0]:
        raise refuse(f"shape {shape} does not fit its {offsets[1] - offsets[0]} bytes")
    return Slot(dtype, tuple(shape), base + offsets[0], offsets[1] - offsets[0])


def _naturals(value: Any) -> list[int] | None:
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 60 for n in value):
        return value
    return None


def _check_extent(path: Path, slots: dict[str, Slot], base: int, size: int) -> None:
    """Tensors must tile the file: no gap, no overlap, no missing end."""
    end = base
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if slot.start + slot.nbytes > size:
            missing = slot.start + slot.nbytes - size
            raise DataError(f"{path}: truncated: tensor '{name}' lacks its last {missing} bytes")
        if slot.start != end:
            raise DataError(f"{path}: tensor '{name}' leaves a gap or overlaps another")
        end = slot.start + slot.nbytes
    if end != size:
        raise DataError(f"{path}: {size - end} bytes behind the last tensor")


def encode_header(listed: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file of these tensors, in this order, begins with. Names must be unique."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in listed:
        assert name not in header, name
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write a safetensors file in the order given, one tensor's copy in memory at a time. Returns its size in bytes.

    The order keeps equal input equal output, byte for byte. Names must be unique.
    """
    listed = list(tensors)
    header = encode_header((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in listed)
    with path.open("wb") as file:
        file.write(header)
        for _, tensor in listed:
            plain = tensor.detach().contiguous().cpu().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return len(header) + sum(tensor.nbytes for _, tensor in listed)
