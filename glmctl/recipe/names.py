"""Where recipes are: shipped ones by name (`demo/pretrain`), a user's own by path.

No pydantic here, so that shell completion is instant.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from glmctl.errors import RecipeError, nearest

SUFFIXES = (".yaml", ".yml")

COMMANDS = {
    "tokenizer": "data tokenizer",
    "data": "data prepare",
    "problems": "data problems",
    "reasoning": "data reason",
    "agentic": "data agentic",
    "pretrain": "pretrain",
    "sft": "sft",
    "reward": "reward",
    "rl": "rl",
    "distill": "distill",
    "on_policy_distill": "distill",
    "logit_distill": "distill",
    "eval": "eval",
    "convert": "convert",
    "serve": "serve",
    "pipeline": "run",
    "study": "study",
}
"""recipe type -> the command that runs it"""


def shipped_root() -> Path:
    """The folder of the recipes that travel with the package."""
    return Path(str(importlib.resources.files("glmctl.recipes")))


def shipped_files() -> dict[str, Path]:
    """Every shipped recipe by its short name: `demo/pretrain`, and `demo` for `demo/pipeline`."""
    root = shipped_root()
    found = {}
    for path in sorted(root.rglob("*.yaml")):
        relative = path.relative_to(root).with_suffix("")
        short = relative.parent if relative.name == "pipeline" and relative.parent.name else relative
        found[short.as_posix()] = path
    return dict(sorted(found.items()))


def complete(incomplete: str) -> list[str]:
    """For shell completion: shipped names that begin with `incomplete`, then recipe files of the folder being typed."""
    names = [name for name in shipped_files() if name.startswith(incomplete)]
    typed = Path(incomplete or ".")
    folder = typed if incomplete.endswith("/") or not incomplete else typed.parent
    if folder.is_dir():
        entries = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES or p.is_dir())
        shown = [f"{p.as_posix()}/" if p.is_dir() else p.as_posix() for p in entries if not p.name.startswith(".")]
        names += [name for name in shown if name.startswith(incomplete)]
    return names


def default_name(path: Path) -> str:
    """The run name of a recipe that states none: `laptop-pretrain`, `demo` (for its pipeline), or the file's stem."""
    if path.is_relative_to(shipped_root()):
        parts = path.relative_to(shipped_root()).with_suffix("").parts
        return "-".join(parts[:-1] if parts[-1] == "pipeline" and len(parts) > 1 else parts)
    return path.stem


def looks_like_recipe(name: str) -> bool:
    """Whether `name` means a recipe (a .yaml path, or a shipped name) rather than, say, a model folder."""
    return name.endswith(SUFFIXES) or (not Path(name).exists() and _shipped(name, None) is not None)


def find(name: str, expect: str | None = None) -> Path:
    """The file that `name` means.

    A name ending in .yaml or .yml is a path. Anything else is a shipped recipe: `demo/pretrain`; or a folder of
    shipped recipes, which means the one of the type that is expected (`glmctl pretrain laptop`) or its pipeline.

    Raises:
        RecipeError: nothing has that name; the nearest one that exists is named.
    """
    if name.endswith(SUFFIXES):
        return _file(Path(name))
    found = _shipped(name, expect)
    if found is not None:
        return found
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{name}: is a folder, not a recipe", hint="name a .yaml file, or see `glmctl recipe list`")
    names = list(shipped_files())
    inside = [other for other in names if other.startswith(name.rstrip("/") + "/")]
    match = nearest(name, names)
    if inside:
        raise RecipeError(f"'{name}' holds several recipes: {', '.join(inside)}", hint="name one of them")
    suffix = f"; did you mean '{match}'?" if match else ""
    raise RecipeError(f"unknown recipe '{name}'{suffix}", hint="`glmctl recipe list` shows the shipped ones")


def _shipped(name: str, expect: str | None) -> Path | None:
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        return None
    root = shipped_root()
    candidates = [root / f"{name}.yaml"]
    if expect is not None:
        candidates.append(root / name / f"{expect}.yaml")
    if expect in (None, "pipeline"):
        candidates.append(root / name / "pipeline.yaml")
    return next((path for path in candidates if path.is_file()), None)


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, not a recipe")
    siblings = [p for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
    match = nearest(path.stem, {p.stem: p for p in siblings})
    suffix = f"; did you mean '{path.with_name(match + path.suffix)}'?" if match else ""
    raise RecipeError(f"{path}: no such recipe file{suffix}")
