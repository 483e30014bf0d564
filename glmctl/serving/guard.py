"""The door: what is checked of every HTTP request before any route sees it, whatever its path says."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glmctl.serving import page
from glmctl.serving.api_error import ApiError
from glmctl.serving.body import MAX_BODY_BYTES
from glmctl.serving.keys import carries
from glmctl.serving.service import Service

PAGE_PATHS = frozenset(page.FILES)
"""the chat page itself, the same for everybody: it asks for the key and sends it with what it asks"""
ADMIN_PREFIX = "/admin/"
MAX_HEADER_BYTES = 64 * 1024

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ANSWERED_WHILE_DRAINING = frozenset({"/health", "/ready", "/metrics"})

_SHUTTING_DOWN = ApiError(503, "the server is shutting down", code="draining")


class Guard:
    """ASGI middleware around the whole application.

    key: what every request but one for the page must carry; None = no authentication. admin_key: what requests under
    /admin/ must carry instead; None = there is no such route. loopback: the server is bound to this machine only, so
    a foreign Host header is DNS rebinding and is refused, and so is a foreign page's Origin.
    """

    def __init__(
        self, app: ASGIApp, *, service: Service, key: str | None, admin_key: str | None = None, loopback: bool
    ) -> None:
        self._app = app
        self._service = service
        self._key = None if key is None else key.encode("utf-8")
        self._admin_key = None if admin_key is None else admin_key.encode("utf-8")
        self._loopback = loopback
        self._busy: set[asyncio.Task[None] | None] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._cutting = False

    async def wait_idle(self, seconds: float) -> bool:
        """Returns when no request is being answered, or when the time is up: False then."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def cut(self) -> None:
        """End every request under way: with a 503 where no answer has begun."""
        self._cutting = True
        for task in self._busy:
            if task is not None:
                task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an acceptable request on; answer any other. Counts responses by status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._service.metrics.responses.labels(str(message["status"])).inc()
            await send(message)

        task = asyncio.current_task()
        self._busy.add(task)
        self._idle.clear()
        try:
            problem = self._problem(scope)
            if problem is not None:
                await problem.response(scope["path"])(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        except asyncio.CancelledError:
            if not self._cutting:
                raise
            if not begun:
                closing = {"Connection": "close"}  # the rest of its body will not be read
                await _SHUTTING_DOWN.response(scope["path"], closing)(scope, receive, counted)
        finally:
            self._busy.discard(task)
            if not self._busy:
                self._idle.set()

    def _problem(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        path = scope["path"]
        # h11 bounds what it waits for; a head that came in one piece may be longer
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes", code="headers_too_large")
        lengths = headers.get(b"content-length", [])
        if len(lengths) > 1 or (lengths and b"transfer-encoding" in headers):
            return ApiError(400, "conflicting lengths of the request body", code="bad_framing")
        if self._loopback and not _local(headers.get(b"host", [])):
            return ApiError(421, "this server answers on the loopback interface only", code="unknown_host")
        if self._loopback and not all(_names_loopback(origin) for origin in headers.get(b"origin", [])):
            return ApiError(403, "requests from other sites' pages are refused", code="foreign_origin")
        # decided by the path that the router will see: whatever starts so can reach admin routes only
        key = self._admin_key if path.startswith(ADMIN_PREFIX) else self._key
        if key is None and path.startswith(ADMIN_PREFIX):
            return ApiError(404, "no such route")
        if key is not None and path not in PAGE_PATHS and not carries(headers, key):
            return ApiError(401, "a valid API key is needed", code="invalid_api_key")
        if lengths and lengths[0].isdigit() and int(lengths[0][:20]) > MAX_BODY_BYTES:
            return ApiError(413, f"the request body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
        if self._service.draining and path not in _ANSWERED_WHILE_DRAINING:
            return _SHUTTING_DOWN
        return None


def _local(hosts: list[bytes]) -> bool:
    """Whether there is one Host header and it names this machine."""
    return len(hosts) == 1 and _names_loopback(b"//" + hosts[0])


def _names_loopback(url: bytes) -> bool:
    try:
        return urlsplit(url).hostname in {name.encode() for name in _LOOPBACK_NAMES}
    except ValueError:
        return False
