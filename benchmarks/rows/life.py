"""Rows S7 and S10: how a server ends, asked to or not."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from collections import Counter

import httpx

from rows.client import Report, Served, body, metrics, start, text_of

STREAMS = 32


async def _under_way(served: Served, **fields: int) -> list[asyncio.Task[str]]:
    """Streams, once three quarters of them are inside the engine."""
    rng = random.Random(0)
    client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=STREAMS + 4))
    tasks = [asyncio.create_task(text_of(client, served.url, body(rng, **fields))) for _ in range(STREAMS)]
    while not all(task.done() for task in tasks):
        seen = await metrics(client, served.url)
        if seen["glmctl_requests_running"] + seen["glmctl_requests_queued"] >= STREAMS * 0.75:
            break
    return tasks


End = tuple[int, float, int]
"""streams cut, seconds from the signal to the end of the process, exit code"""


async def _ended(served: Served, tasks: list[asyncio.Task[str]], numbers: list[signal.Signals]) -> End:
    """What came of signals sent one after another."""

    def wait() -> tuple[int, float]:
        # on a thread: the streams' readers may be far behind
        return served.process.wait(60), time.perf_counter()

    since = time.perf_counter()
    ending = asyncio.create_task(asyncio.to_thread(wait))
    for number in numbers:
        served.process.send_signal(number)
        await asyncio.sleep(0.05)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    code, until = await ending
    return sum(isinstance(result, BaseException) for result in results), until - since, code


async def _drained(served: Served) -> End:
    return await _ended(served, await _under_way(served), [signal.SIGTERM])


def drains(report: Report, model: str, count: int) -> None:
    """S7: SIGTERM with 32 streams under way, `count` times."""
    found = [asyncio.run(_drained(start(model, "--max-slots", str(STREAMS)))) for _ in range(count)]
    cut, slowest = sum(one[0] for one in found), max(one[1] for one in found)
    codes = Counter(one[2] for one in found)
    report.row(f"S7 {count} SIGTERMs with {STREAMS} streams: streams cut", str(cut), cut == 0)
    report.row(
        "S7 exit codes, slowest end (drain time 30 s + 2)",
        f"{dict(codes)}, {slowest:.1f} s",
        slowest < 32 and set(codes) == {0},
    )


def stuck(report: Report, model: str) -> None:
    """S7: clients that never finish, and answers that are longer than the drain time."""

    async def scenario(numbers: list[signal.Signals], drain: float) -> End:
        served = start(model, "--max-slots", str(STREAMS), "--set", f"drain_seconds={drain:g}")
        hanging = [socket.create_connection(served.address) for _ in range(20)]
        for one in hanging:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        tasks = await _under_way(served, max_tokens=4000)
        found = await _ended(served, tasks, numbers)
        for one in hanging:
            one.close()
        return found

    _, taken, code = asyncio.run(scenario([signal.SIGTERM], 2))
    report.row(
        "S7 endless streams and stuck sockets: exit 0 within drain time (2 s) + 2",
        f"{code} after {taken:.1f} s",
        code == 0 and taken < 4,
    )
    _, taken, _ = asyncio.run(scenario([signal.SIGTERM, signal.SIGTERM], 60))
    report.row("S7 a second signal ends it at once (1 s)", f"{taken:.1f} s", taken < 1)


async def killed(report: Report, served: Served) -> None:
    """S10: `kill -9`, as the kernel does it when memory runs out."""
    tasks = await _under_way(served, max_tokens=4000)
    cut, taken, code = await _ended(served, tasks, [signal.SIGKILL])
    report.row(
        f"S10 kill -9 with {STREAMS} streams: all end without [DONE], within 5 s",
        f"{cut} after {taken:.2f} s, exit code {code}",
        cut == STREAMS and taken < 5 and code == -9,
    )
