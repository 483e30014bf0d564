"""Verifiers that may hang, crash or say anything, in a process of their own with a time limit.

A verifier is a Python function `(reply: str, problem: dict) -> float`, named `package.module:function`. It is the
user's own code and is trusted; it is kept apart so that its faults are infrastructure and not the trainer's end:
an exception, a hang, a crash, NaN, infinity, a string or a number outside -1..1 masks the sample (reliability R1).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from typing import Any

from glmctl.rl.environment import InfrastructureFailure, Problem

LIMIT_SECONDS = 10.0
START_SECONDS = 60.0
"""how long a new process may take to start and import the verifier's module; judging has its own limit"""

# the answer travels over a pipe of its own: what a verifier prints is its own affair.
# A request without a reply only imports: a hang ends the process, so every judgement after one waits for an import too
_PROCESS = """
import importlib, json, os, sys
answers = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    request = json.loads(line)
    module, _, name = request["verifier"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        body = {}
        if "reply" in request:
            value = function(request["reply"], request["problem"])
            body = {"value": value if type(value) in (bool, int, float) else repr(value)[:80]}
    except BaseException as error:
        body = {"error": f"{type(error).__name__}: {error}"[:200]}
    answers.write(json.dumps({"nonce": request["nonce"], **body}) + "\\n")
    answers.flush()
"""


class _Process:
    """One verifier process; it serves until it misses its time or dies."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
        )
        os.close(writer)
        self.loaded: set[str] = set()

    def judge(self, verifier: str, reply: str, problem: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer to one reply, `limit` seconds after the verifier's module is imported at the latest."""
        if verifier not in self.loaded:
            answer = self._ask({"verifier": verifier}, START_SECONDS, "import")
            if "error" in answer:
                return answer
            self.loaded.add(verifier)
        return self._ask({"verifier": verifier, "reply": reply, "problem": problem}, limit, "verdict")

    def _ask(self, request: dict[str, Any], limit: float, wanted: str) -> dict[str, Any]:
        """Its answer. Raises InfrastructureFailure when it dies, or has not said `wanted` in `limit` seconds."""
        assert self.process.stdin is not None
        nonce = secrets.token_hex(8)
        request["nonce"] = nonce
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise InfrastructureFailure("the verifier's process has died") from error
        said, deadline = b"", time.monotonic() + limit
        with selectors.DefaultSelector() as ready:
            ready.register(self.reader, selectors.EVENT_READ)
            while not said.endswith(b"\n"):
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    raise InfrastructureFailure(f"{request['verifier']}: no {wanted} within {limit:g} s")
                chunk = os.read(self.reader, 1 << 16)
                if not chunk:
                    raise InfrastructureFailure(f"{request['verifier']}: the process died, {self.process.wait()}")
                said += chunk
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError as error:
            raise InfrastructureFailure(f"{request['verifier']}: {said[:80]!r} is no answer") from error
        if answer.get("nonce") != nonce:
            raise InfrastructureFailure(f"{request['verifier']}: an answer to another question")
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        # a process that died between two questions leaves one in the buffer, and closing tries to write it
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self.reader)


_current: _Process | None = None


def verify(verifier: str, reply: str, problem: Problem, limit: float = LIMIT_SECONDS) -> float:
    """The reward that `verifier` gives. Raises InfrastructureFailure for everything but a number in -1..1."""
    global _current
    if _current is None:
        _current = _Process()
        atexit.register(stop)
    try:
        answer = _current.judge(verifier, reply, problem.to_row(), limit)
    except InfrastructureFailure:
        stop()
        raise
    if "error" in answer:
        raise InfrastructureFailure(f"{verifier}: {answer['error']}")
    value = answer["value"]
    # NaN compares as false; `math.isfinite` overflows on an integer that is too large for a float
    if isinstance(value, str) or not abs(value) <= 1:
        raise InfrastructureFailure(f"{verifier}: {value!r} is no reward: a number from -1 to 1 is")
    return float(value)


def stop() -> None:
    """End the verifier's process, if there is one; the next verdict starts another."""
    global _current
    if _current is not None:
        _current.close()
        _current = None
        atexit.unregister(stop)
