"""Testing a function that a model wrote: in a box, judged elsewhere. The one door for tasks with code."""

from __future__ import annotations

import importlib.resources
import json
import os
import secrets
import subprocess
import sys
import urllib.error
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
    box_nonce = secrets.token_hex(16)
    task = {
        "code": code,
        "entry": entry,
        "calls": [json.dumps(arguments) for arguments, _ in cases],
        "nonce": box_nonce,
        "rlimits": boxes.limits_inside(spec),
    }
    source = importlib.resources.files("glmctl.rl.sandbox").joinpath("candidate.py").read_text(encoding="utf-8")
    done = boxes.run([boxes.INTERPRETER, "-I", "-S", "-c", source], json.dumps(task).encode() + b"\n", spec)
    passed, total = _judge(done.output, box_nonce, [plain(expected) for _, expected in cases])
    return Tested(passed, total, done.seconds)


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
    """POST {code, entry, calls, wall_seconds, memory_mb} to `spec.url`; it answers {output, seconds}.

    `output` is what `candidate.py` writes with the nonce that the request carries: expected values stay here.
    """
    nonce = secrets.token_hex(16)
    body = {
        "code": code,
        "entry": entry,
        "calls": [json.dumps(arguments) for arguments, _ in cases],
        "nonce": nonce,
        "wall_seconds": spec.wall_seconds,
        "memory_mb": spec.memory_mb,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("GLMCTL_SANDBOX_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(str(spec.url), json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=spec.wall_seconds + 30) as response:
            answer = json.loads(response.read(2 * boxes.OUTPUT_BYTES))
        output, seconds = str(answer["output"]), float(answer["seconds"])
    except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError) as error:
        raise InfrastructureFailure(f"{spec.url}: {error}") from error
    passed, total = _judge(output.encode()[: boxes.OUTPUT_BYTES], nonce, [plain(expected) for _, expected in cases])
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
