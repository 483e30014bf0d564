"""Rendering of a template that came with a model folder, in a child process that may die.

A sandbox keeps a template from reaching Python, not from looping for ever or filling the memory. The child has a
limit of memory and of CPU seconds a rendering; passing one kills it, which the parent reports as a DataError.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

CPU_SECONDS = 1.0
MEMORY_BYTES = 768 * 1024 * 1024
MAX_OUTPUT_CHARS = 1_000_000
MAX_SOURCE_CHARS = 256 * 1024

# the child sees our import path and nothing else of ours: no settings, no working directory
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from glmctl.data.template_worker import serve; serve()"
)


class ForeignTemplate:
    """A template of unknown origin, rendered in a child process that is started on first use."""

    def __init__(self, source: str, where: str) -> None:
        """DataError (naming `where`) when the source is too long or does not compile."""
        from glmctl.errors import DataError

        self._source = source
        self._where = where
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        if len(source) > MAX_SOURCE_CHARS:
            raise DataError(f"{where}: {len(source)} characters are more than a chat template may have")
        self.marked: bool = self._ask({"source": source, "compile": True})["marked"]

    def render(self, context: dict[str, Any]) -> str:
        """The rendered text. DataError when the template fails or passes a limit."""
        text: str = self._ask({"source": self._source, "context": context})["text"]
        return text

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        from glmctl.errors import DataError

        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            reply = ""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.flush()
                reply = child.stdout.readline()
            if not reply.endswith("\n"):
                _close(child)
                self._child = None
                raise DataError(
                    f"{self._where}: the chat template ran into a limit "
                    f"({CPU_SECONDS:g} s of CPU, {MEMORY_BYTES >> 20} MB) and was stopped"
                )
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise DataError(f"{self._where}: {answer['error']}")
        return answer

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ},
            )
            weakref.finalize(self, _close, self._child)
        return self._child


def _close(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


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
