"""The door: what is checked of every HTTP request before any route sees it, whatever its path says."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmctl.serving.api_error import ApiError
from glmctl.serving.body import MAX_BODY_BYTES
from glmctl.serving.service import Service

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ANSWERED_WHILE_DRAINING = frozenset({"/health", "/ready", "/metrics"})


class Guard:
    """ASGI middleware around the whole application.

    key: bearer token that every request must carry; None = no authentication. loopback: the server is bound to
    this machine only, so a foreign Host header is DNS rebinding and is refused.
    """

    def __init__(self, app: ASGIApp, *, service: Service, key: str | None, loopback: bool) -> None:
        self._app = app
        self._service = service
        self._key = None if key is None else key.encode("utf-8")
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an acceptable request on; answer any other. Counts responses by status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.responses[message["status"]] += 1
            await send(message)

        problem = self._problem(scope)
        if problem is not None:
            await problem.response()(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        lengths = headers.get(b"content-length", [])
        if len(lengths) > 1 or (lengths and b"transfer-encoding" in headers):
            return ApiError(400, "conflicting lengths of the request body", code="bad_framing")
        if self._loopback and not _local(headers.get(b"host", [])):
            return ApiError(421, "this server answers on the loopback interface only", code="unknown_host")
        if self._key is not None and not self._authorised(headers.get(b"authorization", [])):
            return ApiError(401, "a valid API key is needed", code="invalid_api_key")
        if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > MAX_BODY_BYTES:
            return ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
        if self._service.draining and scope["path"] not in _ANSWERED_WHILE_DRAINING:
            return ApiError(503, "the server is shutting down", code="draining")
        return None

    def _authorised(self, values: list[bytes]) -> bool:
        assert self._key is not None
        if len(values) != 1:
            return False
        scheme, _, given = values[0].partition(b" ")
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"


def _local(hosts: list[bytes]) -> bool:
    """Whether there is one Host header and it names this machine."""
    if len(hosts) != 1:
        return False
    try:
        return urlsplit(b"//" + hosts[0]).hostname in {name.encode() for name in _LOOPBACK_NAMES}
    except ValueError:
        return False
