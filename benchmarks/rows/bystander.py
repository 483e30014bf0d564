"""One client in a process of its own beside a crowd: what a refusal and `/health` take it, as JSON on standard output.

    python bystander.py URL SECONDS

The crowd itself, hundreds of streams in one process, is too busy reading to time anything.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from urllib.parse import urlsplit

REQUEST = {"model": "any", "prompt": "Compute", "max_tokens": 1, "stream": True}


def main() -> None:
    url, until = urlsplit(sys.argv[1]), time.perf_counter() + float(sys.argv[2])
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=120)
    taken: dict[str, list[float]] = {"health": [], "refused": []}
    while time.perf_counter() < until:
        for method, path, kind in (("GET", "/health", "health"), ("POST", "/v1/completions", "refused")):
            since = time.perf_counter()
            connection.request(method, path, json.dumps(REQUEST) if method == "POST" else None)
            response = connection.getresponse()
            if kind == "refused" and response.status == 200:
                connection.close()  # it was let in: it leaves, and comes again
                continue
            assert response.status == 200 or kind == "refused"
            response.read()
            taken[kind].append(time.perf_counter() - since)
        time.sleep(0.02)
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
