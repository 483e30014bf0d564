"""A server under test, requests of it, and one line for each thing that was promised."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import httpx

PROMPTS = ["Compute 3+4-2.", "Compute 5-1+4-2.", "def add(a, b):", "The hacker "]


class Report:
    """Prints what was asked, what was seen, and whether that meets it."""

    def __init__(self) -> None:
        self.missed = 0

    def row(self, name: str, seen: str, met: bool) -> None:
        """One line of the result."""
        self.missed += not met
        print(f"{'met   ' if met else 'MISSED'}  {name:<80} {seen}", flush=True)


@dataclass
class Served:
    """A server under test."""

    process: subprocess.Popen[str]
    url: str
    folder: tempfile.TemporaryDirectory[str]
    """its run; removed when nothing refers to this any more"""

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
    folder = tempfile.TemporaryDirectory(prefix="glmctl-rows-")
    command = [sys.executable, "-m", "glmctl", "serve", model, "--port", "0", "--run", f"{folder.name}/run"]
    process = subprocess.Popen(
        [*command, "--served-name", "any", *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"on (http://\S+)/v1", line)
        if found:
            threading.Thread(target=process.stderr.read, daemon=True).start()  # else the pipe fills, and it waits
            return Served(process, found[1], folder)
    raise SystemExit(f"the server ended with code {process.wait()}")


def with_server(model: str, test: Callable[[Served], Coroutine[Any, Any, None]], *options: str) -> None:
    """Run a row on a fresh server, and stop that."""
    served = start(model, *options)
    try:
        asyncio.run(test(served))
    finally:
        served.stop()


def body(rng: random.Random, **more: Any) -> dict[str, Any]:
    """A completion that runs to its last token."""
    fields = {"model": "any", "prompt": rng.choice(PROMPTS), "max_tokens": 64, "temperature": 0, "stream": True}
    return {**fields, "ignore_eos": True, **more}


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


async def choices_of(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a streamed completion, chunk by chunk; RuntimeError when the stream is cut."""
    choices, ended = [], False
    async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
        async for line in response.aiter_lines():
            ended = line == "data: [DONE]" or (ended and not line)
            if line.startswith("data: {") and "choices" in (chunk := json.loads(line[6:])):
                choices += chunk["choices"]
    if not ended:
        raise RuntimeError(f"cut off with status {response.status_code}")
    return choices


async def text_of(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> str:
    """The whole text of a streamed completion."""
    return "".join(choice["text"] for choice in await choices_of(client, url, request))


async def scored_text(client: httpx.AsyncClient, url: str, request: dict[str, Any]) -> tuple[str, list[float]]:
    """Text, and the log-probability of each token to its last bit."""
    choices = await choices_of(client, url, {**request, "logprobs": 0})
    scores = [value for choice in choices if choice["logprobs"] for value in choice["logprobs"]["token_logprobs"]]
    return "".join(choice["text"] for choice in choices), scores


async def latencies(client: httpx.AsyncClient, url: str, count: int) -> list[float]:
    """Seconds of `count` short requests, one after another."""
    taken = []
    for _ in range(count):
        since = time.perf_counter()
        await text_of(client, url, body(random.Random(0), max_tokens=8))
        taken.append(time.perf_counter() - since)
    return taken


def percentile(values: list[float], percent: int) -> float:
    """Of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
