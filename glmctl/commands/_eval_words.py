"""The words of `glmctl eval` as recipe values: lm-eval's spelling in, plain data out."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

from glmctl.errors import GlmctlError


def names(words: Sequence[str] | None) -> list[str] | None:
    """`a,b` and repeated options as one list; None when nothing is named."""
    return [name for word in words or [] for name in word.split(",") if name] or None


def pairs(option: str, words: Sequence[str] | None) -> dict[str, str] | None:
    """`NAME=FILE` words as a mapping, None without any. GlmctlError (usage) for one that is no pair."""
    found = {}
    for word in words or []:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise GlmctlError(f"{option} {word}: expected NAME=FILE")
        found[name] = path
    return found or None


def pretrained(model_args: str | None) -> str | None:
    """The folder in lm-eval's `pretrained=DIR`. GlmctlError (usage) for anything else in there."""
    found = keywords("--model_args", model_args)
    if found is None:
        return None
    if set(found) != {"pretrained"}:
        raise GlmctlError(f"--model_args {model_args}: expected pretrained=DIR", hint="the rest is set by --set")
    return str(found["pretrained"])


def keywords(option: str, text: str | None) -> dict[str, Any] | None:
    """`key=value,key=value` with Python literals for values, or one JSON object, as lm-eval reads it."""
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        return json_object(option, text)
    found: dict[str, Any] = {}
    for part in _split(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise GlmctlError(f"{option} {text}: expected KEY=VALUE,...")
        found[name.strip()] = _literal(value.strip())
    return found


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """One JSON object. GlmctlError (usage) for anything else."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise GlmctlError(f"{option} {text}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise GlmctlError(f"{option} {text}: expected a JSON object")
    return found


def whole(limit: float | None) -> int | float | None:
    """A limit of whole questions as a whole number; a share stays one."""
    return int(limit) if limit is not None and limit == int(limit) else limit


def batch_size(word: str | None) -> int | None:
    """A number of requests; lm-eval's `auto` is what the recipe has anyway."""
    if word is None or word.startswith("auto"):
        return None
    if not word.isdecimal() or int(word) == 0:
        raise GlmctlError(f"--batch_size {word}: expected a number of at least 1, or auto")
    return int(word)


def seeds(word: str | None) -> dict[str, tuple[str, Any]]:
    """One seed for sampling and few-shot examples, or lm-eval's four: python, numpy, torch, few-shot.

    The third is sampling's. The first two, which lm-eval's tasks shuffle with, stay lm-eval's defaults: a score that
    needs others cannot be compared.
    """
    if word is None:
        return {}
    parts = word.split(",")
    if len(parts) not in (1, 4) or not all(part.isdecimal() for part in parts):
        raise GlmctlError(f"--seed {word}: expected one number, or four with commas")
    if len(parts) == 4 and parts[:2] != ["0", "1234"]:
        raise GlmctlError(f"--seed {word}: the first two are always 0,1234 here")
    return {"seed": ("--seed", int(parts[-2:][0])), "fewshot_seed": ("--seed", int(parts[-1]))}


def sampling(temperature: float | None, samples: int | None) -> list[str]:
    """`--set` words for the temperature; several samples without one are drawn at the report's 0.6."""
    if temperature is None and samples is not None and samples > 1:
        temperature = 0.6
    return [] if temperature is None else [f"sampling.temperature={temperature}"]


def as_overrides(options: dict[str, tuple[str, Any]]) -> list[str]:
    """Options laid over a recipe, as the words of --set."""
    # JSON is YAML, so a list or mapping survives
    return [f"{key}={json.dumps(value)}" for key, (_, value) in options.items() if value is not None]


def _split(text: str) -> list[str]:
    """At commas that are outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[({":
            depth += 1
        elif char in "])}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return [part for part in parts if part.strip()]


def _literal(word: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
