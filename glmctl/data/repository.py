"""Source files of one package joined in dependency order, so that a file comes after what it imports.

Spec section 2: files of one repository are concatenated, which teaches references across files.
"""

from __future__ import annotations

import ast
import heapq
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath

_COMMENT = {
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".swift"), "//"),
    **dict.fromkeys((".sql", ".lua", ".hs"), "--"),
}


_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def headed(path: str, text: str) -> str:
    """The file's text under a comment that gives its path."""
    return f"{_COMMENT.get(PurePosixPath(path).suffix, '#')} {path}\n{text}"


def imported_modules(text: str, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names that a Python source may import; empty when it does not parse.

    `from a import b` gives both `a` and `a.b`, since `b` may be a module. Relative names count from `module`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:  # statements only: walking expressions too takes four times as long and finds nothing
        node = pending.pop()
        for block in _BLOCKS:
            pending += getattr(node, block, ())
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.update((stem, *(f"{stem}.{alias.name}".strip(".") for alias in node.names)))
    return found


def dependency_order(files: Mapping[str, str], root: Path | None = None) -> list[str]:
    """Paths of `files` (path -> text) such that imported files come first.

    Ties, and files that import each other in a circle, go by name. Files other than Python have no known imports.
    `root` is the folder that the paths are below: it may itself be a package, and knows packages whose `__init__.py` is
    not among the files.
    """
    if len(files) < 2:
        return list(files)

    @cache
    def is_package(folder: PurePosixPath) -> bool:
        marker = folder / "__init__.py"
        return str(marker) in files or (root is not None and (root / marker).is_file())

    above = _packages(root) if root is not None else []
    modules = {path: _module(path, above) for path in sorted(files) if path.endswith(".py")}
    importable = _importable(modules, is_package)
    needs: dict[str, set[str]] = {path: set() for path in files}
    for path, module in modules.items():
        names = imported_modules(files[path], module, path.endswith("__init__.py"))
        found = {_meant(importable.get(name, ()), path) for name in names}
        # a package imports its parts, so counting `from . import part` as a need of the package makes only circles
        needs[path] = {other for other in found if other and not f"{module}.".startswith(f"{modules[other]}.")}
    users: dict[str, list[str]] = {path: [] for path in files}
    for path, others in needs.items():
        for other in others:
            users[other].append(path)

    waiting = {path: len(others) for path, others in needs.items()}
    ready = sorted(path for path, count in waiting.items() if not count)
    rest = iter(sorted(files))
    done: set[str] = set()
    order: list[str] = []
    while len(order) < len(files):
        if not ready:  # a circle: let the first by name go ahead
            ready = [next(path for path in rest if path not in done)]
        path = heapq.heappop(ready)
        if path in done:
            continue
        done.add(path)
        order.append(path)
        for user in users[path]:
            waiting[user] -= 1
            if waiting[user] == 0 and user not in done:
                heapq.heappush(ready, user)
    return order


def join(files: Mapping[str, str], limit: int, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Documents of at most about `limit` characters: (path of the first file, files in dependency order, headed).

    A new document begins when the next file would pass the limit; a file longer than that stands alone. `root` as for
    `dependency_order`.
    """
    first, size = "", 0
    parts: list[str] = []
    for path in dependency_order(files, root):
        text = headed(path, files[path])
        if parts and size + len(text) > limit:
            yield first, "\n".join(parts)
            parts, size = [], 0
        first = first if parts else path
        parts.append(text)
        size += len(text)
    if parts:
        yield first, "\n".join(parts)


def _module(path: str, above: Sequence[str] = ()) -> str:
    """The dotted name of a file below the packages `above`."""
    parts = [*above, *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _packages(folder: Path) -> list[str]:
    """Names of the packages that `folder` is inside of, itself included, outermost first."""
    found: list[str] = []
    folder = Path(os.path.abspath(folder))  # not resolved: a link has the name that imports use
    while folder.name and (folder / "__init__.py").is_file():
        found.insert(0, folder.name)
        folder = folder.parent
    return found


def _importable(
    modules: Mapping[str, str], is_package: Callable[[PurePosixPath], bool]
) -> dict[str, list[tuple[str, str]]]:
    """Name in an import -> (folder on Python's path, file) of each file that it may mean, given path -> full name.

    Any folder around the outermost package may be on Python's path: `src/pkg/a.py` is `src.pkg.a` or `pkg.a`.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for path, module in modules.items():
        names = {module: ""}
        for folder in takewhile(lambda folder: not is_package(folder), reversed(PurePosixPath(path).parents)):
            names.setdefault(_module(str(PurePosixPath(path).relative_to(folder))), str(folder))
        for name, top in names.items():
            found.setdefault(name, []).append((top, path))
    return found


def _meant(candidates: Sequence[tuple[str, str]], importer: str) -> str | None:
    """The file that an import in `importer` means: below the nearest folder around both, or the only one."""
    around = [(len(top), path) for top, path in candidates if not top or importer.startswith(f"{top}/")]
    if around:
        return max(around)[1]
    return candidates[0][1] if len(candidates) == 1 else None
