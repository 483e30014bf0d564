"""Rendering of a template that came with a model folder, in a child process that may die.

A sandbox keeps a template from reaching Python, not from looping for ever or filling the memory. The child has a
limit of memory and of CPU seconds a rendering; passing one kills it, which the parent reports as a DataError.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from glmctl.errors import DataError

CPU_SECONDS = 1.0
MEMORY_BYTES = 768 * 1024 * 1024
MAX_OUTPUT_CHARS = 1_000_000
MAX_SOURCE_CHARS = 256 * 1024
_COMPILED = 8

# the child sees our import path and nothing else of ours: no settings, no working directory
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from glmctl.data.template_worker import serve; serve()"
)


class ForeignTemplate:
    """A template of unknown origin. All of them share one child process, started when first needed."""

    def __init__(self, source: str, where: str) -> None:
        """DataError (naming `where`) when the source is too long or does not compile."""
        self._source = source
        self._where = where
        if len(source) > MAX_SOURCE_CHARS:
            raise DataError(f"{where}: {len(source)} characters are more than a chat template may have")
        self.marked: bool = self._ask({"source": source, "compile": True})["marked"]

    def render(self, context: dict[str, Any]) -> str:
        """The rendered text. DataError when the template fails or passes a limit."""
        text: str = self._ask({"source": self._source, "context": context})["text"]
        return text

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = _worker.ask(request)
        if answer is None:
            raise DataError(
                f"{self._where}: the chat template ran into a limit "
                f"({CPU_SECONDS:g} s of CPU, {MEMORY_BYTES >> 20} MB) and was stopped"
            )
        if "error" in answer:
            raise DataError(f"{self._where}: {answer['error']}")
        return answer


class _Worker:
    """The child process; one request at a time, a new child after one that died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The child's answer; None when it died over this request."""
        line = json.dumps(request) + "\n"
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            reply = ""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(line)
                child.stdin.flush()
                reply = child.stdout.readline()
            if not reply.endswith("\n"):
                self._close()
                return None
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._close()
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ},
            )
        return self._child

    def _close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


_worker = _Worker()
atexit.register(_worker._close)


# ------------------------------------------------------------------ in the child


def serve() -> None:
    """Answer one JSON request a line until the parent goes away."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiled: dict[str, Any] = {}
    for line in sys.stdin:
        # the default action of SIGPROF ends the process, whatever C function it is in
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(json.loads(line), compiled)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(request: dict[str, Any], compiled: dict[str, Any]) -> dict[str, Any]:
    from glmctl.data.sandbox import compile_template, has_marks

    source = request["source"]
    try:
        if source not in compiled:
            while len(compiled) >= _COMPILED:
                del compiled[next(iter(compiled))]
            compiled[source] = compile_template(source)
        if "compile" in request:
            return {"marked": has_marks(source)}
        pieces, length = [], 0
        for piece in compiled[source].generate(request["context"]):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARS:
                return {"error": f"the chat template wrote over {MAX_OUTPUT_CHARS} characters"}
        return {"text": "".join(pieces)}
    except Exception as error:  # noqa: BLE001 - a hostile template may raise anything; the parent names it
        return {"error": f"chat template: {type(error).__name__}: {str(error)[:300]}"}
