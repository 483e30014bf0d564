"""How two recipes differ, and which differences an unfinished run may be continued with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from glmctl.recipe.schema import RecipeBase

FREE = (
    "schedule",
    "grad_clip",
    "spike_factor",
    "micro_tokens",
    "batch.micro_tokens",
    "recompute",
    "compile",
    "verify_data",
    "checkpoint",
    "trackers",
    "validation.every_steps",
    "evaluate_every",
)
"""Keys, with all below them, that may change between two starts of a run: rates and limits of the steps to come, how
the same sums are done, and what is written down when. Model, data, their order and the loss are none of them."""


@dataclass(frozen=True)
class Change:
    """One value that is not what it was."""

    key: str
    """dotted; empty for the whole recipe"""
    old: Any
    new: Any

    @property
    def free(self) -> bool:
        """Whether an unfinished run may be continued with it."""
        return any(self.key == name or self.key.startswith(f"{name}.") for name in FREE)

    def __str__(self) -> str:
        return f"{self.key or 'recipe'}: {_short(self.old)} -> {_short(self.new)}"


def differences(old: Any, new: Any, key: str = "") -> list[Change]:
    """Every value that differs between two plain recipes; the top-level name is not one."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [name for name in dict.fromkeys([*old, *new]) if key or name != "name"]
        return [one for n in names for one in differences(old.get(n, "absent"), new.get(n, "absent"), f"{key}.{n}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [one for i, pair in enumerate(zip(old, new, strict=True)) for one in differences(*pair, f"{key}.{i}")]
    return [] if old == new else [Change(key.lstrip("."), old, new)]


def completed(stored: Any, kind: type[RecipeBase]) -> Any:
    """A stored recipe as plain data, with the defaults of the fields of `kind` that did not exist when it was written.

    What is no recipe of this kind, or has a field that is gone, comes back as it is: every part of it then differs.
    """
    try:
        return kind.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return stored


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"
