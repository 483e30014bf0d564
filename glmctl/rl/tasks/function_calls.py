"""Judging function calls: format against the tools' JSON schemas, and the two rewards of spec section 3.5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from glmctl.rl.environment import Tool

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def call_problem(call: Mapping[str, Any], tools: Sequence[Tool]) -> str | None:
    """What is wrong with a call `{name, arguments}` given the tools on offer, or None when it obeys the protocol.

    The name must exist, `arguments` be a mapping holding every required parameter, no unknown one, and values of the
    schema's types (`true` is not an integer, NaN is not a number). Types that the schema leaves out are not checked.
    """
    offered = {function["name"]: function for function in (tool.get("function", tool) for tool in tools)}
    name, arguments = call.get("name"), call.get("arguments")
    if name not in offered:
        return f"unknown tool {name!r}"
    if not isinstance(arguments, Mapping):
        return f"{name}: arguments are not a mapping"
    schema = offered[name].get("parameters", {})
    properties = schema.get("properties", {})
    for key in schema.get("required", []):
        if key not in arguments:
            return f"{name}: argument '{key}' is missing"
    for key, value in arguments.items():
        if key not in properties:
            return f"{name}: unknown argument '{key}'"
        kind = properties[key].get("type")
        if kind is not None and not _is_a(value, kind):
            return f"{name}: argument '{key}' must be {kind}, found {value!r}"
    return None


def same_call(call: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Equal in name, in the set of parameters, and in every field (`1`, `1.0` and `true` are three values)."""
    return call.get("name") == expected.get("name") and _same(call.get("arguments"), expected.get("arguments"))


def step_wise_reward(format_correct: bool, call: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """R = 1 iff FormatCorrect(a_t) and a_t equals a*_t in name, parameters and every field; else 0 (spec 3.5)."""
    return float(format_correct and same_call(call, expected))


def end_to_end_reward(formats_correct: Sequence[bool], task_completed: bool) -> float:
    """R = 1 iff FormatCorrect(a_1..a_T) and TaskCompleted(I, o_0, a_1, ..., a_T, o_T); else 0 (spec 3.5)."""
    return float(all(formats_correct) and task_completed)


def _is_a(value: Any, kind: str | Sequence[str]) -> bool:
    if not isinstance(kind, str):
        return any(_is_a(value, one) for one in kind)
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, _TYPES.get(kind, ()))


def _same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)
