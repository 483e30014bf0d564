"""What a client is told when a request cannot be served: OpenAI's error shape, Anthropic's on Anthropic's routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

RETRY_AFTER_SECONDS = 1
ANTHROPIC_PREFIX = "/v1/messages"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {**_TYPES, 413: "request_too_large", 503: "overloaded_error"}


class ApiError(Exception):
    """An HTTP status with a message, the request field it is about, and a machine-readable code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`, as the official clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """`{"type": "error", "error": {type, message}}`."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str, extra: Mapping[str, str] | None = None) -> JSONResponse:
        """The error as an HTTP response to a request for `path`; rejections that pass carry Retry-After."""
        headers = dict(extra or {})
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
        if self.status == 408:
            headers["Connection"] = "close"  # the rest of the body may come at any time, and is no request
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PREFIX) else self.body()
        return JSONResponse(body, status_code=self.status, headers=headers)
