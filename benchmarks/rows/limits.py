"""Rows S4, S5 and S9: bad bodies, large bodies, and drafts that may not change a token."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from typing import Any

import httpx

from rows.client import Report, Served, percentile, scored_text, start

NUMBERS = ("max_tokens", "n", "top_k", "seed", "temperature", "top_p", "min_p", "presence_penalty", "top_logprobs")
RAW = ("-1", "1e999", "NaN", "1" + "0" * 400, '"1"', "[]", "{}", '"\\ud800"', "[[[[]]]]", "9" * 5000, "nul", "1,")
FIELDS = ("messages", "tools", "tool_choice", "response_format", "stop", "logit_bias", "model", "metadata")
ODD = ("7", '"\\u0000"', "[null]", '{"type": []}', '[{"role": "user"}]', '{"": ""}', "[" * 100_000, '"\\udc00"')
JSON = {"content-type": "application/json"}


def bad_bodies() -> list[bytes]:
    """Requests with one member that cannot be right."""
    whole = '{"model": "any", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1'
    made = [f'{whole}, "{name}_": 1, "{name}": {value}}}' for name, value in itertools.product(NUMBERS, RAW)]
    made += [
        f'{whole}, "x": "{"y" * index}", "{name}": {value}}}'
        for index, (name, value) in enumerate(itertools.product(FIELDS, ODD))
    ]
    made += [whole[:cut] for cut in range(0, len(whole), 1)]
    made += [f"{whole}}} {junk}" for junk in ("{}", "x", "\x00", ",", "]")]
    return [text.encode("utf-8", "surrogatepass") for text in made] + [bytes([byte]) * 9 for byte in range(0, 256, 4)]


async def refusals(report: Report, served: Served) -> None:
    """S4: every bad body is refused, and fast."""
    bodies = bad_bodies()
    statuses: Counter[int] = Counter()
    taken = []
    async with httpx.AsyncClient(timeout=60) as client:
        for raw in bodies:
            since = time.perf_counter()
            response = await client.post(f"{served.url}/v1/chat/completions", content=raw, headers=JSON)
            if response.status_code != 200:
                taken.append(time.perf_counter() - since)
            statuses[response.status_code] += 1
    report.row(f"S4 {len(bodies)} bad bodies: no 5xx", str(dict(statuses)), max(statuses) < 500 and len(bodies) >= 300)
    late = percentile(taken, 99)
    report.row("S4 a refusal takes, p99 (100 ms)", f"{late * 1000:.1f} ms", late < 0.1)


def large_bodies(limit: int) -> dict[str, bytes]:
    """What takes longest to read, each just under the limit of a body."""
    head = '{"model": "any", "max_tokens": 1, '
    room = limit - 200
    message = json.dumps({"role": "user", "content": "x" * 3900})
    return {
        "one text": f'{head}"prompt": "{"a b " * (room // 4)}"}}'.encode(),
        "numbers": f'{head}"prompt": [{"1," * (room // 2)}1]}}'.encode(),
        "lists": f'{head}"prompt": [{"[]," * (room // 3)}[]]}}'.encode(),
        "escapes": f'{head}"prompt": "{chr(92)}u00e4{f"{chr(92)}u00e4" * (room // 6)}"}}'.encode(),
        "messages": f'{head}"messages": [{", ".join([message] * 2040)}]}}'.encode(),
    }


async def large(report: Report, served: Served) -> None:
    """S5: while the largest bodies are read, others are answered."""
    limit = 8 * 1024 * 1024
    async with httpx.AsyncClient(timeout=300) as client:
        over = await client.post(f"{served.url}/v1/completions", content=b" " * (limit + 1), headers=JSON)
        at = await client.post(f"{served.url}/v1/completions", content=b" " * limit, headers=JSON)
        report.row(
            "S5 a body of 8 MiB is read, of one byte more refused",
            f"{at.status_code}, {over.status_code}",
            (at.status_code, over.status_code) == (400, 413),
        )
        for name, raw in large_bodies(limit).items():
            path = "/tokenize" if name == "messages" else "/v1/completions"
            posts = [
                asyncio.create_task(client.post(f"{served.url}{path}", content=raw, headers=JSON)) for _ in range(2)
            ]
            waits = []
            while not all(post.done() for post in posts):
                since = time.perf_counter()
                assert (await client.get(f"{served.url}/health")).status_code == 200
                waits.append(time.perf_counter() - since)
                await asyncio.sleep(0.01)
            statuses = {post.result().status_code for post in posts}
            report.row(
                f"S5 two bodies of {len(raw) / 2**20:.1f} MiB at once ({name}): longest /health (100 ms)",
                f"{max(waits) * 1000:.0f} ms of {len(waits)}, answers {statuses}",
                max(waits) < 0.1 and max(statuses) < 500,
            )


def drafts(report: Report, model: str, count: int) -> None:
    """S9: greedy answers with and without MTP drafts, one at a time and eight at once."""
    rng = random.Random(0)
    words = ["Compute", "3", "+", "4", "-", "def", "add", "(a, b):", "return", "The", "stock", "of", "item", "?"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(count)]
    plain = asyncio.run(_answers(model, prompts, 0, 1))[0]
    for speculative, at_once in ((1, 1), (1, 8), (3, 1), (3, 8)):
        answers, drafted, accepted = asyncio.run(_answers(model, prompts, speculative, at_once))
        wrong = sum(one != other for one, other in zip(plain, answers, strict=True))
        report.row(
            f"S9 {count} prompts, {speculative} drafted, {at_once} at once: tokens and scores as without, bit by bit",
            f"{wrong} differ; {drafted - accepted:.0f} of {drafted:.0f} drafts rejected",
            wrong == 0 and drafted > accepted,
        )


async def _answers(model: str, prompts: list[str], speculative: int, at_once: int) -> tuple[list[Any], float, float]:
    served = start(model, "--speculative", str(speculative))
    gate = asyncio.Semaphore(at_once)
    try:
        async with httpx.AsyncClient(timeout=120) as client:

            async def one(prompt: str) -> tuple[str, list[float]]:
                request = {"model": "any", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True}
                async with gate:
                    return await scored_text(client, served.url, {**request, "ignore_eos": True})

            found = await asyncio.gather(*map(one, prompts))
            text = (await client.get(f"{served.url}/metrics")).text
    finally:
        served.stop()
    counts = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    return found, float(counts["glmctl_drafts_total"]), float(counts["glmctl_drafts_accepted_total"])
