"""Files read and written past the page cache, for what is larger than memory and touched once.

Through the cache every byte is copied once more and pushes out something that was worth keeping; a file read back from
the cache shows what memory holds and not the disk. Where a file system has no direct access, the cache is used.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 4096
"""direct access needs offsets, lengths and addresses that are multiples of this"""

_ROOM_BYTES = 16 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def open_direct(path: Path, flags: int) -> int:
    """A descriptor for `path` with direct access where there is any. Raises what `os.open` raises."""
    flags |= os.O_CLOEXEC
    if not _DIRECT:
        return os.open(path, flags, 0o644)
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)


def is_direct(handle: int) -> bool:
    """Whether reads and writes go past the page cache."""
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & _DIRECT)


def plain(handle: int) -> bool:
    """Turn direct access off; returns whether it was on."""
    before = is_direct(handle)
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~_DIRECT)
    return before


def aligned_empty(nbytes: int) -> Tensor:
    """uint8 [nbytes], not initialised, at an aligned address."""
    room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    skipped = -room.data_ptr() % ALIGNMENT
    return room[skipped : skipped + nbytes]


def read_range(handle: int, offset: int, nbytes: int) -> Tensor:
    """uint8 [nbytes or fewer], in memory of its own: the file's bytes from `offset` on, fewer where the file ends."""
    first = offset // ALIGNMENT * ALIGNMENT
    last = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
    room = aligned_empty(last - first)
    filled = read_into(handle, room, first)
    return room[offset - first : min(filled, offset - first + nbytes)]


def read_into(handle: int, room: Tensor, offset: int) -> int:
    """Fill `room`, uint8 and aligned like `offset`, as far as the file reaches; returns how many bytes were read."""
    view = room.numpy().data
    filled = 0
    while filled < len(view):
        try:
            count = os.preadv(handle, [view[filled:]], offset + filled)
        except OSError as error:
            # a file system that wants larger multiples; or what follows a short read, which need not be aligned
            if error.errno != errno.EINVAL or not plain(handle):
                raise
            continue
        if not count:
            break
        filled += count
    return filled


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes. Raises OSError."""
    room, digest, offset = aligned_empty(_ROOM_BYTES), hashlib.sha256(), 0
    handle = open_direct(path, os.O_RDONLY)
    try:
        while count := read_into(handle, room, offset):
            digest.update(room[:count].numpy().data)
            offset += count
    finally:
        os.close(handle)
    return digest.hexdigest()


def write_from(handle: int, block: Tensor, offset: int) -> None:
    """Write all of `block`, uint8 and aligned like `offset`; an unaligned end turns direct access off."""
    if len(block) % ALIGNMENT:
        plain(handle)
    view = block.numpy().data
    written = 0
    while written < len(view):
        try:
            written += os.pwrite(handle, view[written:], offset + written)
        except OSError as error:
            if error.errno != errno.EINVAL or not plain(handle):
                raise


def keep_memory() -> None:
    """Have freed blocks of up to 32 MiB stay with this process.

    The C library gives them back to the system, and faulting them in again costs more than reading a block.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(_TRIM_THRESHOLD, 1 << 30)
