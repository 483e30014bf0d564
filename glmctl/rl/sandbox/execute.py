"""Testing a function that a model wrote: in a box, judged elsewhere. The one door for tasks with code."""

from __future__ import annotations

import http.client
import importlib.resources
import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from glmctl.recipe.schema import SandboxSpec
from glmctl.rl.environment import InfrastructureFailure
from glmctl.rl.sandbox import boxes
from glmctl.rl.sandbox.candidate import plain

JUDGE_SECONDS = 10.0
EXECUTOR_SECONDS = 30.0
"""what an HTTP executor may take beside the candidate's own time"""
ANSWER_BYTES = 6 * boxes.OUTPUT_BYTES + 1024
"""a byte of output is at most six of JSON, `\\u0000`: an answer cut short would be no answer, and not a flood's 0"""
JUDGE_SCRIPT = importlib.resources.files("glmctl.rl.sandbox").joinpath("judge.py")
_DEFAULT = SandboxSpec()
_SPEC: ContextVar[SandboxSpec] = ContextVar("sandbox", default=_DEFAULT)


@dataclass(frozen=True)
class Tested:
    """How many of the calls returned what was expected."""

    passed: int
    total: int
    seconds: float


@contextmanager
def sandbox(spec: SandboxSpec) -> Iterator[None]:
    """Run candidates by `spec` inside the `with`; outside of any, at level B with the default limits."""
    token = _SPEC.set(spec)
    try:
        yield
    finally:
        _SPEC.reset(token)


def current() -> SandboxSpec:
    """The spec that candidates are run by."""
    return _SPEC.get()


def run_tests(code: str, entry: str, cases: Sequence[tuple[list[Any], Any]]) -> Tested:
    """Define `code`, call `entry` with the arguments of each case, and compare with its expected value, types too.

    Arguments are JSON-able, expected values plain data. A candidate that crashes, hangs, floods or returns anything
    else has failed those calls: a true 0. Raises InfrastructureFailure when box or judge failed, EnvironmentProblem
    when the machine does not offer the level.
    """
    spec = _SPEC.get()
    if spec.level == "http":
        return _remote(spec, code, entry, cases)
    boxes.require(spec)
    task = _task(spec, code, entry, cases)
    source = importlib.resources.files("glmctl.rl.sandbox").joinpath("candidate.py").read_text(encoding="utf-8")
    argv = [boxes.INTERPRETER, "-I", "-S", "-c", source]
    try:
        done = boxes.run(argv, json.dumps(task).encode() + b"\n", spec, greeting=task["nonce"].encode())
    except OSError as error:  # of the host: no process, descriptor or control group to be had
        raise InfrastructureFailure(f"the box: {error}") from error
    passed, total = _judge(done.output, task["nonce"], [plain(expected) for _, expected in cases])
    return Tested(passed, total, done.seconds)


def _task(spec: SandboxSpec, code: str, entry: str, cases: Sequence[tuple[list[Any], Any]]) -> dict[str, Any]:
    """What `candidate.py` reads: everything but the expected values."""
    return {
        "code": code,
        "entry": entry,
        "calls": [json.dumps(arguments) for arguments, _ in cases],
        "nonce": secrets.token_hex(16),
        "rlimits": boxes.limits_inside(spec),
    }


def _judge(output: bytes, box_nonce: str, expected: list[Any]) -> tuple[int, int]:
    nonce = secrets.token_hex(16)
    request = {
        "nonce": nonce,
        "box_nonce": box_nonce,
        "output": output.decode("utf-8", errors="replace"),
        "expected": expected,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(JUDGE_SCRIPT)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=JUDGE_SECONDS,
            env={"PATH": "/usr/bin:/bin"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InfrastructureFailure("the judge did not answer in time") from error
    said, _, body = done.stdout.decode(errors="replace").partition(" ")
    if done.returncode != 0 or said != nonce:
        raise InfrastructureFailure(f"the judge failed with exit code {done.returncode}")
    return _counts(body, len(expected))


def _remote(spec: SandboxSpec, code: str, entry: str, cases: Sequence[tuple[list[Any], Any]]) -> Tested:
    """POST {code, entry, calls, nonce, rlimits, wall_seconds, memory_mb} to `spec.url`; it answers {output, seconds}.

    The executor gives the body as one line to `candidate.py` in a box of `wall_seconds` and `memory_mb`, ends its stdin
    once the nonce has come out, and answers 200 with what it wrote to stdout, cut at 1 MiB: of a candidate that crashed
    or was stopped too. Any other status, and an output without the nonce, is a box that failed.
    """
    task = _task(spec, code, entry, cases)
    body = {**task, "wall_seconds": spec.wall_seconds, "memory_mb": spec.memory_mb}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("GLMCTL_SANDBOX_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(str(spec.url), json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=spec.wall_seconds + EXECUTOR_SECONDS) as response:
            answer = json.loads(response.read(ANSWER_BYTES))
        output, seconds = answer["output"], float(answer["seconds"])
        if not isinstance(output, str) or not output.startswith(task["nonce"]):
            raise ValueError("the output does not begin with the nonce: the candidate's code was not loaded")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InfrastructureFailure(f"{spec.url}: {type(error).__name__}: {error}") from error
    # half a surrogate pair is JSON and no UTF-8
    written = output.encode(errors="replace")[: boxes.OUTPUT_BYTES]
    passed, total = _judge(written, task["nonce"], [plain(expected) for _, expected in cases])
    return Tested(passed, total, seconds)


def _counts(body: str, total: int) -> tuple[int, int]:
    try:
        found = json.loads(body)
        passed = int(found["passed"])
    except (ValueError, KeyError, TypeError) as error:
        raise InfrastructureFailure(f"the judge said {body[:80]!r}") from error
    if not (0 <= passed <= total and found.get("total") == total):
        raise InfrastructureFailure(f"the judge said {body[:80]!r}")
    return passed, total
