"""The listening socket and the life of the server process: bind, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import uvicorn

from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.serving.app import create_app
from glmctl.serving.connection import Connection
from glmctl.serving.guard import MAX_HEADER_BYTES
from glmctl.serving.service import Service

DRAIN_SECONDS = 30.0
CUT_SECONDS = 1
"""what is left over after the drain gets this long to read its error"""
KEEP_ALIVE_SECONDS = 75
"""longer than any usual client or proxy keeps an idle connection (httpx 5 s, aiohttp 15 s, AWS's balancer 60 s): with
uvicorn's 5 s, a client now and then sends its next request into the connection that we are just closing"""
STALL_SECONDS = 60.0
"""a step that takes longer never ends: far more than a prefill chunk of a large model on a slow machine"""
WATCH_SECONDS = 0.25
"""between two looks at the engine"""
DEATH_SECONDS = 3.0
"""clients of an engine that died get this long to read that it did"""


def is_loopback(host: str) -> bool:
    """Whether `host` is an address of this machine that no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, key: str | None) -> None:
    """RecipeError for a host that others can reach while no key is set."""
    if key is None and not is_loopback(host):
        raise RecipeError(
            f"host: '{host}' can be reached from other machines, and no API key is set",
            hint="set GLMCTL_API_KEY or api_key_file, or serve on 127.0.0.1",
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. EnvironmentProblem when the port is taken or forbidden, RecipeError for no such host."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise RecipeError(f"host: '{host}' is not an address of this machine: {error.strerror}") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        hint = "another server is running; choose another port (0 = any free one)"
        why = error.strerror or str(error)
        raise EnvironmentProblem(
            f"cannot listen on {host}:{port}: {why}", hint=hint if error.errno == errno.EADDRINUSE else None
        ) from error
    return listening


class _Uvicorn(uvicorn.Server):
    """uvicorn, leaving signals to us: it would re-raise SIGTERM after a clean drain, and exit by it.

    watch runs beside it from when requests are taken.
    """

    def __init__(self, config: uvicorn.Config, watch: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__(config)
        self._watch = watch
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch())

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """A service on a socket. Either `serve_until_signal` on the main thread, or `start` and `stop` from another."""

    def __init__(
        self,
        service: Service,
        host: str,
        port: int,
        *,
        key: str | None = None,
        admin_key: str | None = None,
        drain_seconds: float = DRAIN_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        """Binds at once. Errors: see `check_exposure` and `bind`.

        drain_seconds: how long a stopping server lets answers finish. stall_seconds: the longest step of the engine;
        beyond it, the engine counts as dead.
        """
        check_exposure(host, key)
        self._service = service
        self._socket = bind(host, port)
        self._app = create_app(service, key=key, admin_key=admin_key, loopback=is_loopback(host))
        self._drain_seconds = drain_seconds
        self._stall_seconds = stall_seconds
        config = uvicorn.Config(
            self._app,
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CUT_SECONDS,
        )
        self._uvicorn = _Uvicorn(config, self._watch_engine)
        self._exit_with_engine = False
        self._leaving = False
        self._problem: str | None = None
        """what ended the engine"""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self.host = host
        self.port: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def serve_until_signal(self) -> int:
        """Serve until SIGTERM or SIGINT, drain, and return the signal's number. A second signal stops at once.

        EnvironmentProblem when the engine dies or stalls: its clients are told, and then the process has nothing left
        to do, so that whatever supervises it starts another.
        """
        self._exit_with_engine = True
        received: list[int] = []

        def on_signal(number: int) -> None:
            received.append(number)
            self._drain()

        async def serve() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
            await self._uvicorn.serve(sockets=[self._socket])

        asyncio.run(serve())
        if self._problem is not None:
            raise EnvironmentProblem(self._problem, hint="its clients were told; start the server again")
        if not received:
            raise EnvironmentProblem("the server stopped by itself")
        return received[0]

    def start(self) -> None:
        """Serve on a thread; returns when requests are taken (they wait in the socket until then)."""
        running = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            running.set()
            await self._uvicorn.serve(sockets=[self._socket])

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="glmctl-http", daemon=True)
        self._thread.start()
        running.wait()

    def stop(self) -> None:
        """Drain and wait for the end of the thread. May be called again."""
        assert self._thread is not None
        assert self._loop is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._drain)
            self._thread.join()

    async def _watch_engine(self) -> None:
        """Until the engine ends. One that ends by itself, or a step that takes too long, is the server's end too."""
        worker = self._service.worker
        while worker.alive:
            if worker.step_seconds > self._stall_seconds:
                self._problem = f"a step of the engine took longer than stall_seconds ({self._stall_seconds:g})"
                worker.give_up()
            await asyncio.sleep(WATCH_SECONDS)
        if self._leaving:
            return
        self._problem = self._problem or "the engine stopped by an internal error"
        if self._exit_with_engine:
            await self._leave(DEATH_SECONDS)

    def _drain(self) -> None:
        """Refuse new work with 503, let what is under way finish, then stop. Called again: stop at once."""
        if self._service.draining:
            self._app.cut()
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self._service.draining = True
        # the socket stays open meanwhile: a client is told 503 and when to try again, not "connection refused"
        self._ending = asyncio.get_running_loop().create_task(self._leave(self._drain_seconds))

    async def _leave(self, seconds: float) -> None:
        """Stop when nothing is under way, after `seconds` at the latest; what is left then ends with an error."""
        idle = await self._app.wait_idle(seconds)
        self._leaving = True
        if not idle:
            self._service.worker.give_up()
            if not await self._app.wait_idle(CUT_SECONDS / 2):
                self._app.cut()
                await self._app.wait_idle(CUT_SECONDS / 2)
        self._uvicorn.should_exit = True
