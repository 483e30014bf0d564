"""Rows S2, S3 and S6: clients that leave, clients that are slow, more clients than can be served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

from rows.client import (
    PROMPTS,
    Report,
    Served,
    body,
    idle,
    latencies,
    metrics,
    percentile,
    scored_text,
    text_of,
)

HEAD_SECONDS, BODY_SECONDS, WRITE_SECONDS = 10.0, 30.0, 30.0
"""after which the server promises to end a connection"""


async def leavers(report: Report, served: Served, count: int) -> None:
    """S2: clients leave at random points while others stream on."""
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=200)
    url = served.url
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        quiet = {prompt: await scored_text(client, url, body(rng, prompt=prompt)) for prompt in PROMPTS}
        freed: list[float] = []
        wrong = 0

        async def leave() -> None:
            request = body(rng, max_tokens=rng.randint(1, 200))
            task = asyncio.create_task(text_of(client, url, request))
            await asyncio.sleep(rng.uniform(0, 0.4))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for _ in range(count // 20):
            stays = [asyncio.create_task(scored_text(client, url, body(rng, prompt=prompt))) for prompt in PROMPTS]
            await asyncio.gather(*(leave() for _ in range(20)))
            for prompt, task in zip(PROMPTS, stays, strict=True):
                wrong += await task != quiet[prompt]
            freed.append(await idle(client, url))
        seen = await metrics(client, url)
    beside = count // 20 * len(PROMPTS)
    report.row(
        f"S2 {count} leave: {beside} others' greedy text and log-probabilities, bit by bit",
        f"{wrong} differ; {seen['glmctl_drafts_total']:.0f} tokens drafted meanwhile",
        wrong == 0,
    )
    report.row(
        "S2 places freed, longest wait after the last one left (250 ms)", f"{max(freed):.3f} s", max(freed) < 0.25
    )
    used = seen["glmctl_kv_blocks_used"]
    report.row("S2 blocks of the cache still in use", f"{used:.0f}", used == 0)


async def slow(report: Report, served: Served, count: int) -> None:
    """S3: unfinished heads, unfinished bodies, and readers that do not read."""
    host, port = served.address
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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

    each = count // 2
    async with httpx.AsyncClient(timeout=120) as client:
        before = percentile(await latencies(client, served.url, 40), 95)
        hanging = {name: [asyncio.create_task(hang(sent)) for _ in range(each)] for name, (sent, _) in kinds.items()}
        await asyncio.sleep(0.5)
        during = percentile(await latencies(client, served.url, 40), 95)
        for name, tasks in hanging.items():
            longest = max(await asyncio.gather(*tasks))
            bar = kinds[name][1]
            report.row(
                f"S3 {each} unfinished: {name}, closed within {bar:g} s (+1)", f"{longest:.1f} s", longest < bar + 1
            )
    report.row("S3 healthy p95 beside them over p95 alone (1.5)", f"{during / before:.2f}", during < 1.5 * before)


async def unread(report: Report, served: Served, count: int) -> None:
    """S3, the readers that do not read: the answer is larger than what the kernel would hold for them."""
    request = json.dumps(
        body(random.Random(0), stream=False, max_tokens=1000, n=8, logprobs=20, prompt=PROMPTS[0])
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    deaf = []
    for _ in range(count):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect(served.address)
        one.sendall(head + str(len(request)).encode() + b"\r\n\r\n" + request)
        deaf.append(one)
    async with httpx.AsyncClient(timeout=120) as client:
        while (await metrics(client, served.url))["glmctl_requests_running"] == 0:
            await asyncio.sleep(0.05)
        await idle(client, served.url)
        since = time.perf_counter()
        while _established(served) > 0 and time.perf_counter() - since < WRITE_SECONDS + 5:
            await asyncio.sleep(0.25)
        taken = time.perf_counter() - since
        left = _established(served)
    for one in deaf:
        one.close()
    report.row(
        f"S3 {count} that do not read their answers, closed within {WRITE_SECONDS:g} s (+2)",
        f"{taken:.1f} s, {left} left",
        left == 0 and taken < WRITE_SECONDS + 2,
    )


def _established(served: Served) -> int:
    """Connections of the server with bytes that their clients have not taken."""
    port = f":{served.address[1]:04X}"
    found = 0
    with open(f"/proc/{served.process.pid}/net/tcp") as table:
        for line in list(table)[1:]:
            _, local, _, state, queues, *_ = line.split()
            found += local.endswith(port) and state == "01" and not queues.startswith("00000000:")
    return found


async def overload(report: Report, served: Served, seconds: float) -> None:
    """S6: ten times what the server can do, for some seconds, without waiting for answers."""
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=4000)
    url = served.url
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        since, done = time.perf_counter(), 0
        while time.perf_counter() - since < 3:
            await asyncio.gather(*(text_of(client, url, body(rng)) for _ in range(8)))
            done += 8
        rate = 10 * done / (time.perf_counter() - since)
        outcomes: Counter[str] = Counter()
        queues: list[float] = []
        ready: Counter[int] = Counter()

        async def one() -> None:
            async with client.stream("POST", f"{url}/v1/completions", json=body(rng)) as response:
                if response.status_code in (429, 503):
                    outcomes["refused" if "retry-after" in response.headers else "refused without Retry-After"] += 1
                    return
                await response.aread()
            outcomes[str(response.status_code)] += 1

        async def watch(until: float) -> None:
            while time.perf_counter() < until:
                queues.append((await metrics(client, url))["glmctl_requests_queued"])
                ready[(await client.get(f"{url}/ready")).status_code] += 1
                await asyncio.sleep(0.1)

        bystander = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(__file__).with_name("bystander.py")), url, str(seconds), stdout=subprocess.PIPE
        )
        tasks, started = [], time.perf_counter()
        watching = asyncio.create_task(watch(started + seconds))
        while (passed := time.perf_counter() - started) < seconds:
            while len(tasks) < passed * rate:
                tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(0.005)
        await watching
        await asyncio.gather(*tasks)
        seen = json.loads((await bystander.communicate())[0])
        recovered = await idle(client, url)
        after = (await client.get(f"{url}/ready")).status_code
    report.row(
        f"S6 open loop, {rate:.0f} requests/s for {seconds:g} s: nothing but 200 and 429/503 with Retry-After",
        str(dict(outcomes)),
        set(outcomes) <= {"200", "refused"},
    )
    report.row("S6 longest queue seen (bound 64)", f"{max(queues):.0f}", max(queues) <= 64)
    for what, bar in (("refused", 0.05), ("health", 0.1)):
        late = percentile(seen[what], 95) if len(seen[what]) > 1 else float("nan")
        of = f"{late * 1000:.0f} ms of {len(seen[what])}"
        report.row(f"S6 {what}, p95 of a bystander ({bar * 1000:g} ms)", of, late < bar)
    report.row(
        "S6 /ready during it, and after; idle again within 5 s",
        f"{dict(ready)}, {after} after {recovered:.1f} s",
        ready[503] > 0 and after == 200 and recovered < 5,
    )
