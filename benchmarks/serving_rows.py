"""Rows S2, S3, S6 and S7 of serving's reliability at full size: leavers, slow clients, overload, SIGTERM under load.

    python benchmarks/serving_rows.py runs/demo/convert

Starts `glmctl serve` in a process of its own for each row, and prints what was asked, what was seen, and whether it is
met. The times are bars that the server's users feel, not comparisons: run it on a machine that does nothing else.
Exit 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

HEAD_SECONDS, BODY_SECONDS = 10.0, 30.0
"""after which the server promises to end a connection"""
PROMPTS = ["Compute 3+4-2.", "Compute 5-1+4-2.", "def add(a, b):", "The hacker "]
missed = 0


def row(name: str, seen: str, met: bool) -> None:
    """One line of the result."""
    global missed
    missed += not met
    print(f"{'met   ' if met else 'MISSED'}  {name:<76} {seen}", flush=True)


@dataclass
class Served:
    """A server under test."""

    process: subprocess.Popen[str]
    url: str

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(60)


def start(model: str, *options: str) -> Served:
    """`glmctl serve` on a free port, once it says where it listens."""
    folder = tempfile.mkdtemp(prefix="glmctl-rows-")
    command = [sys.executable, "-m", "glmctl", "serve", model, "--port", "0", "--run", f"{folder}/run", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"on (http://\S+)/v1", line)
        if found:
            os.set_blocking(process.stderr.fileno(), False)  # nobody reads the rest
            return Served(process, found[1])
    raise SystemExit(f"the server ended with code {process.wait()}")


def body(rng: random.Random, **more: Any) -> dict[str, Any]:
    """A completion that runs to its last token."""
    return {"model": "any", "prompt": rng.choice(PROMPTS), "max_tokens": 64, "temperature": 0, "stream": True, **more}


async def metrics(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    """/metrics without labels and histograms."""
    lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name.isidentifier()}


async def idle(client: httpx.AsyncClient, url: str) -> float:
    """Seconds until nothing is inside."""
    since = time.perf_counter()
    while True:
        seen = await metrics(client, url)
        if seen["glmctl_requests_running"] + seen["glmctl_requests_queued"] == 0:
            return time.perf_counter() - since
        await asyncio.sleep(0.01)


async def text_of(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> str:
    """The whole text of a streamed completion; RuntimeError when the stream is cut."""
    pieces, ended = [], False
    async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
        async for line in response.aiter_lines():
            ended = line == "data: [DONE]"
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    if not ended:
        raise RuntimeError(f"cut off with status {response.status_code}")
    return "".join(pieces)


async def leavers(url: str, count: int) -> None:
    """S2: clients leave at random points while others stream on."""
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        quiet = {prompt: await text_of(client, url, body(rng, prompt=prompt)) for prompt in PROMPTS}
        freed: list[float] = []
        wrong = 0

        async def leave() -> None:
            request = body(rng, max_tokens=rng.randint(1, 200))
            task = asyncio.create_task(text_of(client, url, request))
            await asyncio.sleep(rng.uniform(0, 0.4))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for _ in range(count // 20):
            prompt = rng.choice(PROMPTS)
            stays = asyncio.create_task(text_of(client, url, body(rng, prompt=prompt)))
            await asyncio.gather(*(leave() for _ in range(20)))
            wrong += await stays != quiet[prompt]
            freed.append(await idle(client, url))
        used = (await metrics(client, url))["glmctl_kv_blocks_used"]
    row(f"S2 {count} leave: others' greedy text as without them", f"{wrong} differ", wrong == 0)
    row("S2 places freed, longest wait after the last one left (250 ms)", f"{max(freed):.3f} s", max(freed) < 0.25)
    row("S2 blocks of the cache still in use", f"{used:.0f}", used == 0)


async def latency(client: httpx.AsyncClient, url: str, count: int) -> float:
    """95th percentile of `count` short requests, one after another, in seconds."""
    taken = []
    for _ in range(count):
        since = time.perf_counter()
        await text_of(client, url, body(random.Random(0), max_tokens=8))
        taken.append(time.perf_counter() - since)
    return statistics.quantiles(taken, n=20)[-1]


async def slow(served: Served, count: int) -> None:
    """S3: unfinished heads, unfinished bodies, and readers that do not read."""
    host, port = served.address
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    kinds = {
        "head": (b"POST /v1/comp", HEAD_SECONDS),
        "body": (head + b'Content-Length: 100\r\n\r\n{"model"', BODY_SECONDS),
    }

    async def hang(sent: bytes) -> float:
        reader, writer = await asyncio.open_connection(host, port)
        since = time.perf_counter()
        writer.write(sent)
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass
        writer.close()
        return time.perf_counter() - since

    async with httpx.AsyncClient(timeout=120) as client:
        before = await latency(client, served.url, 40)
        hanging = {
            name: [asyncio.create_task(hang(sent)) for _ in range(count // 2)] for name, (sent, _) in kinds.items()
        }
        await asyncio.sleep(0.5)
        during = await latency(client, served.url, 40)
        for name, tasks in hanging.items():
            longest = max(await asyncio.gather(*tasks))
            bar = kinds[name][1]
            row(
                f"S3 {count // 2} unfinished: {name}, closed within {bar:g} s (+1)",
                f"{longest:.1f} s",
                longest < bar + 1,
            )
        row("S3 healthy p95 beside them over p95 alone (1.5)", f"{during / before:.2f}", during < 1.5 * before)


async def overload(url: str, seconds: float) -> None:
    """S6: ten times what the server can do, for some seconds, without waiting for answers."""
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=4000)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        since, done = time.perf_counter(), 0
        while time.perf_counter() - since < 3:
            await asyncio.gather(*(text_of(client, url, body(rng)) for _ in range(8)))
            done += 8
        rate = 10 * done / (time.perf_counter() - since)
        outcomes: Counter[str] = Counter()
        refused_after: list[float] = []
        queues: list[float] = []
        ready: Counter[int] = Counter()

        async def one() -> None:
            begun = time.perf_counter()
            async with client.stream("POST", f"{url}/v1/completions", json=body(rng)) as response:
                if response.status_code in (429, 503):
                    refused_after.append(time.perf_counter() - begun)
                    outcomes["refused" if "retry-after" in response.headers else "refused without Retry-After"] += 1
                    return
                await response.aread()
            outcomes[str(response.status_code)] += 1

        async def watch(until: float) -> None:
            while time.perf_counter() < until:
                queues.append((await metrics(client, url))["glmctl_requests_queued"])
                ready[(await client.get(f"{url}/ready")).status_code] += 1
                assert (await client.get(f"{url}/health")).status_code == 200
                await asyncio.sleep(0.1)

        tasks, started = [], time.perf_counter()
        watching = asyncio.create_task(watch(started + seconds))
        while (passed := time.perf_counter() - started) < seconds:
            while len(tasks) < passed * rate:
                tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(0.005)
        await watching
        await asyncio.gather(*tasks)
        recovered = await idle(client, url)
        after = (await client.get(f"{url}/ready")).status_code
    late = statistics.quantiles(refused_after, n=20)[-1]
    row(
        f"S6 open loop, {rate:.0f} requests/s for {seconds:g} s: nothing but 200 and 429/503 with Retry-After",
        str(dict(outcomes)),
        set(outcomes) <= {"200", "refused"},
    )
    row("S6 longest queue seen (bound 64)", f"{max(queues):.0f}", max(queues) <= 64)
    row("S6 a refusal takes, p95 (50 ms)", f"{late * 1000:.0f} ms", late < 0.05)
    row(
        "S6 /ready during it, and after",
        f"{dict(ready)}, {after} after {recovered:.1f} s",
        ready[503] > 0 and after == 200,
    )


async def drained(served: Served, streams: int) -> tuple[int, float, int]:
    """Streams cut, seconds from SIGTERM to the end, exit code."""
    rng = random.Random(0)
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=streams + 4)) as client:
        tasks = [asyncio.create_task(text_of(client, served.url, body(rng))) for _ in range(streams)]
        while (await metrics(client, served.url))["glmctl_requests_running"] < 1:
            pass
        while not all(task.done() for task in tasks):
            seen = await metrics(client, served.url)
            if seen["glmctl_requests_running"] + seen["glmctl_requests_queued"] >= streams * 0.75:
                break
        since = time.perf_counter()
        served.process.send_signal(signal.SIGTERM)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        code = await asyncio.to_thread(served.process.wait, 60)
    return sum(isinstance(result, BaseException) for result in results), time.perf_counter() - since, code


def drains(model: str, count: int) -> None:
    """S7: SIGTERM with 32 streams under way, `count` times."""
    found = [asyncio.run(drained(start(model, "--max-slots", "32"), 32)) for _ in range(count)]
    cut, slowest = sum(one[0] for one in found), max(one[1] for one in found)
    codes = Counter(one[2] for one in found)
    row(f"S7 {count} SIGTERMs with 32 streams: streams cut", str(cut), cut == 0)
    row(
        "S7 exit code, slowest end (drain time 30 s + 2)",
        f"{dict(codes)}, {slowest:.1f} s",
        slowest < 32 and set(codes) <= {0, 143},
    )


def with_server(model: str, test: Callable[[Served], Coroutine[Any, Any, None]], *options: str) -> None:
    """Run a row on a fresh server, and stop that."""
    served = start(model, *options)
    try:
        asyncio.run(test(served))
    finally:
        served.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("runs/demo/convert"))
    parser.add_argument("--rows", nargs="+", default=["S2", "S3", "S6", "S7"], choices=["S2", "S3", "S6", "S7"])
    parser.add_argument("--scale", type=float, default=1.0, help="of 500 leavers, 500 slow, 20 s, 50 drains")
    args = parser.parse_args()
    model, scale = str(args.model), args.scale
    if "S2" in args.rows:
        with_server(model, lambda served: leavers(served.url, int(500 * scale)), "--max-queue", "64")
    if "S3" in args.rows:
        with_server(model, lambda served: slow(served, int(500 * scale)))
    if "S6" in args.rows:
        with_server(model, lambda served: overload(served.url, 20 * scale), "--max-queue", "64")
    if "S7" in args.rows:
        drains(model, max(1, int(50 * scale)))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
