"""Source files of one package joined in dependency order, so that a file comes after what it imports.

Spec section 2: files of one repository are concatenated, which teaches references across files.
"""

from __future__ import annotations

import ast
import heapq
import warnings
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

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


def dependency_order(files: Mapping[str, str]) -> list[str]:
    """Paths of `files` (path -> text) such that imported files come first.

    Ties, and files that import each other in a circle, go by name. Files other than Python have no known imports.
    """
    if len(files) < 2:
        return list(files)
    modules = {_module(path): path for path in sorted(files) if path.endswith(".py")}
    needs: dict[str, set[str]] = {path: set() for path in files}
    for module, path in modules.items():
        names = imported_modules(files[path], module, path.endswith("__init__.py"))
        # a package imports its parts, so counting `from . import part` as a need of the package makes only circles
        needs[path] = {modules[name] for name in names if name in modules and not f"{module}.".startswith(f"{name}.")}
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


def join(files: Mapping[str, str], limit: int) -> Iterator[tuple[str, str]]:
    """Documents of at most about `limit` characters: (path of the first file, files in dependency order, headed).

    A new document begins when the next file would pass the limit; a file longer than that stands alone.
    """
    first, size = "", 0
    parts: list[str] = []
    for path in dependency_order(files):
        text = headed(path, files[path])
        if parts and size + len(text) > limit:
            yield first, "\n".join(parts)
            parts, size = [], 0
        first = first if parts else path
        parts.append(text)
        size += len(text)
    if parts:
        yield first, "\n".join(parts)


def _module(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
