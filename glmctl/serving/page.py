"""The chat page: three static files, no assets from elsewhere, and nothing that a model writes is ever HTML."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

# fetch to the same server is all that the page does; even its own inline scripts and styles would not run
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
"""path -> (file, media type)"""


def add_routes(app: FastAPI) -> None:
    """`GET` of each file."""
    folder = resources.files("glmctl.serving") / "static"
    for path, (name, media) in FILES.items():
        app.get(path, response_model=None)(_sender((folder / name).read_bytes(), media))


def _sender(content: bytes, media: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=media, headers=_HEADERS)

    return send
