"""The file that is hashed, written and read back while it grows, and direct access to the disk below it."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glmctl.convert import checked_file
from glmctl.convert.checked_file import CheckedFile
from glmctl.errors import EnvironmentProblem
from glmctl.model import direct

CHUNK = 2 * direct.ALIGNMENT


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked_file, "CHUNK_BYTES", CHUNK)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On a disk, and where the files lie in memory and direct access is often refused."""
    if request.param == "disk":
        yield tmp_path
        return
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no file system in memory here")
    path = shared / f"glmctl-test-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def blocks(seed: int, total: int) -> list[bytes]:
    draw = random.Random(seed)
    data = draw.randbytes(total)
    cuts = sorted(draw.randrange(total + 1) for _ in range(7))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def write_much(file: CheckedFile) -> None:
    """Far more than fits between the threads: none may wait for ever."""
    for _ in range(200):
        file.write(bytes(CHUNK))


@pytest.mark.parametrize("total", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 37 * CHUNK + 4097])
def test_what_is_written_lies_on_the_disk_with_its_hash(folder: Path, total: int) -> None:
    pieces = blocks(total, total)
    path = folder / "f"
    file = CheckedFile(path)
    for i, piece in enumerate(pieces):
        file.write(piece if i % 2 or not piece else torch.frombuffer(bytearray(piece), dtype=torch.uint8))
    digest = file.close()
    assert path.read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()


@pytest.mark.parametrize("at", [0, 1, 20])
def test_a_full_disk_in_the_middle_ends_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real, calls = os.pwrite, 0

    def full(handle: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    file = CheckedFile(tmp_path / "f")
    with pytest.raises(OSError, match="No space left"):
        write_much(file)
    file.abandon()


def test_bytes_that_change_on_the_disk_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a file, where the reading back is direct."""
    real = direct.read_into

    def rotten(handle: int, room: torch.Tensor, offset: int) -> int:
        count = real(handle, room, offset)
        if offset == 3 * CHUNK:
            room[17] ^= 1
        return count

    monkeypatch.setattr(checked_file, "read_into", rotten)
    file = CheckedFile(tmp_path / "f")
    with pytest.raises(EnvironmentProblem, match="read back other bytes"):
        write_much(file)
    file.abandon()


def test_any_range_of_a_file_is_read_and_no_more_than_there_is(folder: Path) -> None:
    data = random.Random(0).randbytes(3 * direct.ALIGNMENT + 123)
    (folder / "f").write_bytes(data)
    handle = direct.open_direct(folder / "f", os.O_RDONLY)
    try:
        for offset, count in [(0, 1), (1, 4095), (4095, 2), (4096, 4096), (5000, 9000), (12_400, 500), (20_000, 5)]:
            found = direct.read_range(handle, offset, count)
            assert bytes(found.numpy().data) == data[offset : offset + count]
    finally:
        os.close(handle)


@pytest.mark.parametrize("size", [0, 1, direct.ALIGNMENT, 5 * direct.ALIGNMENT + 3])
def test_the_hash_of_a_file_is_that_of_its_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(direct, "_ROOM_BYTES", CHUNK)
    data = random.Random(size).randbytes(size)
    (folder / "f").write_bytes(data)
    assert direct.sha256_file(folder / "f") == hashlib.sha256(data).hexdigest()


def test_without_direct_access_the_same_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_DIRECT", 0)
    file = CheckedFile(tmp_path / "f")
    for piece in (data := blocks(5, 9 * CHUNK + 5)):
        file.write(piece)
    assert file.close() == hashlib.sha256(b"".join(data)).hexdigest()
    assert (tmp_path / "f").read_bytes() == b"".join(data)
