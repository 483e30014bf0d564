"""The house's rule: imports run down only, and what must start instantly imports nothing heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "glmctl"

FLOORS = [
    {"kernels"},
    {"model"},
    {"run", "recipe"},
    {"engine", "data", "parallel"},
    {"training", "convert"},
    {"rl", "distill", "serving", "evaluation"},
    {"commands"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LEAVES = {"errors", "console", "__init__"}
"""modules that anybody may import"""

HEAVY = {"torch", "transformers", "accelerate", "lm_eval", "fastapi", "uvicorn", "openai", "safetensors", "tokenizers"}
LIGHT_ROOMS = {"commands", "recipe", "run"}
LIGHT_MODULES = {"cli", "console", "errors", "__main__", "__init__"}
NEVER = {"transformers"}
"""for tests only, never at run time"""
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, *, top_only: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import; with `top_only`, those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif top_only and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)):
            continue
        else:
            yield from imports(node, top_only=top_only)


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def found(path: Path, *, top_only: bool = False) -> list[tuple[int, str]]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), top_only=top_only))


def test_every_room_has_its_floor() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(FLOOR) | {"recipes"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down_only(path: Path) -> None:
    here = room(path)
    if here in ("cli", "__main__"):
        return
    for line, name in found(path):
        parts = name.split(".")
        if parts[0] != "glmctl" or len(parts) == 1:
            continue
        there = parts[1]
        where = f"{path.relative_to(ROOT)}:{line}"
        if here in LEAVES:
            assert there in LEAVES or there.startswith("__"), f"{where}: a leaf imports {name}"
        elif there in FLOOR:
            assert FLOOR[there] <= FLOOR[here], (
                f"{where}: {here} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]})"
            )
            assert {here, there} != {"engine", "training"}, f"{where}: engine and training never import each other"
        elif there == "cli":
            assert here == "commands", f"{where}: only commands know the command line"
        else:
            assert there in LEAVES or there.startswith("__"), f"{where}: {name} is no room"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_starts_instantly_imports_nothing_heavy(path: Path) -> None:
    here = room(path)
    light = here in LIGHT_ROOMS or (path.parent == PACKAGE and here in LIGHT_MODULES)
    light = light or path.name == "__init__.py" or path == PACKAGE / "model" / "config.py"
    for line, name in found(path, top_only=True):
        top = name.split(".")[0]
        assert top not in NEVER, f"{path.relative_to(ROOT)}:{line}: {name} is a test's dependency"
        assert not (light and top in HEAVY), f"{path.relative_to(ROOT)}:{line}: imports {name} when it is loaded"


def test_rooms_of_one_floor_form_no_circle() -> None:
    graph = {room: set() for room in FLOOR}
    for path in modules():
        if (here := room(path)) in FLOOR:
            rooms = {name.split(".")[1] for _, name in found(path) if name.startswith("glmctl.")}
            graph[here] |= (rooms & set(FLOOR)) - {here}
    order = TopologicalSorter(graph)
    assert len(list(order.static_order())) == len(FLOOR)  # CycleError names the circle


def test_no_drawers_for_odds_and_ends() -> None:
    names = {path.stem for path in modules()} | {path.parent.name for path in modules()}
    assert not names & FORBIDDEN_NAMES


def test_doors_are_links_into_the_package() -> None:
    for door in ("commands", "kernels", "model", "recipes"):
        link = ROOT / door
        assert link.is_symlink()
        assert link.resolve() == PACKAGE / door
