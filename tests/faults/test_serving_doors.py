"""Row S8 of the reliability plan: no Host header, request target or extra header opens a route without its key.

The server is one that others can reach, so that nothing but the key stands in the way.
"""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving.page import FILES
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

KEY, ADMIN_KEY = "key-1", "key-2"

HOSTS = [
    "localhost",
    "127.0.0.1",
    "[::1]",
    "evil.example",
    "",
    "/",
    "localhost/page.js",
    "localhost/page.js?",
    "localhost#/page.js",
    "localhost\\page.js",
    "page.js",
    "localhost:80@evil.example",
    "localhost:99999",
    "localhost, evil.example",
    "localhost/admin/weights",
    "x/v1/models?",
]
TARGETS = [
    "/v1/models",
    "//v1/models",
    "/./v1/models",
    "/%2e/v1/models",
    "/page.js/../v1/models",
    "/page.js%2f..%2fv1%2fmodels",
    "/page.js/%2e%2e/metrics",
    "/page.css;/v1/models",
    "/page.js/",
    "/page.js%00",
    "/page.js%3f/../metrics",
    "/v1/models?/page.js",
    "/v1/models#/page.js",
    "/v1/models;/page.js",
    "/v1/models%23/",
    "/v1/%6dodels",
    "/v1\\models",
    "/V1/MODELS",
    "/v1/models/",
    "/v1/models/tiny",
    "http://localhost/v1/models",
    "http://localhost/page.js?/v1/models",
    "https://evil.example/metrics",
    "*",
    "/metrics",
    "/%6detrics",
    "/health",
    "/ready",
    "/tokenizer_info",
    "/openapi.json",
    "/docs",
    "/admin/weights",
    "//admin/weights",
    "/%61dmin/weights",
    "/admin%2fweights",
    "/page.js/../admin/weights",
    "/..;/admin/weights",
]
HEADERS = [
    "",
    "X-Original-URL: /page.js\r\n",
    "X-Rewrite-URL: /\r\n",
    "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Host: localhost\r\nX-Forwarded-Prefix: /page.js\r\n",
    "Forwarded: for=127.0.0.1;host=localhost\r\n",
    "X-HTTP-Method-Override: OPTIONS\r\n",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YQ==\r\n",
    f"X_Api_Key: {KEY}\r\n",
    f"Cookie: key={KEY}\r\n",
    f"Proxy-Authorization: Bearer {KEY}\r\n",
    f"Authorization: Bearer {KEY}, Bearer x\r\n",
    f"Authorization: Bearer {KEY.upper()}\r\n",
    f"Authorization: Bearer {ADMIN_KEY}\r\n",
]


@contextmanager
def serving(config: ModelConfig, tokenizer: Tokenizer, host: str) -> Iterator[Server]:
    engine = Engine(GlmMoe(config, seed=0), max_slots=1, token_bytes=lambda token: tokenizer.decode_bytes([token]))
    service = Service("tiny", tokenizer, ChatTemplate(tokenizer), EngineWorker(engine, 4))
    server = Server(service, host, 0, key=KEY, admin_key=ADMIN_KEY)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    with serving(tiny_config, tiny_tokenizer, "0.0.0.0") as server:
        yield server


def answer(server: Server, request: str) -> tuple[int, bytes]:
    """Status and body of the answer to bytes as they stand."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request.encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


@pytest.fixture(scope="module")
def public(server: Server) -> set[bytes]:
    """What everybody may read."""
    return {answer(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")[1] for path in FILES}


def test_no_target_or_host_opens_anything(server: Server, public: set[bytes]) -> None:
    for target in TARGETS:
        for host in HOSTS:
            status, body = answer(server, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")
            opened = status == 200 and body not in public
            assert not opened, (target, host)
            assert status in (200, 400, 401), (target, host, status)


def test_no_header_opens_anything(server: Server) -> None:
    for header in HEADERS:
        for target in ("/v1/models", "/metrics", "/openapi.json"):
            status, _ = answer(server, f"GET {target} HTTP/1.1\r\nHost: x\r\n{header}\r\n")
            assert status == 401, (target, header)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "get"])
def test_no_method_opens_anything(server: Server, method: str) -> None:
    request = f"{method} /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request.encode())
        assert connection.recv(4096).split(b" ", 2)[1] == b"401"


def test_the_admin_key_is_for_admin_routes_and_opens_them(server: Server) -> None:
    for path, key, expected in (
        ("/admin/weights", ADMIN_KEY, 200),
        ("/admin/weights", KEY, 401),
        ("/v1/models", KEY, 200),
        ("/v1/models", ADMIN_KEY, 401),
        ("//admin/weights", KEY, 404),
        ("/%61dmin/weights", KEY, 401),
    ):
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n"
        assert answer(server, request)[0] == expected, (path, key)


def test_one_request_smuggled_behind_another_needs_the_key_too(server: Server) -> None:
    inner = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    outer = f"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n{inner}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(outer.encode())
        with connection.makefile("rb") as answers:
            statuses = [line.split()[1] for line in answers if line.startswith(b"HTTP/1.1 ")]
    assert statuses == [b"200", b"401"]


def open_ports() -> set[str]:
    """Address and port of every socket of this process that anybody could send something to."""
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if inode in own and (state == "0A" or table.startswith("udp")):
                found.add(local)
    return found


def test_a_server_listens_where_it_says_and_nowhere_else(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    before = open_ports()
    with serving(tiny_config, tiny_tokenizer, "127.0.0.1") as server:
        assert (
            answer(server, f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n")[0] == 200
        )
        # the kernel writes 127.0.0.1 with its bytes reversed
        assert open_ports() - before == {f"0100007F:{server.port:04X}"}
