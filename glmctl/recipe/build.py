"""A recipe put together from a command's options instead of a file, checked by the same rules."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmctl.recipe.document import Document
from glmctl.recipe.load import resolve
from glmctl.recipe.merge import override
from glmctl.recipe.schema import Recipe


def build(kind: str, options: Mapping[str, tuple[str, Any]], overrides: list[str] | None = None) -> Recipe:
    """The recipe of type `kind` whose keys are given by command-line options.

    Args:
        options: key -> (how the option is written, its value); None values are left to the schema's defaults.
        overrides: `key=value` words of --set, laid over them.

    Raises:
        RecipeError: naming the option as it is typed.
    """
    given = {key: (option, value) for key, (option, value) in options.items() if value is not None}
    document = Document(
        {"type": kind, **{key: value for key, (_, value) in given.items()}},
        {(): "command line", **{(key,): option for key, (option, _) in given.items()}},
    )
    override(document, overrides or [])
    return resolve(document)


def run_name(kind: str, target: str, *content: object) -> str:
    """A run's name from what it works on: `eval-distill`, with 8 hex digits of `content` when that is given."""
    parts = [part for part in Path(target).parts if part not in ("/", "..", "export")]
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "model").strip("-.") or "model"
    if not content:
        return f"{kind}-{label}"
    digest = hashlib.sha256(json.dumps([target, content], sort_keys=True).encode()).hexdigest()
    return f"{kind}-{label}-{digest[:8]}"
