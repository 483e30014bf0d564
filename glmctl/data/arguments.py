"""The values of tool call arguments, which the format writes as bare text.

An argument whose schema type is string stays raw. Any other value that is a JSON object, array, number, boolean or
null becomes that (where the schema allows strings among other types, only if it is of one of those types). Where the
schema allows no string, JSON with its quotes escaped and Python's way of writing it (`True`, `{'a': 1}`) are read too
(spec section 3.2). Everything else, JSON strings in quotes included, stays raw text. So without a schema a string
argument `5` comes back as the number 5: the format itself does not tell them apart.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

_MAX_DEPTH = 8
"""unions nested deeper than this count as unknown: schemas come from outside"""
_MAX_LITERAL = 1 << 16
"""characters up to which a value is looked at as Python: its parser takes much memory for what it reads"""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def value_of(text: str, types: frozenset[str] | None) -> tuple[Any, str]:
    """The value that `text` stands for, given the JSON types its schema allows (None: no schema), and its JSON."""
    raw = (text, json.dumps(text, ensure_ascii=False))
    if types == frozenset({"string"}):
        return raw
    # without a schema, or where a string may stand, `None` is as likely a word as a value
    readings = [read_json, _escaped_json, _python] if types and "string" not in types else [read_json]
    for read in readings:
        try:
            value = read(text)
            as_json = json_text(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, str) or (types and "string" in types and not types & _json_types(value)):
            return raw
        return value, as_json
    return raw


def read_json(text: str) -> Any:
    """The value of JSON text. ValueError for what is none (`NaN` and numbers out of range too), RecursionError for
    what is nested too deeply."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite)


def json_text(value: Any) -> str:
    """A value as JSON that can be sent: ValueError for infinities, and for half a character (an escaped surrogate)."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode("utf-8")
    return text


def _escaped_json(text: str) -> Any:
    """JSON as it stands inside of a JSON string: `{\\"a\\": 1}`."""
    return read_json(json.loads(f'"{text}"'))


def _python(text: str) -> Any:
    """A Python literal of the kinds that JSON has; a tuple is a list."""
    if len(text) > _MAX_LITERAL:
        raise ValueError("too long")
    return _json_only(ast.literal_eval(text.strip()))


def _json_only(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json_only(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json_only(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{type(value).__name__} is not of JSON")


def _json_types(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number"}
    return {"array"} if isinstance(value, list) else {"object"}


def argument_types(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, frozenset[str]]]:
    """Function name -> argument -> the JSON types its schema allows; arguments of unknown type are left out."""
    table: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            continue
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            known = {key: _schema_types(schema) for key, schema in properties.items()}
            table[function["name"]] = {key: types for key, types in known.items() if types}
    return table


def _schema_types(schema: Any, depth: int = 0) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset((kind,))
    if isinstance(kind, list):
        return frozenset(name for name in kind if isinstance(name, str))
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return frozenset("string" if isinstance(c, str) else min(_json_types(c)) for c in choices)
    found: frozenset[str] = frozenset()
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list):
            found |= frozenset(name for option in options for name in _schema_types(option, depth + 1))
    return found
