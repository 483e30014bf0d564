"""SIGINT and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """While entered, the first signal only sets `raised`; the second ends the process at once.

    `raised` is None or the exit code to end with: 130 for SIGINT, 143 for SIGTERM. Outside the main thread, where
    Python allows no handlers, it stays None.
    """

    def __init__(self) -> None:
        self.raised: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised is not None:
            # nothing may run any more, not even exit handlers that could wait for a thread
            os._exit(128 + number)
        self.raised = 128 + number
