"""Reading a request body: bounded in bytes, time and depth, and JSON in the strict sense only.

Python's reader takes NaN, Infinity, 1e999, duplicate keys and lone surrogates; each of them has crashed or fooled a
server further on, so all of them end here.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn, TypeAlias

from starlette.requests import ClientDisconnect, Request

from glmctl.serving.api_error import ApiError

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 64
MAX_VALUES = 500_000
MAX_CONTAINERS = 100_000
BODY_SECONDS = 30.0
_MAX_INTEGER_DIGITS = 20
_PARSED_IN_PLACE = 64 * 1024
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{,]', re.DOTALL)

_Path: TypeAlias = "tuple[_Path, str | int] | None"
"""where a value stands: its parent's path and its key or index, so that no text is made unless it is needed"""


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. ApiError 413 over 8 MB, 408 when it does not arrive, 400 when it is not one."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await _read(request)
    except TimeoutError as error:
        raise ApiError(408, f"the request body did not arrive within {BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client went away before its request was complete") from error
    # a large body takes seconds to check; the event loop goes on meanwhile
    return parse(raw) if len(raw) <= _PARSED_IN_PLACE else await asyncio.to_thread(parse, raw)


async def _read(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def parse(raw: bytes) -> dict[str, Any]:
    """Strict JSON, an object at the top. ApiError 400 says what is wrong."""
    _check_counts(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the request body is not JSON: {error.msg} ({where})", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(value, dict):
        raise ApiError(400, "the request body must be a JSON object", code="invalid_json")
    _check(value, None, 1)
    return value


def _check_counts(raw: bytes) -> None:
    """Refuse millions of values before they are made: neither the JSON reader nor a collection of garbage lets go of
    the interpreter meanwhile, so that every other client would wait."""
    # usually enough: the same characters inside strings only make these counts too high
    if raw.count(b",") < MAX_VALUES and raw.count(b"[") + raw.count(b"{") <= MAX_CONTAINERS:
        return
    values, containers = 1, 0
    for found in _STRUCTURE.finditer(raw):
        first = raw[found.start()]
        values += first == ord(",")
        containers += first in b"[{"
        if values > MAX_VALUES or containers > MAX_CONTAINERS:
            what = f"{MAX_VALUES} values" if values > MAX_VALUES else f"{MAX_CONTAINERS} arrays and objects"
            raise ApiError(400, f"the request body holds more than {what}", code="body_too_large")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ApiError(400, f"key {_shown(repeated)} is given twice", param=_shown(repeated), code="duplicate_key")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"{name} is not a JSON number", code="invalid_number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, f"the number {text[:24]} is out of range", code="invalid_number")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_INTEGER_DIGITS:
        raise ApiError(400, f"an integer of {len(text)} digits is out of range", code="invalid_number")
    return int(text)


def _check(value: Any, path: _Path, depth: int) -> None:
    """Refuse what nests deeper than MAX_DEPTH, and strings that no UTF-8 text could hold, naming the field.

    Recursion is as deep as MAX_DEPTH at most, and takes no memory for eight megabytes of numbers.
    """
    if isinstance(value, str):
        _check_text(value, path)
        return
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, str | list | dict):
                _check(item, (path, index), depth + 1)
        return
    for key, item in value.items():
        _check_text(key, path)
        if isinstance(item, str | list | dict):
            _check(item, (path, key), depth + 1)


def _check_text(text: str, path: _Path) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        param = _shown(_named(path)) or None
        raise ApiError(400, f"{param}: a lone surrogate is not text", param=param, code="invalid_text") from error


def _named(path: _Path) -> str:
    steps = []
    while path is not None:
        path, step = path
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
    return "".join(reversed(steps)).removeprefix(".")


def _shown(text: str) -> str:
    """A client's own words, safe to send back: short, and without lone surrogates."""
    return text[:80].encode("utf-8", "replace").decode("utf-8")


def _too_deep() -> ApiError:
    return ApiError(400, f"the request body nests deeper than {MAX_DEPTH} levels", code="invalid_json")
