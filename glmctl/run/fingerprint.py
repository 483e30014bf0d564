"""What a stage was made from and what it made, as digests: the ground on which a pipeline skips or repeats it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glmctl.errors import DataError
from glmctl.run import atomic

INPUT_FIELDS = frozenset(
    {"paths", "root", "data", "model", "models", "tokenizer", "problems", "heldout", "student", "source", "adapter"}
    | {"ask_problems", "perplexity_texts", "texts", "teacher"}
)
"""Recipe fields (at any depth) whose strings name files or folders that the stage reads."""


def digest(value: Any) -> str:
    """SHA-256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def input_files(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each existing file or folder that the recipe names, by the name it uses.

    A file counts by its content; a folder by its manifests (its own, or its export's) where it has any, else by the
    names, sizes and modification times below it. Names with `${`
    are other stages, which have a digest of their own, and names of nothing that exists are the driver's to report.
    """
    found: dict[str, str] = {}
    for text in sorted(set(_paths(recipe, inside=False))):
        path = Path(text)
        if "${" in text or not text:
            continue
        if path.is_file():
            with path.open("rb") as stream:
                found[text] = hashlib.file_digest(stream, "sha256").hexdigest()
        elif path.is_dir():
            found[text] = _manifests(path) or _listing(path)
    return found


def _manifests(folder: Path) -> str | None:
    """Digest of what the folder's manifests list, which moving or copying it does not change."""
    paths = [folder / atomic.MANIFEST]
    if not paths[0].is_file():
        paths = sorted((folder / "export").rglob(atomic.MANIFEST))
    try:
        listed = [atomic.read_manifest(path.parent) for path in paths if path.is_file()]
    except DataError:
        return None
    return digest(listed) if listed else None


def _paths(value: Any, *, inside: bool) -> Iterator[str]:
    if isinstance(value, str):
        if inside:
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, inside=inside or key in INPUT_FIELDS)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item, inside=inside)


def _listing(folder: Path) -> str:
    entries = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            status = os.stat(os.path.join(parent, name), follow_symlinks=False)
            entries.append([os.path.relpath(os.path.join(parent, name), folder), status.st_size, status.st_mtime_ns])
    return digest(entries)


def outputs(run_path: Path) -> str | None:
    """Digest of what a finished run offers to later stages, or None when a file of it is missing or has another size.

    Manifests below `export/` hold the SHA-256 of every file, so equal outputs of two runs are recognised as equal.
    A run without a manifest counts by its summary: figures of time in it make a repeated run a changed one. The
    contents are not read again: that is the check of whoever loads them.
    """
    manifests = sorted((run_path / "export").rglob(atomic.MANIFEST))
    if not manifests:
        status = run_path / "status.json"
        return digest(json.loads(status.read_text()).get("summary", {})) if status.is_file() else None
    parts = []
    for manifest in manifests:
        try:
            files = atomic.read_manifest(manifest.parent)
        except DataError:
            # said by whoever reads the folder; here it only means that the outputs are not what they were
            return None
        for name, entry in files.items():
            file = manifest.parent / name
            if not file.is_file() or file.stat().st_size != entry["size"]:
                return None
        parts.append([manifest.relative_to(run_path).as_posix(), files])
    return digest(parts)
