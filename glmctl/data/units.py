"""Work units: the sources of a recipe cut into pieces that are read apart, the same whatever reads them.

A unit is a few megabytes of one source: some files, a range of lines of a large file, some row groups of a Parquet
file, some packages of a source tree. A source with `max_bytes` is one unit, because where it ends depends on all that
comes before; so is a packed file, which can only be read from its start. Units are in the order of the documents.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from glmctl.data.reading import PACKED
from glmctl.errors import DataError, EnvironmentProblem, RecipeError, unknown

if TYPE_CHECKING:
    from glmctl.recipe.schema import (
        ConversationsSource,
        JsonLinesSource,
        ParquetSource,
        RepositoryHistory,
        Source,
        SourceTree,
        TextSource,
    )

    FileSource = TextSource | JsonLinesSource | ParquetSource | ConversationsSource | RepositoryHistory

UNIT_BYTES = 8 * 1024 * 1024
PACKED_GROWTH = 3
"""how much a packed file is taken to grow, for progress only"""
_INTERPRETER = {"stdlib": "stdlib", "packages": "purelib"}
"""word behind `python:` -> sysconfig's name of the folder"""


@dataclass(frozen=True)
class Span:
    """A file, or a part of it: bytes `start` ... `stop` that begin with line `first`, or row groups, or all (None)."""

    path: str
    start: int = 0
    stop: int | None = None
    first: int = 1
    members: tuple[str, ...] = ()
    """the files of a group of a source tree, `path` then being the group's name"""


@dataclass(frozen=True)
class Unit:
    """One piece of one source."""

    source: int
    """its place in the recipe's list"""
    spans: tuple[Span, ...]
    size: int
    """about how many bytes of text it holds"""


@dataclass(frozen=True)
class SourceFile:
    """A file that the data depends on, as the manifest names it."""

    path: str
    size: int
    sha256: str


def plan(sources: Sequence[Source], unit_bytes: int | None = None) -> list[Unit]:
    """The units of all sources, in order, of about `unit_bytes` each. RecipeError for a path that does not exist."""
    unit_bytes = UNIT_BYTES if unit_bytes is None else unit_bytes
    return [unit for place, source in enumerate(sources) for unit in _plan_source(place, source, unit_bytes)]


def fingerprint(sources: Sequence[Source]) -> list[list[SourceFile]]:
    """Size and SHA-256 of every file behind each source; none for what ships with glmctl or comes from the network."""
    return [[fingerprint_file(path) for path in _behind(source)] for source in sources]


def fingerprint_file(path: Path) -> SourceFile:
    """A file's size and SHA-256. RecipeError when there is none."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    with _open(path) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return SourceFile(str(path), path.stat().st_size, digest)


def files_of(paths: Sequence[str]) -> list[Path]:
    """Files that `paths` (files, folders, glob patterns, `python:`... as `located` has it) name: by list, then name."""
    found: list[Path] = []
    for name in paths:
        path = located(name)
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise RecipeError(f"{name}: no such file or folder")
            found += [p for p in matches if p.is_file()]
    return found


def located(name: str) -> Path:
    """The path that a source names: as it stands, or below this interpreter's `python:stdlib` or `python:packages`.

    So a recipe can name text that is at hand wherever glmctl is installed: `python:packages/numpy`. RecipeError for
    another word behind `python:`.
    """
    if not name.startswith("python:"):
        return Path(name).expanduser()
    place, _, rest = name.removeprefix("python:").partition("/")
    if place not in _INTERPRETER:
        raise unknown("folder of the interpreter", place, _INTERPRETER, where=name)
    return Path(sysconfig.get_path(_INTERPRETER[place])) / rest


def tree_root(root: str) -> Path:
    """The folder that a source tree names. RecipeError when there is none."""
    path = located(root)
    if not path.is_dir():
        raise RecipeError(f"{root}: no such folder")
    return path


def tree_groups(source: SourceTree, root: Path) -> dict[str, list[str]]:
    """Group -> relative paths. A group is a top folder; a loose file is its own, unless the root is a package."""
    groups: dict[str, list[str]] = {}

    def excluded(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in source.exclude)

    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not excluded(name) and not name.startswith("."))
        for name in sorted(names):
            if excluded(name) or not any(fnmatch(name, pattern) for pattern in source.include):
                continue
            path = (Path(folder) / name).relative_to(root).as_posix()
            loose = "/" not in path and not (root / "__init__.py").is_file()
            groups.setdefault(path if loose else path.split("/")[0] if "/" in path else ".", []).append(path)
    # by hash of the name, so that a limit on bytes takes a fair sample of the tree
    return {key: groups[key] for key in sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())}


def _plan_source(place: int, source: Source, unit_bytes: int) -> Iterator[Unit]:
    if source.type == "bundled":
        size = 1_300_000 if source.text == "jargon-file" else 700_000
        yield Unit(place, (Span(source.text),), min(size, source.max_bytes or size))
        return
    if source.type == "retrieval":
        mean = sum(source.characters) // 2
        step = source.documents if source.max_bytes is not None else max(1, unit_bytes // mean)
        for first in range(0, source.documents, step):
            last = min(first + step, source.documents)
            yield Unit(place, (Span("retrieval", first, last),), (last - first) * mean)
        return
    if source.type == "huggingface":
        yield Unit(place, (Span(source.dataset),), source.max_bytes or unit_bytes)
        return
    spans = list(_tree_spans(source) if source.type == "source_tree" else _file_spans(source, unit_bytes))
    whole = source.max_bytes is not None or source.type == "repository_history"
    group: list[Span] = []
    size = 0
    for span, bytes_ in spans:
        if group and not whole and size + bytes_ > unit_bytes:
            yield Unit(place, tuple(group), size)
            group, size = [], 0
        group.append(span)
        size += bytes_
    if group:
        yield Unit(place, tuple(group), min(size, source.max_bytes or size))


def _tree_spans(source: SourceTree) -> Iterator[tuple[Span, int]]:
    root = tree_root(source.root)
    for key, paths in tree_groups(source, root).items():
        yield Span(key, members=tuple(paths)), sum((root / path).stat().st_size for path in paths)


def _file_spans(source: FileSource, unit_bytes: int) -> Iterator[tuple[Span, int]]:
    for path in files_of(source.paths):
        size = path.stat().st_size
        if source.type == "parquet":
            yield from _row_groups(path)
        elif path.suffix in PACKED:
            yield Span(str(path)), size * PACKED_GROWTH
        elif source.type == "text" or size <= unit_bytes or source.max_bytes is not None:
            yield Span(str(path)), size
        else:
            yield from _line_ranges(path, unit_bytes)


def _line_ranges(path: Path, unit_bytes: int) -> Iterator[tuple[Span, int]]:
    """Ranges of about `unit_bytes` that end with a line."""
    start, first = 0, 1
    with _open(path) as stream:
        while block := stream.read(unit_bytes):
            lines = block.count(b"\n")
            if not block.endswith(b"\n"):
                while rest := stream.readline(1 << 20):
                    if rest.endswith(b"\n"):
                        lines += 1
                        break
            stop = stream.tell()
            yield Span(str(path), start, stop, first), stop - start
            start, first = stop, first + lines


def _row_groups(path: Path) -> Iterator[tuple[Span, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.ParquetFile(path).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {error}") from error
    row = 1
    for group in range(about.num_row_groups):
        part = about.row_group(group)
        yield Span(str(path), group, group + 1, row), part.total_byte_size
        row += part.num_rows


def _behind(source: Source) -> list[Path]:
    if source.type == "bundled" or source.type == "huggingface" or source.type == "retrieval":
        return []
    if source.type == "source_tree":
        root = tree_root(source.root)
        return [root / path for paths in tree_groups(source, root).values() for path in paths]
    files = files_of(source.paths)
    if source.type == "repository_history" and source.root is not None:
        files += files_of([str(tree_root(source.root))])
    return files


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except PermissionError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from error
