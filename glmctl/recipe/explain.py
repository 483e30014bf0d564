"""What pydantic found wrong, as one line that names the place, the key, what was expected and the nearest choice."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Literal, Union

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from glmctl.errors import RecipeError, nearest
from glmctl.recipe.document import Document, KeyPath, describe, dotted

_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section",
    "model": "a section",
    "finite": "a finite number",
}

_OF_SECTIONS = ("value_error", "union_tag_invalid", "union_tag_not_found")


def explain(error: ValidationError, recipe_class: type[BaseModel], document: Document) -> RecipeError:
    """The error a user sees: the first problem in full (misspelt keys before all others), and how many more."""
    problems = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    first = problems[0]
    path, section = locate(recipe_class, first["loc"])
    place = document.blame(path) if first["type"] in _OF_SECTIONS else document.where(path)
    prefix = _prefix(place, dotted(path))
    # a misspelt required key is reported twice, as unknown and as missing: say it once
    rest = [p for p in problems[1:] if not (first["type"] == "extra_forbidden" and p["type"] == "missing")]
    more = f" (and {len(rest)} more)" if rest else ""
    return RecipeError(f"{prefix}: {_what(first, section)}{more}")


def _prefix(place: str, key: str) -> str:
    """Place and key; the key is left out where the place is an option that names it."""
    option = place.rpartition("set ")[2] if "set " in place else None
    named = option is not None and f"{option}.".startswith(f"{key}.")
    typed = place.startswith("--") and option is None
    return place if named or typed or not key else f"{place}: {key}"


def locate(recipe_class: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key path that a pydantic location means, and the model class of the section its last key is in.

    Pydantic puts the tag of a discriminated union into the location; a key path as people write it has none.
    """
    path: KeyPath = ()
    section: type[BaseModel] | None = recipe_class
    annotation: Any = recipe_class
    for element in loc:
        models = _models(annotation)
        if len(models) > 1:
            tagged = [model for model in models if _tag(model) == element]
            if tagged:
                annotation = tagged[0]
                continue
        section = models[0] if models else None
        path = (*path, element)
        annotation = _below(annotation, element)
    # a section as a whole (a validator, or a wrong tag) is described by what it may hold
    return path, section


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The model classes that `annotation` (Annotated, Optional, Union, or a class) may be; containers have none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _models(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [model for one in typing.get_args(annotation) for model in _models(one)]
    return []


def _below(annotation: Any, element: int | str) -> Any:
    for model in _models(annotation):
        if element in model.model_fields:
            return model.model_fields[str(element)].annotation
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _below(typing.get_args(annotation)[0], element)
    arguments = typing.get_args(annotation)
    return arguments[-1] if origin in (list, dict) and arguments else None


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return str(field.default) if field is not None and typing.get_origin(field.annotation) is Literal else None


def legal_keys(section: type[BaseModel]) -> list[str]:
    """The keys that may be written in a section of this class."""
    extra = ["preset"] if section.__name__ == "ModelConfig" else []
    extra += ["extends"] if "seed" in section.model_fields and "name" in section.model_fields else []
    return [*section.model_fields, *extra]


def _what(problem: ErrorDetails, section: type[BaseModel] | None) -> str:
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        assert section is not None, problem
        return unknown_key(str(problem["loc"][-1]), legal_keys(section))
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_not_found":
        return f"'type' is required: {_choices(context['discriminator'], value)}"
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(context["expected_tags"]).split(",")]
        return _unknown_choice("type", str(context["tag"]), tags)
    if kind == "literal_error":
        choices = [word.strip(" '") for word in str(context["expected"]).replace(" or ", ", ").split(",")]
        return _unknown_choice("value", str(value), choices)
    if kind == "value_error":
        return str(context["error"]).strip()
    if kind == "string_pattern_mismatch":
        return f"{describe(value)} does not match {context['pattern']}"
    family = kind.partition("_")[0]
    if kind in ("too_short", "too_long", "missing_argument") or family not in _EXPECTED:
        text = re.sub(r"^\w+ should ", "must ", problem["msg"]).partition(" after validation")[0]
        return f"{text}, got {describe(value)}"
    return f"expected {_EXPECTED[family]}, got {describe(value)}"


def unknown_key(word: str, legal: list[str]) -> str:
    """The message for a key that a section does not have."""
    match = nearest(word, legal)
    return f"unknown key; did you mean '{match}'?" if match else f"unknown key; one of: {', '.join(legal)}"


def _unknown_choice(what: str, word: str, choices: list[str]) -> str:
    match = nearest(word, choices)
    hint = f"did you mean '{match}'?" if match else f"one of: {', '.join(choices)}"
    return f"unknown {what} '{word}'; {hint}"


def _choices(discriminator: str, value: object) -> str:
    keys = list(value) if isinstance(value, dict) else []
    match = nearest(discriminator.strip("'"), [str(key) for key in keys])
    return f"'{match}' looks like it" if match else "it decides which keys the section has"
