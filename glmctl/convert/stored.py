"""Tensors that lie on disk, read a few rows at a time: what every conversion is composed of.

A conversion never holds a model, nor even a whole tensor: GLM-4.5's embedding alone is 1.5 GB. Reading, casting,
stacking, slicing and quantising are all functions of rows, so they compose as views over files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from glmctl.model.tensor_file import TensorFile

BLOCK_BYTES = 16 << 20
"""about as much of one tensor as is in memory at once"""
ROW_MULTIPLE = 128
"""blocks begin at a multiple of this many rows, the height of an FP8 scale block"""

ReadRows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor of `shape` and `dtype` whose rows are read on demand.

    Rows are the tensor with all dimensions but the last flattened; a vector is one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: ReadRows
    """(start, stop) -> [stop - start, width], in memory of its own"""

    @property
    def width(self) -> int:
        """Length of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """The rows in order, about BLOCK_BYTES at a time."""
        step = max(1, BLOCK_BYTES // max(1, self.width * self.dtype.itemsize))
        step = step // ROW_MULTIPLE * ROW_MULTIPLE or step
        for start in range(0, self.rows, step):
            yield self.read_rows(start, min(start + step, self.rows))

    def whole(self) -> Tensor:
        """All of it, in its shape."""
        return self.read_rows(0, self.rows).reshape(self.shape)


def from_file(file: TensorFile, name: str) -> Stored:
    """A tensor of a safetensors file."""
    slot = file.slots[name]
    return Stored(slot.shape, slot.dtype, lambda start, stop: file.read_rows(name, start, stop))


def from_tensor(tensor: Tensor) -> Stored:
    """A small tensor that is in memory."""
    rows_NW = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return Stored(tuple(tensor.shape), tensor.dtype, lambda start, stop: rows_NW[start:stop].clone())


def missing(shape: tuple[int, ...]) -> Stored:
    """A tensor of which only the shape matters; it has no rows to read."""

    def read(start: int, stop: int) -> Tensor:
        raise AssertionError("only its shape exists")

    return Stored(shape, torch.float32, read)


def mapped(
    source: Stored, change: Callable[[Tensor], Tensor], dtype: torch.dtype, *, width: int | None = None
) -> Stored:
    """`change` applied to any set of rows [n, width of source] -> [n, width], which must not depend on the others."""
    shape = source.shape if width is None else (*source.shape[:-1], width)
    return Stored(shape, dtype, lambda start, stop: change(source.read_rows(start, stop)))


def cast(source: Stored, dtype: torch.dtype) -> Stored:
    """The same numbers, rounded to `dtype`."""
    return source if source.dtype == dtype else mapped(source, lambda rows: rows.to(dtype), dtype)


def section(source: Stored, first_row: int, shape: tuple[int, ...]) -> Stored:
    """The rows from `first_row` on that `shape` needs, as a tensor of that shape."""
    part = Stored(shape, source.dtype, lambda a, b: source.read_rows(first_row + a, first_row + b))
    assert shape[-1] == source.width, "a section has the width of its source"
    assert 0 <= first_row <= first_row + part.rows <= source.rows, "a section lies inside its source"
    return part


def concatenated(parts: Sequence[Stored], shape: tuple[int, ...]) -> Stored:
    """The rows of all parts, one after the other, as a tensor of `shape`."""
    dtype = parts[0].dtype
    assert all(part.dtype == dtype and part.width == shape[-1] for part in parts), "parts differ in dtype or width"
    starts = [0, *accumulate(part.rows for part in parts)]
    assert starts[-1] == math.prod(shape[:-1]), "the parts do not add up to the shape"

    def read(start: int, stop: int) -> Tensor:
        pieces: list[Tensor] = []
        index = bisect_right(starts, start) - 1
        while start < stop:
            here = min(stop, starts[index + 1])
            pieces.append(parts[index].read_rows(start - starts[index], here - starts[index]))
            start, index = here, index + 1
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Stored(shape, dtype, read)


def equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), "compare shapes and dtypes first"
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a.blocks(), b.blocks(), strict=True)
    )
