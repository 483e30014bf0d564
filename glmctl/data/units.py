"""Work units: the sources of a recipe cut into pieces that are read apart, the same whatever reads them.

A unit is a few megabytes of one source: some files, a range of lines of a large file, some row groups of a Parquet
file, some repositories of a source tree. A source with `max_bytes` is one unit, because where it ends depends on all
that comes before; so is a packed file, which can only be read from its start. Units are in the order of the documents.
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
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from glmctl.data.hub import is_on_hub
from glmctl.data.reading import PACKED, open_parquet
from glmctl.errors import EnvironmentProblem, RecipeError, unknown

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
REPOSITORY_BYTES = 64 * 1024 * 1024
"""a larger repository is read, and made into contexts, in parts of whole folders"""
ROOT_MARKS = (".git", "pyproject.toml", "setup.py", "package.json", "go.mod", "Cargo.toml", "__init__.py")
"""a folder with one of them is a repository"""
LOOSE = "."
"""the repository of a whole tree, or of the files beside its folders"""
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
    """the files of a repository, `path` then being its name"""


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
    """of a data set of the hub `hf://datasets/NAME@COMMIT`, which names its content"""
    size: int
    """bytes; 0 for a data set of the hub"""
    sha256: str
    """hex; empty for a data set of the hub"""


def plan(sources: Sequence[Source], unit_bytes: int | None = None) -> list[Unit]:
    """The units of all sources, in order, of about `unit_bytes` each. RecipeError for a path that does not exist."""
    unit_bytes = UNIT_BYTES if unit_bytes is None else unit_bytes
    return [unit for place, source in enumerate(sources) for unit in _plan_source(place, source, unit_bytes)]


def fingerprint(sources: Sequence[Source]) -> list[list[SourceFile]]:
    """Size and SHA-256 of every file behind each source, none for what ships with glmctl; the commit of a data set of
    the hub, whose source is `hub.pinned`.
    """
    return [
        [SourceFile(f"hf://datasets/{source.dataset}@{source.revision}", 0, "")]
        if source.type == "huggingface" and is_on_hub(source)
        else [fingerprint_file(path) for path in _behind(source)]
        for source in sources
    ]


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
            found += sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise RecipeError(f"{name}: no such file or folder")
            found += [p for p in matches if p.is_file()]
    return found


def _is_hidden(path: Path) -> bool:
    """Whether a part of a path below a source's folder begins with a dot: `.git`, a download's `.cache`."""
    return any(part.startswith(".") for part in path.parts)


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


def repositories(source: SourceTree, root: Path) -> dict[str, list[str]]:
    """Repository -> relative paths of its files, which the plan and the contexts keep together.

    The root is one repository, or each folder below it with one more of the files beside them, as `source.repositories`
    says: `auto` is the root when it holds one of `ROOT_MARKS`. Without `repo_level` a loose file is its own.
    """
    marked = any((root / mark).exists() for mark in ROOT_MARKS)
    one = source.repo_level and (source.repositories == "root" or (source.repositories == "auto" and marked))
    found: dict[str, list[str]] = {}
    for path in _tree_files(source, root):
        folder, _, below = path.partition("/")
        found.setdefault(LOOSE if one else folder if below else LOOSE if source.repo_level else path, []).append(path)
    # by hash of the name, so that a limit on bytes takes a fair sample of the tree
    return {key: found[key] for key in sorted(found, key=lambda key: hashlib.sha256(key.encode()).digest())}


def _tree_files(source: SourceTree, root: Path) -> Iterator[str]:
    """Relative paths of the files that `source` names, folder by folder; among them links that lead nowhere."""

    def excluded(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in source.exclude)

    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not excluded(name) and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if excluded(name) or not any(fnmatch(name, pattern) for pattern in source.include):
                continue
            if path.is_file() or not path.exists():  # no pipes: they would never end
                yield path.relative_to(root).as_posix()


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
    for key, paths in repositories(source, root).items():
        sizes = [(path, (root / path).stat().st_size if (root / path).is_file() else 0) for path in paths]
        parts = list(_cut_by_folders(sizes))
        for number, part in enumerate(parts, start=1):
            name = key if len(parts) == 1 else f"{key}, part {number}"
            yield Span(name, members=tuple(path for path, _ in part)), sum(size for _, size in part)


def _cut_by_folders(files: Sequence[tuple[str, int]], depth: int = 0) -> Iterator[list[tuple[str, int]]]:
    """(path, size) of a repository in parts of at most `REPOSITORY_BYTES`; a folder that fits one is in one."""
    part: list[tuple[str, int]] = []
    held = 0

    def stem(file: tuple[str, int]) -> tuple[str, ...]:
        return tuple(file[0].split("/")[: depth + 1])

    for _, group in groupby(files, key=stem):
        members = list(group)
        size = sum(size for _, size in members)
        if part and held + size > REPOSITORY_BYTES:
            yield part
            part, held = [], 0
        if size > REPOSITORY_BYTES and len(members) > 1:
            yield from _cut_by_folders(members, depth + 1)
            continue
        part += members
        held += size
    if part:
        yield part


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
    with open_parquet(path) as file:
        about = file.metadata
    row = 1
    for group in range(about.num_row_groups):
        part = about.row_group(group)
        yield Span(str(path), group, group + 1, row), part.total_byte_size
        row += part.num_rows


def _behind(source: Source) -> list[Path]:
    if source.type == "bundled" or source.type == "retrieval":
        return []
    if source.type == "huggingface":
        return files_of([source.dataset])
    if source.type == "source_tree":
        root = tree_root(source.root)
        found = [root / path for paths in repositories(source, root).values() for path in paths]
        return [path for path in found if path.is_file()]
    files = files_of(source.paths)
    if source.type == "repository_history" and source.root is not None:
        files += files_of([str(tree_root(source.root))])
    return files


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except PermissionError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from error
