"""What runs inside the box: loads a candidate's code, calls its function, writes what came back.

Given to the box's interpreter with `-c`, so it imports the standard library only. It knows the inputs and never the
expected outputs: comparing is the judge's business, in another process. Nothing it writes is believed: the bytes are
data that the judge compares.

The nonce is written before the candidate's code is loaded, and the code is loaded when stdin ends. Whoever ends it only
after reading the nonce knows: without a nonce the box failed, with one whatever follows is the candidate's own doing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

DEPTH = 16


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as tagged JSON. Only the built-in types themselves: a subclass may lie about what it equals."""
    if depth > DEPTH:
        raise TypeError("nested too deeply")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return [kind.__name__, value]
    if kind is float:
        return ["float", repr(value)]
    if kind in (list, tuple):
        return [kind.__name__, [plain(one, depth + 1) for one in value]]
    if kind in (set, frozenset):
        return ["set", sorted((plain(one, depth + 1) for one in value), key=json.dumps)]
    if kind is dict:
        return ["dict", sorted(([plain(k, depth + 1), plain(v, depth + 1)] for k, v in value.items()), key=json.dumps)]
    raise TypeError(f"a {kind.__name__} is not plain data")


def main() -> None:
    task = json.loads(sys.stdin.buffer.readline())
    for name, value in task["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    out = os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.write(out, task["nonce"].encode())
    # a candidate of the same user could open the pipe's other side and take back a nonce that nobody has read yet
    sys.stdin.buffer.read()
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    results = []
    try:
        namespace: dict[str, Any] = {"__name__": "candidate"}
        exec(compile(task["code"], "candidate.py", "exec"), namespace)
        function = namespace[task["entry"]]
    except BaseException as error:  # noqa: BLE001 - whatever the candidate raises is its own failure
        results = [["error", type(error).__name__]] * len(task["calls"])
    else:
        for call in task["calls"]:
            try:
                # each call gets arguments of its own: one that changes its list does not change the next one's
                results.append(["value", plain(function(*json.loads(call)))])
            except BaseException as error:  # noqa: BLE001 - as above
                results.append(["error", type(error).__name__])
    os.write(out, json.dumps(results).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
