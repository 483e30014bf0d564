"""How the source files of a repository refer to each other, and the order in which a file follows what it needs.

Spec section 2: files of one repository are concatenated, which teaches references across files. Links are read file by
file and resolved once it is known which files stay.
"""

from __future__ import annotations

import ast
import heapq
import os
import posixpath
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

_C = (".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh")
_SCRIPTS = (".js", ".mjs", ".cjs", ".jsx", ".ts", ".mts", ".cts", ".tsx")
_COMMENT = {
    **dict.fromkeys((*_C, *_SCRIPTS, ".java", ".go", ".rs", ".swift"), "//"),
    **dict.fromkeys((".sql", ".lua", ".hs"), "--"),
}
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
# in angle brackets only with a folder: `<string.h>` is the system's, whatever file of that name there is
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+/[^>\n]+)>)', re.MULTILINE)
_SCRIPT_IMPORT = re.compile(r"""\b(?:from|import|require\s*\(|(import\s*\())\s*['"](\.{1,2}/[^'"\n]*)['"]""")

Graph = Mapping[str, Collection[str]]
"""path -> paths that it refers to"""


@dataclass(frozen=True)
class Links:
    """What a file refers to, and the names by which others may refer to it."""

    names: tuple[tuple[str, str], ...] = ()
    """(name, the folder it counts from): `src/pkg/a.py` is `src.pkg.a`, and `pkg.a` from `src`"""
    needs: tuple[str, ...] = ()
    """names that it cannot be loaded without"""
    mentions: tuple[str, ...] = ()
    """names that it uses later than that: in a function, or for type checkers only"""


def header(path: str) -> str:
    """The comment line that gives a file's path."""
    return f"{_COMMENT.get(PurePosixPath(path).suffix.lower(), '#')} {path}\n"


def headed(path: str, text: str) -> str:
    """The file's text under a comment that gives its path."""
    return header(path) + text


# ------------------------------------------------------------------ links of one file


class Linker:
    """Reads the links of files whose paths are below `root`.

    The root may itself be a package. A folder is a package when it has an `__init__.py` on disk, or among `known`.
    """

    def __init__(self, root: Path | None, known: Collection[str] = ()) -> None:
        self._root = root
        self._known = known
        self._above = _packages(root) if root is not None else []
        self._found: dict[PurePosixPath, bool] = {}

    def links(self, path: str, text: str) -> Links:
        """The links of one file: Python imports, includes of the C family, relative imports of JavaScript."""
        suffix = PurePosixPath(path).suffix.lower()
        if suffix == ".py":
            module = _module(path, self._above)
            needs, mentions = imported_modules(text, module, PurePosixPath(path).name == "__init__.py")
            return Links(tuple(self._importable(path, module)), tuple(sorted(needs)), tuple(sorted(mentions)))
        if suffix in _C:
            return _c_links(path, text)
        return _script_links(path, text) if suffix in _SCRIPTS else Links()

    def _importable(self, path: str, module: str) -> Iterator[tuple[str, str]]:
        """Any folder around the outermost package may be on Python's path."""
        names = {module: ""}
        for folder in takewhile(lambda folder: not self._is_package(folder), reversed(PurePosixPath(path).parents)):
            names.setdefault(_module(str(PurePosixPath(path).relative_to(folder))), str(folder))
        yield from names.items()

    def _is_package(self, folder: PurePosixPath) -> bool:
        if folder not in self._found:
            marker = folder / "__init__.py"
            on_disk = self._root is not None and (self._root / marker).is_file()
            self._found[folder] = on_disk or str(marker) in self._known
        return self._found[folder]


def imported_modules(text: str, module: str, is_package: bool) -> tuple[set[str], set[str]]:
    """Absolute dotted names that a Python source imports: (when it is loaded, later or for type checkers only).

    Both are empty when it does not parse. `from a import b` gives both `a` and `a.b`, since `b` may be a module.
    Relative names count from `module`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: tuple[set[str], set[str]] = (set(), set())
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:  # statements only: walking expressions too takes four times as long and finds nothing
        node, later = pending.pop()
        for block in _BLOCKS:
            inside = later or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            inside = inside or (block == "body" and isinstance(node, ast.If) and _for_type_checkers(node.test))
            pending += [(child, inside) for child in getattr(node, block, ())]
        if isinstance(node, ast.Import):
            found[later].update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found[later].update((stem, *(f"{stem}.{alias.name}".strip(".") for alias in node.names)))
    return found[0], found[1] - found[0]


def _for_type_checkers(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"


def _c_links(path: str, text: str) -> Links:
    """A header has a name from every folder around it: any of them may be searched for includes."""
    parts = path.split("/")
    names = tuple((f"include:{'/'.join(parts[at:])}", "/".join(parts[:at])) for at in range(len(parts)))
    needs = []
    for quoted, angled in _INCLUDE.findall(text):
        name = quoted or angled
        needs.append(f"include:{_beside(path, name) if name.startswith('.') else name}")
    return Links(names, tuple(dict.fromkeys(needs)))


def _script_links(path: str, text: str) -> Links:
    stem = _without_suffix(path)
    names = [(f"script:{stem}", "")]
    if PurePosixPath(stem).name == "index":
        names.append((f"script:{posixpath.dirname(stem) or '.'}", ""))
    needs: list[str] = []
    mentions: list[str] = []
    for deferred, name in _SCRIPT_IMPORT.findall(text):
        (mentions if deferred else needs).append(f"script:{_without_suffix(_beside(path, name))}")
    return Links(tuple(names), tuple(dict.fromkeys(needs)), tuple(dict.fromkeys(mentions)))


def _without_suffix(path: str) -> str:
    stem, suffix = posixpath.splitext(path)
    return stem if suffix in _SCRIPTS else path


def _beside(path: str, name: str) -> str:
    """The path that `name` means, seen from the folder of `path`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name))


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


# ------------------------------------------------------------------ links between files


def references(files: Mapping[str, Links]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """(what each file needs, what it needs or mentions), as paths among `files`."""
    named: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(files):
        for name, top in files[path].names:
            named.setdefault(name, []).append((top, path))
    needs: dict[str, set[str]] = {}
    every: dict[str, set[str]] = {}
    for path, links in files.items():
        needs[path] = {other for name in links.needs if (other := _meant(named.get(name, ()), path))}
        later = {other for name in links.mentions if (other := _meant(named.get(name, ()), path))}
        every[path] = needs[path] | later
    return needs, every


def _meant(candidates: Sequence[tuple[str, str]], importer: str) -> str | None:
    """The file that a name in `importer` means: below the nearest folder around both, or the only one.

    None for itself, and for the package that it is a part of: a package imports its parts, so counting `from . import
    part` as a need of the package makes only circles.
    """
    around = [(len(top), path) for top, path in candidates if not top or importer.startswith(f"{top}/")]
    found = max(around)[1] if around else candidates[0][1] if len(candidates) == 1 else importer
    folder, name = posixpath.split(found)
    is_around = name == "__init__.py" and (not folder or importer.startswith(f"{folder}/"))
    return None if found == importer or is_around else found


def dependency_order(files: Mapping[str, str], root: Path | None = None) -> list[str]:
    """Paths of `files` (path -> text) as `ordered` has them; `root` as for `Linker`."""
    linker = Linker(root, files)
    return ordered(*references({path: linker.links(path, text) for path, text in files.items()}))


def ordered(needs: Graph, every: Graph) -> list[str]:
    """Paths such that each file stands behind what it refers to, as near as may be. `needs` is a part of `every`.

    Depth first from the files that nobody refers to, names breaking ties. What is only mentioned counts where it closes
    no circle; inside a circle of needs, the file that misses the least goes first.
    """
    order: list[str] = []
    for circle in _components(every):
        inside = _within(circle, needs)
        for knot in _components(inside) if len(circle) > 1 else [circle]:
            order += _least_missing_first(_within(knot, inside)) if len(knot) > 1 else knot
    return order


def _within(paths: Collection[str], graph: Graph) -> dict[str, set[str]]:
    known = set(paths)
    return {path: known.intersection(graph[path]) for path in sorted(paths)}


def _components(graph: Graph) -> list[list[str]]:
    """Strongly connected components, each behind those it refers to: a depth-first post-order from the unreferred."""
    found = _tarjan(sorted(graph), graph)
    place = {path: at for at, component in enumerate(found) for path in component}
    referred = {place[other] for path, others in graph.items() for other in others if place[other] != place[path]}
    return _tarjan(sorted(min(component) for at, component in enumerate(found) if at not in referred), graph)


def _tarjan(starts: Iterable[str], graph: Graph) -> list[list[str]]:
    """The components that can be reached, in the order in which a search from `starts` leaves them (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    waiting: set[str] = set()
    found: list[list[str]] = []

    def enter(path: str) -> tuple[str, Iterator[str]]:
        number[path] = low[path] = len(number)
        stack.append(path)
        waiting.add(path)
        return path, iter(sorted(graph[path]))

    for start in starts:
        calls = [enter(start)] if start not in number else []
        while calls:  # not recursive: a chain of imports may be longer than Python's stack
            path, others = calls[-1]
            other = next((other for other in others if other not in number or other in waiting), None)
            if other is not None and other not in number:
                calls.append(enter(other))
            elif other is not None:
                low[path] = min(low[path], number[other])
            else:
                calls.pop()
                if calls:
                    low[calls[-1][0]] = min(low[calls[-1][0]], low[path])
                if low[path] == number[path]:
                    at = stack.index(path) if stack[-1] != path else len(stack) - 1
                    found.append(stack[at:])
                    waiting.difference_update(found[-1])
                    del stack[at:]
    return found


def _least_missing_first(graph: Graph) -> list[str]:
    """Paths of a circle: always the one with the fewest needs that did not come yet, the first by name."""
    missing = {path: len(others) for path, others in graph.items()}
    users: dict[str, list[str]] = {path: [] for path in graph}
    for path, others in graph.items():
        for other in others:
            users[other].append(path)
    heap = sorted((count, path) for path, count in missing.items())
    order: list[str] = []
    done: set[str] = set()
    while heap:
        count, path = heapq.heappop(heap)
        if path in done or count != missing[path]:
            continue
        done.add(path)
        order.append(path)
        for user in users[path]:
            missing[user] -= 1
            heapq.heappush(heap, (missing[user], user))
    return order
