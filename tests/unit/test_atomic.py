"""Atomic files and folders: complete or absent, and damage is found by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from glmctl.errors import DataError, EnvironmentProblem
from glmctl.run import atomic


def published(parent: Path, name: str = "out", **files: str) -> Path:
    folder = parent / name
    with atomic.publish(folder) as temporary:
        for file, text in (files or {"a.txt": "alpha", "b.txt": "beta"}).items():
            (temporary / file).write_text(text)
    return folder


def write_half(folder: Path) -> None:
    (folder / "a.txt").write_text("half")
    (folder / "absent").read_text()


def test_a_published_folder_verifies_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = published(tmp_path)
    atomic.verify(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "b.txt", "manifest.json"]
    assert list(tmp_path.iterdir()) == [folder]
    entry = atomic.read_manifest(folder)["a.txt"]
    assert entry == {"size": 5, "sha256": atomic.sha256_file(folder / "a.txt")}


def test_nested_files_are_in_the_manifest(tmp_path: Path) -> None:
    with atomic.publish(tmp_path / "out") as temporary:
        (temporary / "deep" / "er").mkdir(parents=True)
        (temporary / "deep" / "er" / "x").write_bytes(b"x")
    assert list(atomic.read_manifest(tmp_path / "out")) == ["deep/er/x"]
    (tmp_path / "out" / "deep" / "er" / "x").write_bytes(b"y")
    with pytest.raises(DataError, match="deep/er/x: damaged"):
        atomic.verify(tmp_path / "out")


def test_a_failing_body_leaves_the_earlier_folder_untouched(tmp_path: Path) -> None:
    folder = published(tmp_path)
    before = atomic.read_manifest(folder)
    with pytest.raises(FileNotFoundError), atomic.publish(folder) as temporary:
        write_half(temporary)
    atomic.verify(folder)
    assert atomic.read_manifest(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_publishing_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    published(tmp_path)
    folder = published(tmp_path, **{"c.txt": "gamma"})
    assert sorted(p.name for p in folder.iterdir()) == ["c.txt", "manifest.json"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "delete", "manifest", "no manifest"])
def test_verify_names_what_is_damaged(tmp_path: Path, damage: str) -> None:
    folder = published(tmp_path)
    file = folder / "b.txt"
    if damage == "flip":
        file.write_bytes(b"beto")
    elif damage == "truncate":
        file.write_bytes(b"bet")
    elif damage == "extend":
        file.write_bytes(b"beta!")
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        file = folder / "manifest.json"
        file.write_text(file.read_text().replace('"size": 4', '"size": 5'))
    else:
        file = folder / "manifest.json"
        file.unlink()
    with pytest.raises(DataError) as caught:
        atomic.verify(folder)
    assert str(file) in caught.value.message


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path)
    entries = {name: {"size": 1, "sha256": "0" * 64}}
    (folder / "manifest.json").write_bytes(atomic._manifest(entries))
    with pytest.raises(DataError, match="outside the folder"):
        atomic.verify(folder)


@pytest.mark.parametrize(("old", "new"), [(b"}\n", b"}\n "), (b"  ", b"\t "), (b"\n", b"\r\n"), (b": 1,", b": 0,")])
def test_a_byte_that_json_does_not_mind_is_damage_too(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = published(tmp_path)
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(DataError, match="damaged"):
        atomic.verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"files": 3}', '{"files": {"a": 1}}', "\x00\xff"])
def test_a_manifest_that_is_not_one_is_a_data_error(tmp_path: Path, text: str) -> None:
    folder = published(tmp_path)
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="manifest"):
        atomic.verify(folder)


def test_stale_entries_go_and_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    kept = published(tmp_path, "kept")
    (tmp_path / ".kept.aside-0123456789ab").mkdir()  # the replacement arrived: this one is the old
    aside = tmp_path / ".lost.aside-0123456789ab"  # the replacement never arrived
    aside.mkdir()
    (aside / "x").write_text("x")
    (tmp_path / ".new.tmp-0123456789ab").mkdir()
    (tmp_path / ".file.json.tmp-0123456789ab").write_text("half")
    (tmp_path / ".lock").write_text("")
    assert atomic.remove_stale(tmp_path) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "kept", "lost"]
    assert (tmp_path / "lost" / "x").read_text() == "x"
    atomic.verify(kept)
    assert atomic.remove_stale(tmp_path / "absent") == 0


def test_order_on_disk_is_files_then_rename_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}

    def fsync(handle: int) -> None:
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        real["fsync"](handle)

    def moved(kind: str) -> Any:
        def call(old: Path, new: Path) -> None:
            events.append(("rename", Path(new).name))
            real[kind](old, new)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", moved("rename"))
    monkeypatch.setattr(os, "replace", moved("replace"))
    published(tmp_path)
    at = events.index(("rename", "out"))
    synced = [name for kind, name in events[:at] if kind == "fsync"]
    assert synced[:3] == ["a.txt", "b.txt", "manifest.json"]
    assert synced[3].startswith(".out.tmp-")
    assert events[at + 1] == ("fsync", tmp_path.name)
    events.clear()
    atomic.write_text(tmp_path / "f", "x")
    assert [kind for kind, _ in events] == ["fsync", "rename", "fsync"]
    assert events[-1] == ("fsync", tmp_path.name)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_is_an_environment_problem_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    file = tmp_path / "f.json"
    atomic.write_json(file, {"old": 1})

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(EnvironmentProblem) as caught:
        atomic.write_json(file, {"new": 2})
    assert caught.value.exit_code == 4
    assert str(file) in caught.value.message
    assert "bytes needed" in caught.value.message
    with pytest.raises(EnvironmentProblem):
        published(tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_text()) == {"old": 1}


def test_a_lock_is_exclusive_and_comes_back(tmp_path: Path) -> None:
    with (
        atomic.locked(tmp_path / ".lock"),
        pytest.raises(EnvironmentProblem, match="in use"),
        atomic.locked(tmp_path / ".lock"),
    ):
        pass
    with atomic.locked(tmp_path / ".lock"):
        pass


def test_json_refuses_numbers_that_are_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        atomic.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def interrupted(folder: Path, key: str, error: BaseException) -> None:
    """Write a file and half of another, then fail; the names that were there at the start."""
    with atomic.publish(folder, continuing=key) as temporary:
        error.add_note(",".join(sorted(path.name for path in temporary.iterdir())))
        (temporary / "a.txt").write_text("alpha")
        (temporary / ".b.txt.tmp-0123456789ab").write_text("half")
        raise error


def test_a_continued_folder_keeps_what_was_written_until_the_input_is_wrong(tmp_path: Path) -> None:
    """Interrupted: kept for the same digest, removed for another; refused input: nothing stays."""
    folder, key = tmp_path / "out", "a" * 64
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder, key, KeyboardInterrupt())
    assert not folder.exists()
    with pytest.raises(EnvironmentProblem) as caught:
        interrupted(folder, key, EnvironmentProblem("the disk is full"))
    assert caught.value.__notes__ == ["a.txt"], "what was half-written is gone"
    with pytest.raises(DataError) as refused:
        interrupted(folder, "b" * 64, DataError("the input is wrong"))
    assert refused.value.__notes__ == [""], "another input starts from nothing"
    assert list(tmp_path.iterdir()) == []
    with atomic.publish(folder, continuing=key) as temporary:
        (temporary / "a.txt").write_text("alpha")
    atomic.verify(folder)
    assert list(tmp_path.iterdir()) == [folder]
