"""Clients that go away, more clients than places, an engine that dies: rows are freed, and the rest is not disturbed.

The engine is stepped through a gate where a test must know what is in flight; nothing waits for time to pass.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Event
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

LEAVERS = int(os.environ.get("GLMCTL_SOAK_LEAVERS", "9"))


class GatedEngine(Engine):
    """Steps only while the gate is open; can be told to fail. `stepped` is notified after every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def step(self) -> list[Event]:
        self.gate.wait()
        if self.broken:
            raise RuntimeError("the engine was told to fail")
        return super().step()


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> GlmMoe:
    """Never stops by itself: the closing tokens have a logit of zero, and the best others are far above it."""
    model = GlmMoe(tiny_config, seed=0)
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
        model.lm_head.weight[list(tiny_tokenizer.eos_ids)] = 0
    return model


@contextmanager
def serving(
    model: GlmMoe, tokenizer: Tokenizer, slots: int, queue: int, **options: float
) -> Iterator[tuple[Server, GatedEngine]]:
    engine = GatedEngine(
        model, max_slots=slots, speculative=1, token_bytes=lambda token: tokenizer.decode_bytes([token])
    )
    service = Service("tiny", tokenizer, ChatTemplate(tokenizer), EngineWorker(engine, queue))
    server = Server(service, "127.0.0.1", 0, **options)
    server.start()
    try:
        yield server, engine
    finally:
        engine.gate.set()
        server.stop()


def begin(server: Server, *, stream: bool = True, **fields: Any) -> http.client.HTTPConnection:
    """Send a completion request; the answer is not read yet."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 400, "temperature": 0, "stream": stream, **fields}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


def get(server: Server, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def metric(server: Server, name: str) -> float:
    return next(float(line.split()[1]) for line in get(server, "/metrics")[1].splitlines() if line.startswith(name))


def wait_until_idle(server: Server) -> None:
    """Ask until nothing is inside; the test's own timeout bounds it."""
    while metric(server, "glmctl_requests_running ") or metric(server, "glmctl_requests_queued "):
        pass


def streamed_text(response: http.client.HTTPResponse) -> str:
    events = response.read().decode().split("\n\n")
    assert events[-2] == "data: [DONE]"
    return "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2])


def test_a_full_queue_is_a_429_and_recovers(model: GlmMoe, tiny_tokenizer: Tokenizer) -> None:
    with serving(model, tiny_tokenizer, slots=1, queue=2) as (server, engine):
        engine.gate.clear()
        taken = [begin(server, max_tokens=4) for _ in range(3)]
        responses = [connection.getresponse() for connection in taken]
        assert [response.status for response in responses] == [200] * 3
        for _ in range(5):
            refused = begin(server).getresponse()
            assert refused.status == 429
            assert int(refused.headers["Retry-After"]) >= 1
            error = json.loads(refused.read())["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert get(server, "/ready")[0] == 503
        assert get(server, "/health")[0] == 200
        assert metric(server, "glmctl_requests_rejected_total") == 5
        engine.gate.set()
        assert len({streamed_text(response) for response in responses}) == 1
        wait_until_idle(server)
        assert get(server, "/ready")[0] == 200
        assert begin(server, max_tokens=4).getresponse().status == 200


def test_all_choices_of_a_request_get_in_or_none(model: GlmMoe, tiny_tokenizer: Tokenizer) -> None:
    with serving(model, tiny_tokenizer, slots=1, queue=2) as (server, engine):
        engine.gate.clear()
        first = begin(server, max_tokens=2)
        assert first.getresponse().status == 200
        assert begin(server, n=3).getresponse().status == 429
        two = begin(server, n=2, max_tokens=2, stream=False)
        engine.gate.set()
        assert len(json.loads(two.getresponse().read())["choices"]) == 2


def leave(server: Server, index: int, *, stream: bool) -> None:
    """Ask, and go away: queued, prefilled, or after some chunks, depending on the index."""
    connection = begin(server, prompt="abc" * (1 + index), stream=stream)
    if stream and index % 3:
        response = connection.getresponse()
        for _ in range(2 * index if index < 3 else 1):
            response.readline()
        response.close()
    connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnects_free_the_rows_at_every_point(model: GlmMoe, tiny_tokenizer: Tokenizer, stream: bool) -> None:
    """Drafts are on, so that some leave between a draft and its verification. Row S2 in full: `make soak`."""
    with serving(model, tiny_tokenizer, slots=3, queue=20) as (server, engine):
        alone = streamed_text(begin(server, prompt="xyz", max_tokens=90).getresponse())
        for _ in range(LEAVERS // 9):
            beside = begin(server, prompt="xyz", max_tokens=90).getresponse()
            for index in range(9):
                leave(server, index, stream=stream)
            assert streamed_text(beside) == alone
            wait_until_idle(server)
            assert engine.active == engine.waiting == engine.kv_blocks[0] == 0
        assert metric(server, "glmctl_generations_aborted_total") == LEAVERS // 9 * 9
        assert engine.stats.drafted > 0


def test_a_client_that_leaves_before_the_engine_steps_is_never_prefilled(
    model: GlmMoe, tiny_tokenizer: Tokenizer
) -> None:
    with serving(model, tiny_tokenizer, slots=1, queue=4) as (server, engine):
        engine.gate.clear()
        holder = begin(server, max_tokens=2)
        assert holder.getresponse().status == 200
        gone = begin(server, prompt=[7] * 200, max_tokens=9)
        assert gone.getresponse().status == 200
        gone.close()
        while metric(server, "glmctl_generations_aborted_total") < 1:
            pass
        engine.gate.set()
        wait_until_idle(server)
        assert engine.stats.prompt_tokens < 200


def test_stop_strings_end_the_generation_and_free_the_row(model: GlmMoe, tiny_tokenizer: Tokenizer) -> None:
    with serving(model, tiny_tokenizer, slots=1, queue=4) as (server, engine):
        text = streamed_text(begin(server, max_tokens=30).getresponse())
        stop = text[5:8]
        response = json.loads(begin(server, stop=[stop], stream=False).getresponse().read())
        assert response["choices"][0]["finish_reason"] == "stop"
        assert response["choices"][0]["text"] == text[: text.find(stop)]
        wait_until_idle(server)
        assert engine.active == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_told_to_every_client(model: GlmMoe, tiny_tokenizer: Tokenizer) -> None:
    with serving(model, tiny_tokenizer, slots=1, queue=4) as (server, engine):
        engine.gate.clear()
        streaming, whole = begin(server), begin(server, stream=False)
        response = streaming.getresponse()
        assert response.status == 200
        while metric(server, "glmctl_requests_running ") + metric(server, "glmctl_requests_queued ") < 2:
            pass
        engine.broken = True
        engine.gate.set()
        last = response.read().decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert whole.getresponse().status == 503
        assert get(server, "/health")[0] == 503
        assert get(server, "/ready")[0] == 503
        assert begin(server).getresponse().status == 503


def test_an_engine_that_hangs_is_told_to_every_client(model: GlmMoe, tiny_tokenizer: Tokenizer) -> None:
    """And the server still stops, though the engine's thread never will."""
    with serving(model, tiny_tokenizer, slots=1, queue=4, stall_seconds=0.1) as (server, engine):
        engine.gate.clear()
        streaming, whole = begin(server), begin(server, stream=False)
        last = streaming.getresponse().read().decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert whole.getresponse().status == 503
        assert get(server, "/health")[0] == get(server, "/ready")[0] == 503
        assert begin(server).getresponse().status == 503
        server.stop()
        assert not engine.gate.is_set()


def test_what_outlives_the_drain_is_told_and_leaves_no_traceback(
    model: GlmMoe, tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream, and a body that never comes."""
    with serving(model, tiny_tokenizer, slots=1, queue=4, drain_seconds=0.05) as (server, engine):
        engine.gate.clear()
        stream = begin(server).getresponse()
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as stuck:
            stuck.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
            while len(server._app._busy) < 2:
                get(server, "/health")
            server.stop()
            assert stuck.recv(65536).startswith(b"HTTP/1.1 503")
        last = stream.read().decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert "Traceback" not in caplog.text
