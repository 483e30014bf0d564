"""SIGINT and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME_REQUEST = 0.5
"""seconds in which the first signal's repetition is no second request: GNU timeout signals its child and then the
group, systemd every process of a unit, and torchrun hands on to its ranks what they may have got already"""


class StopFlag:
    """While entered, the first signal only sets `raised`; another one ends the process at once.

    The same signal again within SAME_REQUEST seconds of the first is not another one.

    `raised` is None or the exit code to end with: 130 for SIGINT, 143 for SIGTERM. Outside the main thread, where
    Python allows no handlers, it stays None.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.raised: int | None = None
        self._clock = clock
        self._asked = 0.0
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
        code = 128 + number
        if self.raised is not None:
            if code == self.raised and self._clock() - self._asked < SAME_REQUEST:
                return
            # nothing may run any more, not even exit handlers that could wait for a thread
            os._exit(code)
        self.raised, self._asked = code, self._clock()
