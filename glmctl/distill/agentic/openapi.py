"""OpenAPI 3 documents as tools: one operation, one function; path, query, header and body are its arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request, urlopen

import yaml

from glmctl.distill.agentic.toolbox import Arguments, ToolboxDied, declare, tool_name
from glmctl.errors import DataError, RecipeError, unknown
from glmctl.recipe.agentic import OpenApiTools
from glmctl.rl.environment import Tool

METHODS = ("get", "post", "put", "patch", "delete")
PLACES = ("path", "query", "header")
MAX_ANSWER_BYTES = 64 * 1024
"""of an answer are shown to the model; the rest of a larger one is cut"""
MAX_DEPTH = 16
"""references inside references; a schema that contains itself ends there as anything"""


@dataclass(frozen=True)
class Operation:
    """How a function's arguments become a request."""

    method: str
    path: str
    places: dict[str, str]
    """argument -> path, query or header"""
    body: frozenset[str] = field(default_factory=frozenset)
    """arguments that are members of the JSON body"""


class OpenApiToolbox:
    """The operations of a document. What the server says, an error status included, is what the model reads."""

    def __init__(self, spec: OpenApiTools) -> None:
        """RecipeError for a file that is not there, an unknown operation, or a key or server that cannot be used.

        DataError for what is no OpenAPI 3.
        """
        document = _read(Path(spec.path))
        self._timeout = spec.timeout_seconds
        key = os.environ.get(spec.api_key_env) if spec.api_key_env else None
        if key and not (key.isascii() and key.isprintable()):
            # said here, for a call would say it with the key in it, and to the model
            raise RecipeError(f"{spec.api_key_env}: its value cannot be sent in a header: a line break, or not ASCII")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._operations: dict[str, Operation] = {}
        self.tools: list[Tool] = []
        for path, item in document["paths"].items():
            for method in METHODS:
                if method in item:
                    self._collect(document, path, method, item)
        for name in spec.operations:
            if name not in self._operations:
                raise unknown("operation", name, self._operations, where=spec.path)
        if spec.operations:
            self.tools = [tool for tool in self.tools if tool_name(tool) in spec.operations]
        servers = document.get("servers") or [{}]
        base = spec.base_url or servers[0].get("url", "")
        if not base.startswith(("http://", "https://")):
            raise RecipeError(f"{spec.path}: the document names no server; set base_url")
        try:
            _ = urlsplit(base).port
        except ValueError as error:
            raise RecipeError(f"{spec.path}: '{base}' is no address of a server: {error}") from error
        self._base = base.rstrip("/")

    def call(self, name: str, arguments: Arguments) -> str:
        """See `Toolbox`. What no request can hold (a line break in a header, say) is an error that the model reads."""
        try:
            return self._answer(self._request(self._operations[name], arguments))
        except (ValueError, InvalidURL) as error:
            return f"error: {error}"
        except (OSError, HTTPException) as error:
            raise ToolboxDied(f"{self._base} does not answer: {error!r}") from error

    def close(self) -> None:
        """Nothing is held."""

    def _request(self, operation: Operation, arguments: Arguments) -> Request:
        """ValueError for text that has no place in an address."""
        path, query, headers = operation.path, {}, {"Accept": "application/json", **self._headers}
        for key, place in operation.places.items():
            if key not in arguments:
                continue
            value = arguments[key] if isinstance(arguments[key], str) else json.dumps(arguments[key])
            if place == "path":
                path = path.replace("{" + key + "}", quote(value, safe=""))
            elif place == "query":
                query[key] = value
            else:
                headers[key] = value
        body = {key: arguments[key] for key in operation.body if key in arguments}
        url = f"{self._base}{path}" + (f"?{urlencode(query)}" if query else "")
        data = json.dumps(body).encode() if body else None
        if data is not None:
            headers["Content-Type"] = "application/json"
        return Request(url, data, headers, method=operation.method.upper())

    def _answer(self, request: Request) -> str:
        """What the server says. OSError or HTTPException when it breaks off, over an error status too."""
        try:
            with urlopen(request, timeout=self._timeout) as answer:
                text: str = answer.read(MAX_ANSWER_BYTES).decode("utf-8", "replace")
                return text
        except HTTPError as error:
            said = error.read(MAX_ANSWER_BYTES).decode("utf-8", "replace")
            return f"error: HTTP {error.code}: {said}"

    def _collect(self, document: Any, path: str, method: str, item: Any) -> None:
        """Declare one operation."""
        operation = item[method]
        name = operation.get("operationId") or f"{method}_{path}".replace("/", "_").translate({123: None, 125: None})
        properties: dict[str, Any] = {}
        required: list[str] = []
        places: dict[str, str] = {}
        for given in [*item.get("parameters", []), *operation.get("parameters", [])]:
            parameter = resolved(given, document)
            if parameter.get("in") not in PLACES:
                continue
            key = parameter["name"]
            schema = resolved(parameter.get("schema", {}), document)
            about = parameter.get("description")
            properties[key] = {**schema, **({"description": about} if about else {})}
            places[key] = parameter["in"]
            if parameter.get("required"):
                required.append(key)
        content = resolved(operation.get("requestBody", {}), document).get("content", {})
        body = resolved(content.get("application/json", {}).get("schema", {}), document)
        properties |= body.get("properties", {})
        required += body.get("required", [])
        self._operations[name] = Operation(method, path, places, frozenset(body.get("properties", {})))
        about = operation.get("description") or operation.get("summary") or ""
        schema = {"type": "object", "properties": properties, "required": list(dict.fromkeys(required))}
        self.tools.append(declare(name, about, schema))


def resolved(value: Any, document: Any, depth: int = 0) -> Any:
    """`value` with every local `$ref` replaced by what it points to. DataError for one that points nowhere."""
    if depth > MAX_DEPTH:
        return {}
    if isinstance(value, list):
        return [resolved(one, document, depth) for one in value]
    if not isinstance(value, Mapping):
        return value
    reference = value.get("$ref")
    if isinstance(reference, str):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            if not isinstance(target, Mapping) or part not in target or not reference.startswith("#/"):
                raise DataError(f"the document has no '{reference}'")
            target = target[part]
        return resolved(target, document, depth + 1)
    return {key: resolved(one, document, depth) for key, one in value.items()}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    version = str(document.get("openapi", "")) if isinstance(document, dict) else ""
    if not version.startswith("3.") or not isinstance(document.get("paths"), dict):
        raise DataError(f"{path}: not an OpenAPI 3 document (`openapi: 3.x` and `paths`)")
    return document
