"""What the server does to clients that are slow, foreign or in the way, and what it publishes about itself."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from uvicorn.server import ServerState

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.errors import RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.serving import body as reader
from glmctl.serving import connection, openapi
from glmctl.serving.app import create_app
from glmctl.serving.guard import ADMIN_PREFIX, PAGE_PATHS
from glmctl.serving.keys import read_key
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

KEY, ADMIN_KEY = "key-1", "key-2"


def service_of(config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> Service:
    engine = Engine(GlmMoe(config, seed=seed), max_slots=2, token_bytes=lambda token: tokenizer.decode_bytes([token]))
    return Service("tiny", tokenizer, ChatTemplate(tokenizer), EngineWorker(engine, 4))


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    service = service_of(tiny_config, tiny_tokenizer)
    with running(Server(service, "127.0.0.1", 0, key=KEY, admin_key=ADMIN_KEY)) as server:
        yield server


def call(
    server: Server, method: str, path: str, body: Any = None, *, key: str | None = KEY, **headers: str
) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, raw, response.headers


# ------------------------------------------------------------------ slow clients


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: local"])
def test_an_unfinished_head_ends_the_connection(server: Server, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(sent)
        assert client.recv(100) == b""


def test_a_trickle_does_not_keep_the_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.02) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n")
        for number in range(3000):
            try:
                client.sendall(b"X-%d: y\r\n" % number)
                if client.recv(100) == b"":
                    return
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                return
    raise AssertionError("the connection was kept for a minute")


def test_an_unfinished_body_is_told_and_ends_the_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BODY_SECONDS", 0.2)
    headers = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 9\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n{{".encode())
        with client.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 408")  # to the end of the connection


def test_a_second_request_on_a_connection_has_its_own_clock(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    request = f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(request)
        answer = b""
        while not answer.endswith(b"}"):
            answer += client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200")
        client.sendall(request[:20])
        assert client.recv(100) == b""


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock, which stops when it reads again. (The kernel goes on offering what it has buffered, so the
    client itself cannot tell.)"""
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.01)

    class Transport(asyncio.Transport):
        def __init__(self) -> None:
            super().__init__()
            self.aborted = asyncio.Event()

        def abort(self) -> None:
            self.aborted.set()

        def close(self) -> None: ...

        def is_closing(self) -> bool:
            return self.aborted.is_set()

    async def cut(*, reads: bool) -> bool:
        transport, served = Transport(), connection.Connection(config, ServerState(), {})
        served.connection_made(transport)
        served.pause_writing()
        if reads:
            served.resume_writing()
        try:
            await asyncio.wait_for(transport.aborted.wait(), 0.3 if reads else 30)
        except TimeoutError:
            return False
        finally:
            served.connection_lost(None)
        return True

    config = uvicorn.Config(lambda scope: None, log_config=None)
    assert asyncio.run(cut(reads=False))
    assert not asyncio.run(cut(reads=True))


# ------------------------------------------------------------------ keys


def test_every_route_needs_the_key_that_it_is_for(server: Server, tiny_config: ModelConfig) -> None:
    routes = [(route.path, method) for route in server._app._app.routes for method in sorted(route.methods)]
    assert len(routes) >= 14
    for path, method in routes:
        path = path.replace("{name:path}", "tiny")
        admin = path.startswith(ADMIN_PREFIX)
        statuses = {key: call(server, method, path, key=key)[0] for key in (None, "x", KEY, ADMIN_KEY)}
        if path in PAGE_PATHS:
            assert set(statuses.values()) == {200}, path
            continue
        assert statuses[None] == statuses["x"] == 401, path
        assert statuses[ADMIN_KEY if admin else KEY] != 401, path
        assert statuses[KEY if admin else ADMIN_KEY] == 401, path


@pytest.mark.parametrize(
    "target",
    [
        "/admin/weights",
        "/v1/../admin/weights",
        "//admin/weights",
        "/admin%2fweights",
        "/ADMIN/weights",
        "/admin/weights/",
    ],
)
def test_no_way_around_the_admin_key(server: Server, target: str) -> None:
    for host in ("localhost", "localhost/admin", "admin"):
        request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(request)
            assert client.recv(4096).split(b" ", 2)[1] in (b"401", b"404", b"421")


def test_without_an_admin_key_there_is_no_admin_route(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    with running(Server(service_of(tiny_config, tiny_tokenizer), "127.0.0.1", 0)) as server:
        assert call(server, "GET", "/admin/weights", key=None)[0] == 404


def test_a_foreign_origin_is_refused_and_gets_no_cors_header(server: Server) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1@evil.example"):
        status, _, headers = call(server, "GET", "/v1/models", Origin=origin)
        assert (status, headers["Access-Control-Allow-Origin"]) == (403, None)
    assert call(server, "GET", "/v1/models", Origin=f"http://127.0.0.1:{server.port}")[0] == 200


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLMCTL_API_KEY", raising=False)
    path = tmp_path / "key"
    path.write_text("secret\n")
    path.chmod(0o640)
    with pytest.raises(RecipeError, match="read by others"):
        read_key("GLMCTL_API_KEY", str(path), "api_key_file")
    path.chmod(0o600)
    assert read_key("GLMCTL_API_KEY", str(path), "api_key_file") == "secret"
    for content in ("", "two words", "ä", "a" * 5000):
        path.write_text(content)
        with pytest.raises(RecipeError):
            read_key("GLMCTL_API_KEY", str(path), "api_key_file")
    with pytest.raises(RecipeError, match="No such file"):
        read_key("GLMCTL_API_KEY", str(tmp_path / "none"), "api_key_file")
    assert read_key("GLMCTL_API_KEY", None, "api_key_file") is None
    monkeypatch.setenv("GLMCTL_API_KEY", "from the environment")
    assert read_key("GLMCTL_API_KEY", None, "api_key_file") == "from the environment"


# ------------------------------------------------------------------ weights


def test_admin_swaps_the_weights_under_way(
    server: Server, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = GlmMoe(tiny_config, seed=1)
    tiny_tokenizer.save(tmp_path)
    save_model(other, tmp_path)
    body = {"model": "tiny", "prompt": "def add(", "max_tokens": 8, "temperature": 0}
    before = json.loads(call(server, "POST", "/v1/completions", body)[1])
    status, raw, _ = call(server, "POST", "/admin/weights", {"path": str(tmp_path), "version": 7}, key=ADMIN_KEY)
    assert (status, json.loads(raw)) == (200, {"version": 7})
    after = json.loads(call(server, "POST", "/v1/completions", body)[1])
    assert after["system_fingerprint"] == "glmctl-weights-7" != before["system_fingerprint"]
    assert after["choices"][0]["text"] != before["choices"][0]["text"]
    engine = Engine(other, max_slots=1)
    served = next(iter(torch.nn.utils.parameters_to_vector(server._service.worker._engine.model.parameters())))
    assert served == next(iter(torch.nn.utils.parameters_to_vector(engine.model.parameters())))
    for wrong in ({"path": str(tmp_path / "none"), "version": 8}, {"path": str(tmp_path)}, {"version": 8}):
        assert call(server, "POST", "/admin/weights", wrong, key=ADMIN_KEY)[0] == 400
    assert json.loads(call(server, "GET", "/admin/weights", key=ADMIN_KEY)[1]) == {"version": 7}


# ------------------------------------------------------------------ the page and the document


def test_the_page_allows_nothing_foreign(server: Server) -> None:
    for path in PAGE_PATHS:
        status, raw, headers = call(server, "GET", path, key=None)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        text = raw.decode()
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
        assert "style=" not in text


def test_the_document_describes_every_route(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    app: Any = create_app(service_of(tiny_config, tiny_tokenizer))._app
    served = {(route.path, method) for route in app.routes for method in route.methods}
    document = openapi.document("tiny")
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    hidden = {(path, "GET") for path in (*PAGE_PATHS, "/openapi.json", "/v1/models/{name:path}", "/admin/weights")}
    assert served - hidden - {("/admin/weights", "POST")} == described
