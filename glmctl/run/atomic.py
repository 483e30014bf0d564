"""Files and folders that are either complete or not there, whatever kills the process.

The order is always: write a temporary sibling, fsync it, rename it, fsync the folder. Folders carry a manifest with
the size and SHA-256 of every file, so damage is found before anything is read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glmctl.errors import DataError, EnvironmentProblem, RecipeError

MANIFEST = "manifest.json"

PART = "part"
"""kind of a temporary folder that its next writer continues"""

_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<kind>tmp|aside)-[0-9a-f]{12}$")
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data` in one step. EnvironmentProblem when the disk is full or failing."""
    temporary = _sibling(path, "tmp")
    with machine_errors(path, needed=len(data)):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def publish(
    folder: Path, known: Mapping[str, str] | None = None, *, continuing: str | None = None, needed: int | None = None
) -> Iterator[Path]:
    """Yield an empty temporary sibling of `folder`; at the end give it a manifest and the name `folder`.

    known: SHA-256 of large files by name, for a body that computed them; read after the body ends.
    continuing: hex digest of everything the contents follow from. What an earlier call with the same digest left
    when it was interrupted is then in the folder yielded, and is the body's to trust or not; another's is removed.
    needed: about how many bytes the body writes, for the message when the disk does not take them.

    An existing `folder` is replaced. When the body raises, the temporary folder is removed and `folder` stays as
    it was; with `continuing` it is kept unless the error says that the input is wrong. A kill leaves at most a
    temporary entry, for `remove_stale` or the continuing call.
    """
    temporary = _sibling(folder, "tmp")
    if continuing is not None:
        temporary = folder.with_name(f".{folder.name}.{PART}-{continuing[:12]}")
    with machine_errors(folder, needed):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if continuing is not None:
            for other in set(folder.parent.glob(f".{folder.name}.{PART}-*")) - {temporary}:
                shutil.rmtree(other)
            remove_stale(temporary)
        temporary.mkdir(exist_ok=continuing is not None)
        try:
            yield temporary
            _seal(temporary, known or {})
            _replace_folder(temporary, folder)
        except BaseException as error:
            if continuing is None or isinstance(error, DataError | RecipeError):
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def verify(folder: Path, only: Collection[str] | None = None, sha256: Callable[[Path], str] | None = None) -> None:
    """Check every file (or `only` some) against the folder's manifest. DataError names the first that differs.

    A file of `only` that the manifest does not list is an error too. sha256: another way of reading a file than
    `sha256_file`'s, for large ones.
    """
    hashed = sha256 or sha256_file
    listed = read_manifest(folder)
    for name in listed if only is None else only:
        if name not in listed:
            raise DataError(f"{folder / name}: not listed in {MANIFEST}")
        entry = listed[name]
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: missing, although the manifest lists it")
        size = path.stat().st_size
        if size != entry["size"]:
            raise DataError(f"{path}: {size} bytes, the manifest says {entry['size']}")
        if hashed(path) != entry["sha256"]:
            raise DataError(f"{path}: damaged (SHA-256 differs from the manifest)")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """`{file: {"size": bytes, "sha256": hex}}`; DataError when there is none or it is not one of ours."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        document = json.loads(raw.decode("utf-8"))
        files: dict[str, dict[str, Any]] = document["files"]
        body = {name: {"size": int(e["size"]), "sha256": str(e["sha256"])} for name, e in files.items()}
        intact = document["sha256"] == _digest(body)
        as_written = raw == _manifest(body)
    except FileNotFoundError:
        raise DataError(f"{path}: missing, the folder is not complete") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest ({error})") from error
    if not intact:
        raise DataError(f"{path}: damaged (its entries do not match its own SHA-256)")
    if not as_written:
        # a byte that JSON does not mind is still one that nobody wrote
        raise DataError(f"{path}: damaged (not the bytes that were written)")
    for name in body:
        if name.startswith("/") or "\0" in name or ".." in Path(name).parts:
            raise DataError(f"{path}: lists a file outside the folder: {name!r}")
    return body


def remove_stale(parent: Path) -> int:
    """Remove what a kill left half-written in `parent` and return how many entries went.

    A folder that was moved aside for a replacement that never arrived is put back. Call it under the lock of
    whoever writes here: a temporary entry of a living writer looks the same.
    """
    removed = 0
    for entry in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = _TEMPORARY.match(entry.name)
        if match is None:
            continue
        original = parent / match["name"]
        if match["kind"] == "aside" and not original.exists():
            os.rename(entry, original)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        removed += 1
    return removed


def remove(folder: Path) -> None:
    """Remove `folder` at once for whoever looks; `remove_stale` of its parent ends what a kill leaves of the work."""
    doomed = _sibling(folder, "tmp")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made if missing). EnvironmentProblem when another process has it."""
    handle = acquire_lock(path)
    try:
        yield
    finally:
        os.close(handle)


def acquire_lock(path: Path) -> int:
    """Lock `path` and return the open descriptor; closing it, or the end of the process, gives the lock back."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise EnvironmentProblem(
            f"{path.parent}: in use by another process", hint="wait for it, or choose another folder with --run"
        ) from None
    return handle


@contextmanager
def machine_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full, failing or read-only disk under `path` into EnvironmentProblem; other OSErrors pass through."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        # rmtree names an entry of a folder by its last part alone
        named = error.filename if isinstance(error.filename, str) else None
        place = path / named if named is not None and os.sep not in named else error.filename or path
        size = f" ({needed} bytes needed)" if needed is not None else ""
        raise EnvironmentProblem(f"{place}: {os.strerror(error.errno or 0)}{size}") from error


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(6)}")


def _manifest(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The file's bytes."""
    document = {"version": 1, "files": entries, "sha256": _digest(entries)}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _seal(folder: Path, known: Mapping[str, str]) -> None:
    """Flush every file to the disk and write the manifest, itself flushed last."""
    entries: dict[str, dict[str, Any]] = {}
    folders = {folder}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.add(path)
            continue
        _fsync_file(path)
        name = path.relative_to(folder).as_posix()
        entries[name] = {"size": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
    entries.pop(MANIFEST, None)
    manifest = folder / MANIFEST
    manifest.write_bytes(_manifest(entries))
    _fsync_file(manifest)
    for inner in sorted(folders, reverse=True):
        fsync_folder(inner)


def _replace_folder(temporary: Path, folder: Path) -> None:
    aside = _sibling(folder, "aside")
    exists = folder.exists()
    if exists:
        os.rename(folder, aside)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)
    if exists:
        shutil.rmtree(aside)


def _digest(entries: Mapping[str, Mapping[str, Any]]) -> str:
    text = json.dumps(entries, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
