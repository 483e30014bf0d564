"""A recipe by name or path, resolved: defaults < extended files < the file < overrides, then typed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from glmctl.errors import RecipeError, nearest, unknown
from glmctl.recipe import schema
from glmctl.recipe.derive import derived
from glmctl.recipe.document import Document
from glmctl.recipe.explain import explain
from glmctl.recipe.merge import merge, override, read_extended
from glmctl.recipe.names import COMMANDS, default_name, find, shipped_files
from glmctl.recipe.schema import Recipe, RecipeBase

__all__ = [
    "CLASSES",
    "RecipeEntry",
    "derived",
    "dump",
    "list_recipes",
    "load",
    "resolve",
    "schema_json",
]

CLASSES: dict[str, type[RecipeBase]] = {
    str(cls.model_fields["type"].default): cls
    for cls in (
        schema.TokenizerRecipe,
        schema.DataRecipe,
        schema.ProblemsRecipe,
        schema.ReasoningRecipe,
        schema.AgenticRecipe,
        schema.PretrainRecipe,
        schema.SftRecipe,
        schema.RewardRecipe,
        schema.RlRecipe,
        schema.DistillRecipe,
        schema.OnPolicyDistillRecipe,
        schema.LogitDistillRecipe,
        schema.EvalRecipe,
        schema.ConvertRecipe,
        schema.ServeRecipe,
        schema.PipelineRecipe,
        schema.StudyRecipe,
    )
}


def load(
    name_or_path: str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    expect: str | None = None,
    also: Sequence[str] = (),
) -> Recipe:
    """The typed recipe that `name_or_path` names, with `overrides` applied.

    Args:
        name_or_path: a shipped name (`demo/pretrain`) or a path ending in .yaml.
        overrides: words `a.b.0.c=value` as after --set, or a mapping of dotted keys to values.
        expect: the type that the caller can run.
        also: more types that it can run; a folder's name alone means one of the expected type.

    Raises:
        RecipeError: nothing has that name; the file is wrong (with file:line, key and nearest choice); or its type
            is not the expected one.
    """
    path = find(name_or_path, expect)
    document = read_extended(path)
    _check_type(document, path, None)
    kind = str(document.data["type"])
    if expect is not None and kind not in (expect, *also):
        raise RecipeError(
            f"{name_or_path}: is a '{kind}' recipe, not '{expect}'",
            hint=f"run it with `glmctl {COMMANDS[kind]} {name_or_path}`",
        )
    override(document, overrides, name_or_path)
    _check_type(document, path, kind)
    document.data.setdefault("name", default_name(path))
    return resolve(document)


def resolve(document: Document) -> Recipe:
    """The typed recipe that a document with a legal `type` holds."""
    cls = CLASSES[document.data["type"]]
    data = merge(_section_defaults(cls), document.data)
    try:
        return cast(Recipe, cls.model_validate(data))
    except ValidationError as error:
        raise explain(error, cls, document) from error


def _section_defaults(cls: type[RecipeBase]) -> dict[str, Any]:
    """Default sections as data, so that a recipe that sets one key of a section keeps that field's other defaults."""
    defaults = {key: field.default for key, field in cls.model_fields.items()}
    return {key: value.model_dump() for key, value in defaults.items() if isinstance(value, BaseModel)}


def _check_type(document: Document, path: Path, fixed: str | None) -> None:
    kind = document.data.get("type")
    if kind is None:
        match = nearest("type", document.data)
        if match is not None:
            raise RecipeError(f"{document.where((match,))}: {match}: unknown key; did you mean 'type'?")
        raise RecipeError(f"{path}: type: this key is required; one of: {', '.join(CLASSES)}")
    if kind not in CLASSES:
        raise unknown("recipe type", str(kind), CLASSES, where=f"{document.where(('type',))}: type")
    if fixed is not None and kind != fixed:
        raise RecipeError(f"{document.where(('type',))}: the type of a recipe cannot be changed ('{fixed}')")


def dump(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal one."""
    data = recipe.model_dump(mode="json")
    head: dict[str, Any] = {key: data.pop(key) for key in ("type", "name", "seed") if key in data}
    return yaml.safe_dump({**head, **data}, sort_keys=False, allow_unicode=True, width=120)


@dataclass(frozen=True)
class RecipeEntry:
    """One line of `glmctl recipe list`."""

    name: str
    type: str
    description: str
    path: Path


def list_recipes() -> list[RecipeEntry]:
    """Every shipped recipe: its name, its type, and the first comment line of its file."""
    entries = []
    for name, path in shipped_files().items():
        first = path.read_text(encoding="utf-8").splitlines()[:1]
        comment = first[0].lstrip("# ").rstrip() if first and first[0].startswith("#") else ""
        entries.append(RecipeEntry(name, str(read_extended(path).data.get("type", "?")), comment, path))
    return entries


def schema_json(kind: str | None = None) -> str:
    """The JSON Schema of one recipe type, or of all, for editors and for generated documentation.

    Raises:
        RecipeError: no such type.
    """
    if kind is None:
        body = TypeAdapter(Recipe).json_schema()
    elif kind in CLASSES:
        body = CLASSES[kind].model_json_schema()
    else:
        raise unknown("recipe type", kind, CLASSES)
    return json.dumps(body, indent=2, ensure_ascii=False)
