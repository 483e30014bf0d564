"""A request body as one of the protocol's models, or an error that names the field at fault."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from glmctl.errors import nearest
from glmctl.serving.api_error import ApiError
from glmctl.serving.messages import ARGUMENTS, CONFLICT, Part

Model = TypeVar("Model", bound=Part)


def validate(kind: type[Model], body: dict[str, Any], *, strict: bool = False) -> Model:
    """`body` as a request of `kind`. ApiError 400 naming the first field that is wrong; `strict`: or unknown."""
    try:
        return kind.model_validate(body, extra="forbid" if strict else "ignore")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        location = first["loc"]
        if first["type"] == CONFLICT and first["ctx"]["field"]:
            location = (*location, first["ctx"]["field"])
        param = _path(location) or None
        message = first["msg"].removeprefix("Value error, ")
        code = first["type"] if first["type"] in (ARGUMENTS, CONFLICT) else None
        if first["type"] == "extra_forbidden":
            param = param[:120] if param else None
            match = nearest(str(first["loc"][-1])[:120], kind.model_fields)
            message = "unknown field" + (f"; did you mean '{match}'?" if match else "")
            code = "unknown_parameter"
        raise ApiError(400, f"{param}: {message}" if param else message, param=param, code=code) from error


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from pydantic's location; the names of union members are not part of it."""
    path = str(location[0]) if location else ""
    for step in location[1:]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _UNION_TAGS and "[" not in step:
            path += f".{step}"
    return path


_UNION_TAGS = frozenset({"system", "developer", "user", "assistant", "tool", "str", "int", "NamedTool", "AllowedTools"})
_UNION_TAGS |= {"text-prompt", "token-prompt", "text-prompts", "token-prompts"}
