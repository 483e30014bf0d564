"""The HTTP executor of candidates: its contract against a real server, and its failures are no zeros (R1)."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from glmctl.recipe.schema import SandboxSpec
from glmctl.rl.environment import InfrastructureFailure
from glmctl.rl.sandbox import boxes, execute
from glmctl.rl.sandbox.execute import run_tests, sandbox

CANDIDATE = str(importlib.resources.files("glmctl.rl.sandbox").joinpath("candidate.py"))
HONEST = "def add(a, b):\n    return a + b\n"
CASES = [([1, 2], 3), ([4, 5], 9)]


def obey(request: dict[str, Any]) -> bytes:
    """What the contract asks of an executor, with no more of a box than a time limit."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", CANDIDATE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    greeting = process.stdout.read(len(request["nonce"]))
    try:
        rest, _ = process.communicate(timeout=request["wall_seconds"])
    except subprocess.TimeoutExpired:
        process.kill()
        rest, _ = process.communicate()
    output = (greeting + rest)[: boxes.OUTPUT_BYTES].decode(errors="surrogateescape")
    return json.dumps({"output": output, "seconds": 0.1}).encode()


class Executor(ThreadingHTTPServer):
    """`answer` is how it answers; `seen` and `keys` are what it was asked, and with which key."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[dict[str, Any]], bytes] = obey
        self.status = 200
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Executor

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.keys.append(self.headers["Authorization"])
        answer = self.server.answer(body)
        if not self.server.status:
            self.wfile.write(answer)
            return
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Executor()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    spec = SandboxSpec(
        level="http", url=f"http://127.0.0.1:{server.server_port}/run", wall_seconds=2.0, memory_mb=512, processes=7
    )
    with sandbox(spec):
        yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_right_and_wrong_answers_are_judged_here(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMCTL_SANDBOX_KEY", "k1")
    found = run_tests(HONEST, "add", CASES)
    assert (found.passed, found.total, found.seconds) == (2, 2, 0.1)
    assert run_tests("def add(a, b):\n    return 3\n", "add", CASES).passed == 1
    assert run_tests("def add(a, b):\n    return a - b\n", "add", CASES).passed == 0
    assert executor.keys == ["Bearer k1"] * 3


def test_the_request_is_what_the_candidates_script_reads_and_holds_no_answer(executor: Executor) -> None:
    run_tests(HONEST, "add", CASES)
    (request,) = executor.seen
    assert request.pop("nonce")
    assert request == {
        "code": HONEST,
        "entry": "add",
        "calls": ["[1, 2]", "[4, 5]"],
        # of the recipe, and not of what control groups this machine has
        "rlimits": {"RLIMIT_NPROC": 7, "RLIMIT_AS": 512 << 20, "RLIMIT_CORE": 0},
        "wall_seconds": 2.0,
        "memory_mb": 512,
    }


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(1)",
        "import time\ntime.sleep(60)",
        "not Python",
        # as JSON six times as long as it is: a flood must not become an answer too long to be one
        "import os\nfor f in range(3, 64):\n  try: os.write(f, bytes(1 << 20))\n  except OSError: pass",
        # bytes that are no UTF-8, which an executor may well pass on as half a surrogate pair
        "import os\nfor f in range(3, 64):\n  try: os.write(f, bytes([255]))\n  except OSError: pass",
    ],
    ids=["exits", "hangs", "no Python", "floods", "no UTF-8"],
)
def test_a_candidates_own_failure_is_a_zero(executor: Executor, code: str) -> None:
    assert run_tests(code, "add", CASES).passed == 0


def answers(text: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda request: text.replace("NONCE", request["nonce"]).encode()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (500, "no box to be had"),
        (503, '{"output": "NONCE[]", "seconds": 0.1}'),
        (401, "no key"),
        (200, ""),
        (200, "<html>a proxy's page</html>"),
        (200, '{"output": "NONCE[]"}'),
        (200, '{"seconds": 0.1}'),
        (200, '{"output": null, "seconds": 0.1}'),
        (200, '{"output": "NONCE[]", "seconds": "soon"}'),
        (200, '["NONCE"]'),
        (200, '"NONCE"'),
        (200, "[" * 100_000),
        (200, '{"output": "", "seconds": 0.1}'),
        (200, '{"output": "[[\\"value\\", [\\"int\\", 3]]]", "seconds": 0.1}'),
        (0, "this is no HTTP\r\n\r\n"),
        (0, ""),
        (0, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"),
    ],
)
def test_an_executors_failure_is_infrastructure(executor: Executor, status: int, text: str) -> None:
    executor.status, executor.answer = status, answers(text)
    with pytest.raises(InfrastructureFailure, match=f"127.0.0.1:{executor.server_port}"):
        run_tests(HONEST, "add", CASES)


def test_a_hanging_executor_is_given_up(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(request: dict[str, Any]) -> bytes:
        executor.over.wait()
        return b""

    monkeypatch.setattr(execute, "EXECUTOR_SECONDS", -1.5)  # 0.5 s in all
    executor.answer = hang
    with pytest.raises(InfrastructureFailure, match="timed out"):
        run_tests(HONEST, "add", CASES)


def test_an_executor_that_is_not_there_is_infrastructure(executor: Executor) -> None:
    free = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    free.server_close()
    spec = SandboxSpec(level="http", url=f"http://127.0.0.1:{free.server_port}/run")
    with sandbox(spec), pytest.raises(InfrastructureFailure, match="refused"):
        run_tests(HONEST, "add", CASES)
