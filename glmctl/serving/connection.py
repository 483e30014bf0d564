"""A connection with clocks: how long a client may take over its request head, and over reading what it asked for.

uvicorn waits for ever in both places. The body has its own clock, in `body.py`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
WRITE_SECONDS = 30.0


class Connection(H11Protocol):
    """HTTP/1.1 by h11. A head that is not whole after 10 s ends the connection, as does a full buffer after 30 s."""

    _head_clock: asyncio.TimerHandle | None = None
    _write_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request's head is due."""
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_head_clock()
        self._stop_write_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head do not restart its clock, so that a slow trickle does not keep the connection."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """The client does not keep up: its clock starts."""
        super().pause_writing()
        if self._write_clock is None:
            self._write_clock = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._stop_write_clock()

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_clock()
        elif self._head_clock is None:
            self._head_clock = self.loop.call_later(HEAD_SECONDS, self._close_late)

    def _close_late(self) -> None:
        self._head_clock = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _stop_write_clock(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None
