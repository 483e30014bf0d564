"""What endpoints were asked and have answered, written down as the answers come: whatever ends the process, the next
one asks only what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.errors import EnvironmentProblem
from glmctl.run.fingerprint import digest
from glmctl.run.metrics import MetricsLog

CONCURRENCY = 8
"""requests that are under way at once"""

Request = Mapping[str, Any]
"""everything that is sent: model, messages (or input), settings"""


class Asked:
    """Answers by the digest of their request, one JSON line each."""

    def __init__(self, path: Path | None = None) -> None:
        """What `path` holds is taken up, but for the half line of a kill; without a path nothing is written down."""
        self._log = MetricsLog(path) if path is not None else None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._answers: dict[str, Any] = {}
        for row in self._log.rows() if self._log is not None else ():
            self._answers[row["request"]] = row["answer"]
        if self._answers:
            console.note(f"{path}: {len(self._answers)} answers are there from before")
        self._lock = threading.Lock()

    def answers(self, requests: Sequence[Request], call: Callable[[Request], Any], where: str) -> Generator[Any]:
        """`call(request)` for every request, in order; none is made whose answer is known.

        Answers are JSON-able. None, for a reply that is no answer, is not written down, so it is asked for again.
        Close the generator when it is left early: requests that have not begun are then not made.
        EnvironmentProblem, naming `where`, when the endpoint does not answer.
        """
        from openai import OpenAIError

        keys = [digest(request) for request in requests]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            try:
                yield from pool.map(lambda key, request: self._answer(key, request, call), keys, requests)
            except OpenAIError as error:
                raise EnvironmentProblem(
                    f"{where}: does not answer: {error}", hint="the same command continues"
                ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, key: str, request: Request, call: Callable[[Request], Any]) -> Any:
        with self._lock:
            if key in self._answers:
                return self._answers[key]
        answer = call(request)
        if answer is not None:
            with self._lock:
                self._answers[key] = answer
                if self._log is not None:
                    self._log.append({"request": key, "answer": answer})
        return answer


def sendable(text: str) -> str:
    """The text without halves of characters (lone surrogates), which no request can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
