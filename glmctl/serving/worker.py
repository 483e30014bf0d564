"""The engine on a thread of its own, behind a bounded door.

Everything the engine does happens on that thread. Others hand it requests and aborts; it hands events back, once
per step and listener, through a callable that must not block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from glmctl.engine.engine import Engine, EngineStats
from glmctl.engine.request import Event, Request
from glmctl.errors import GlmctlError
from glmctl.model.network import GlmMoe

Listener = Callable[[list[Event] | None], None]
"""gets the events of one step; None means that the engine died and no more will come"""

_ABANDONED_SECONDS = 1.0


class QueueFull(Exception):
    """Every slot and every place in the queue is taken."""


class EngineDied(Exception):
    """The engine thread is not running."""


class _Add(NamedTuple):
    request: Request


class _Abort(NamedTuple):
    request_id: str


class _Load(NamedTuple):
    version: int
    source: GlmMoe
    done: Future[None]


class EngineWorker:
    """Owns the engine's thread. At most `max_slots + max_queue` requests are inside at any time."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self._engine = engine
        self.capacity = engine.max_slots + max_queue
        self._wake = threading.Condition()
        self._inbox: list[_Add | _Abort | _Load] = []
        self._listeners: dict[str, Listener] = {}
        self._closing = False
        self._dead = False
        self._step_began: float | None = None
        """time.monotonic() at the start of the step in progress"""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="glmctl-engine", daemon=True)

    # ------------------------------------------------------------------ any thread

    @property
    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._engine.stats

    @property
    def max_length(self) -> int:
        """The engine's context."""
        return self._engine.max_length

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return self._engine.model.config.vocab_size

    @property
    def max_slots(self) -> int:
        """How many requests generate at once."""
        return self._engine.max_slots

    @property
    def inside(self) -> int:
        """Requests that are running or queued."""
        return len(self._listeners)

    @property
    def running(self) -> int:
        """Requests that hold a cache row."""
        return self._engine.active

    @property
    def kv_blocks(self) -> tuple[int, int]:
        """Blocks of the cache in use, and all there are."""
        return self._engine.kv_blocks

    @property
    def version(self) -> int:
        """Of the weights."""
        return self._engine.version

    @property
    def alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive() and not self._dead

    @property
    def step_seconds(self) -> float:
        """How long the step in progress has taken so far; 0 between two steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def full(self) -> bool:
        """Whether the next request would be turned away."""
        return self.inside >= self.capacity

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the step in progress; requests still inside get their end through their listeners.

        A step that was given up is waited for a second more at most; then its thread ends with the process.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._ended.wait()
        self._thread.join(_ABANDONED_SECONDS)

    def give_up(self) -> None:
        """Do not wait for the step in progress: the engine counts as dead from now on, and every listener is told.
        A thread cannot be killed, so nothing can be started again in its place."""
        self._bury()

    def submit(self, requests: Sequence[Request], listener: Listener) -> None:
        """Take all of `requests` in, or none: QueueFull when they do not fit, EngineDied when nobody would answer.

        Prompts must have passed `engine.request.check_prompt`.
        """
        with self._wake:
            if self._dead or self._closing:
                raise EngineDied("the engine is not running")
            if len(self._listeners) + len(requests) > self.capacity:
                raise QueueFull(f"{len(self._listeners)} requests are in progress or queued")
            for request in requests:
                assert request.id not in self._listeners
                self._listeners[request.id] = listener
                self._inbox.append(_Add(request))
            self._wake.notify()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown and finished ones are fine. Their listener hears nothing more of them."""
        with self._wake:
            for request_id in request_ids:
                if self._listeners.pop(request_id, None) is not None:
                    self._inbox.append(_Abort(request_id))
            self._wake.notify()

    def load_weights(self, version: int, source: GlmMoe) -> Future[None]:
        """Take the weights of `source` between two steps. The future fails with GlmctlError for another shape, with
        EngineDied when the engine is not running."""
        done: Future[None] = Future()
        with self._wake:
            if self._dead or self._closing:
                done.set_exception(EngineDied("the engine is not running"))
                return done
            self._inbox.append(_Load(version, source, done))
            self._wake.notify()
        return done

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._step_began = time.monotonic()
                events = self._engine.step()
                self._step_began = None
                self._deliver(events)
        finally:
            # also on an exception, which then reaches threading.excepthook: a dead engine must not look alive
            self._step_began = None
            self._bury()

    def _bury(self) -> None:
        """No more requests are taken, and whoever waits hears that nothing more will come. May be called twice."""
        with self._wake:
            self._dead = True
            listeners, self._listeners = set(self._listeners.values()), {}
            lost = [order for order in self._inbox if isinstance(order, _Load)]
            self._inbox = []
        for order in lost:
            order.done.set_exception(EngineDied("the engine stopped"))
        for listener in listeners:
            listener(None)
        self._ended.set()

    def _take_orders(self) -> bool:
        """Carry out what others asked for; waits while there is nothing to do. False when it is time to go."""
        with self._wake:
            while not (self._closing or self._dead or self._inbox or self._engine.has_work):
                self._wake.wait()
            if self._closing or self._dead:
                return False
            orders, self._inbox = self._inbox, []
        for order in orders:
            match order:
                case _Add():
                    self._engine.add(order.request)
                case _Abort():
                    self._engine.abort(order.request_id)
                case _Load():
                    self._load(order)
        return True

    def _load(self, order: _Load) -> None:
        try:
            self._engine.load_weights(order.version, order.source)
        except GlmctlError as error:
            order.done.set_exception(error)
        else:
            order.done.set_result(None)

    def _deliver(self, events: list[Event]) -> None:
        batches: dict[Listener, list[Event]] = {}
        with self._wake:
            for event in events:
                listener = self._listeners.get(event.id)
                if listener is None:
                    continue
                batches.setdefault(listener, []).append(event)
                if event.finish_reason is not None:
                    del self._listeners[event.id]
        for listener, batch in batches.items():
            listener(batch)
