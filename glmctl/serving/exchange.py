"""The generations of one HTTP request: submitted together, and aborted together when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.types import Receive

from glmctl.engine.request import Event, Request
from glmctl.serving.api_error import ApiError
from glmctl.serving.metrics import Metrics
from glmctl.serving.worker import EngineDied, EngineWorker, QueueFull


class ClientGone(Exception):
    """The client closed its connection; nobody reads what would be sent."""


class Exchange:
    """Made by `open`; iterate `events`, call `drop` for a generation that needs no more tokens, `close` at the end."""

    def __init__(self, worker: EngineWorker, metrics: Metrics, requests: list[Request]) -> None:
        self._worker = worker
        self._metrics = metrics
        self._open = {request.id: request for request in requests}
        self._begun = time.perf_counter()
        self._counts = dict.fromkeys(self._open, 0)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Event] | ClientGone | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, worker: EngineWorker, metrics: Metrics, requests: list[Request], receive: Receive) -> Exchange:
        """Submit `requests` and start to watch the client. ApiError 429 when the queue is full, 503 without engine."""
        exchange = cls(worker, metrics, requests)
        try:
            worker.submit(requests, exchange._hear)
        except QueueFull as error:
            raise ApiError(429, f"the server is busy: {error}; try again", code="queue_full") from error
        except EngineDied as error:
            raise ApiError(503, str(error), code="engine_unavailable") from error
        exchange._watch = asyncio.create_task(exchange._watch_client(receive))
        return exchange

    async def events(self) -> AsyncIterator[Event]:
        """Events of all generations, in the order they come, until each has ended.

        ApiError 503 when the engine dies, ClientGone when the client does.
        """
        while self._open:
            batch = await self._queue.get()
            if batch is None:
                raise ApiError(503, "the engine stopped while it was answering", code="engine_unavailable")
            if isinstance(batch, ClientGone):
                raise batch
            for event in batch:
                if event.id not in self._open:
                    continue
                self._count(event)
                if event.finish_reason is not None:
                    self._end(event.id)
                yield event

    def drop(self, request_id: str) -> None:
        """End one generation early."""
        if request_id in self._open:
            self._end(request_id)
            self._worker.abort([request_id])

    def close(self) -> None:
        """Free whatever still runs. May be called twice."""
        if self._open:
            self._metrics.aborted.inc(len(self._open))
            self._worker.abort(list(self._open))
            self._open.clear()
        if self._watch is not None:
            self._watch.cancel()

    def _count(self, event: Event) -> None:
        self._counts[event.id] += 1
        if self._counts[event.id] == 1:
            self._metrics.first_token.observe(time.perf_counter() - self._begun)

    def _end(self, request_id: str) -> None:
        request = self._open.pop(request_id)
        self._metrics.duration.observe(time.perf_counter() - self._begun)
        self._metrics.prompt_length.observe(len(request.prompt))
        self._metrics.answer_length.observe(self._counts[request_id])

    def _hear(self, events: list[Event] | None) -> None:
        # on the engine's thread; the loop is closed only when the process is on its way out and nobody listens
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, events)

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        # a task of its own, so that rows are freed even where the response never started to iterate `events`
        self._watch = None
        self.close()
        self._queue.put_nowait(ClientGone())
