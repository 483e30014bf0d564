"""Step 1 of agentic data, tool collection: functions, documents and servers as declared tools that can be called."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from glmctl.errors import DataError, RecipeError, unknown
from glmctl.recipe.agentic import PythonTools
from glmctl.rl.environment import Tool

Arguments = Mapping[str, Any]


class ToolboxDied(Exception):
    """The machinery behind the tools is gone (a server died, a socket closed): nobody's answer is to blame."""


class Toolbox(Protocol):
    """Tools on offer. `call` returns what the model gets to read, errors of a tool included."""

    @property
    def tools(self) -> list[Tool]: ...

    def call(self, name: str, arguments: Arguments) -> str:
        """Run one tool. Raises ToolboxDied when it cannot be run any more."""
        ...

    def close(self) -> None: ...


def declare(name: str, description: str, parameters: Mapping[str, Any]) -> Tool:
    """A tool in OpenAI's shape; `parameters` is a JSON schema of type object."""
    function = {"name": name, "description": description.strip(), "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def tool_name(tool: Tool) -> str:
    """The name of a declared tool."""
    return str(tool["function"]["name"])


class PythonToolbox:
    """Functions of a module. An exception is the tool's answer, as it would be of any other tool."""

    def __init__(self, spec: PythonTools) -> None:
        """RecipeError when the module or a function is not there, or a function cannot be declared."""
        module = _load(spec.module)
        public = {
            name: one
            for name, one in vars(module).items()
            if inspect.isfunction(one) and one.__module__ == module.__name__ and not name.startswith("_")
        }
        for name in spec.functions:
            if name not in public:
                raise unknown("function", name, public, where=spec.module)
        self._functions: dict[str, Callable[..., Any]] = {
            name: one for name, one in public.items() if not spec.functions or name in spec.functions
        }
        if not self._functions:
            raise RecipeError(f"{spec.module}: no public functions")
        self.tools = [declaration_of(one, where=spec.module) for one in self._functions.values()]

    def call(self, name: str, arguments: Arguments) -> str:
        """See `Toolbox`."""
        try:
            return as_text(self._functions[name](**arguments))
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is what the model is told
            return f"error: {type(error).__name__}: {error}"

    def close(self) -> None:
        """Nothing is held."""


def as_text(value: Any) -> str:
    """A result as the model reads it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def declaration_of(function: Callable[..., Any], *, where: str) -> Tool:
    """A function's declaration from its annotations and docstring. RecipeError when a parameter cannot be declared."""
    name = function.__name__
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise RecipeError(f"{where}: {name}: {error}") from error
    properties: dict[str, Any] = {}
    required = []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RecipeError(f"{where}: {name}: parameter '{key}' cannot be given by name")
        properties[key] = schema_of(hints.get(key, Any))
        if parameter.default is parameter.empty:
            required.append(key)
        else:
            properties[key] = {**properties[key], "default": parameter.default}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return declare(name, inspect.getdoc(function) or "", schema)


_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}


def schema_of(annotation: Any) -> dict[str, Any]:
    """The JSON schema of a type annotation; {} (anything) for what JSON has no type for."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        kept = [schema_of(one) for one in arguments if one is not type(None)]
        return kept[0] if len(kept) == 1 else {"anyOf": kept}
    if origin in (list, tuple, set):
        return {"type": "array", **({"items": schema_of(arguments[0])} if arguments else {})}
    kind = _NAMES.get(origin or annotation)
    return {"type": kind} if kind else {}


def _load(name: str) -> types.ModuleType:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise RecipeError(f"{name}: no such module: {error}") from error
    path = Path(name)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_declarations(path: Path) -> list[Tool]:
    """A JSON list of tools in OpenAI's shape. RecipeError or DataError says what is wrong."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a list of tool declarations")
    found = []
    for number, row in enumerate(rows):
        function = row.get("function", row) if isinstance(row, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{path}: tool {number} has no name")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        found.append(declare(function["name"], str(function.get("description") or ""), parameters))
    return found
