"""The judge: compares what a candidate wrote with what was expected, in a process where no candidate runs.

usage: judge.py < {"nonce", "box_nonce", "output", "expected"}    run as a script, with limits of its own

It takes the candidate's bytes as untrusted input and answers `nonce {"passed": n, "total": m}` on its stdout, a pipe
that the candidate never held. A judge that dies or says anything else is infrastructure, not a wrong answer.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def verdict(output: str, box_nonce: str, expected: list[Any]) -> dict[str, int]:
    """How many of the results equal what was expected, as tagged JSON, types included."""
    passed = 0
    if output.startswith(box_nonce):
        try:
            results = json.loads(output[len(box_nonce) :])
            if isinstance(results, list) and len(results) == len(expected):
                passed = sum(_same(found, ["value", wanted]) for found, wanted in zip(results, expected, strict=True))
        except (ValueError, RecursionError):
            # writing JSON again takes more of the stack than reading it: both may fail, and neither is our failure
            passed = 0
    return {"passed": passed, "total": len(expected)}


def _same(left: Any, right: Any) -> bool:
    """Equality in which `true` is not 1 and 1 is not 1.0."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    found = verdict(request["output"], request["box_nonce"], request["expected"])
    sys.stdout.write(request["nonce"] + " " + json.dumps(found))


if __name__ == "__main__":
    main()
