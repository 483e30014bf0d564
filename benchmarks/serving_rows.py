"""Rows of serving's reliability plan at full size, each on a `glmctl serve` in a process of its own.

    python benchmarks/serving_rows.py runs/demo/convert --rows S2 S3

S2 leavers · S3 slow clients · S4 bad bodies · S5 large bodies · S6 overload · S7 SIGTERM · S9 drafts · S10 kill -9. The
other rows need no process of their own: S1 and S10's dying engine are in `make soak`, S8 is whole in the default tests.

Prints what was asked, what was seen, and whether it is met; exit 1 when a bar is missed. The times are bars that the
server's users feel, not comparisons: run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

# PYTHONSAFEPATH keeps a script's own folder off the path
sys.path.insert(0, str(Path(__file__).parent))

from rows import life, limits, load
from rows.client import Report, with_server

ROWS = ("S2", "S3", "S4", "S5", "S6", "S7", "S9", "S10")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="runs/demo/convert")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--scale", type=float, default=1.0, help="of 500 clients, 20 s, 50 drains, 200 prompts")
    args, report = parser.parse_args(), Report()
    model, scale = args.model, args.scale

    def on_a_server(test: Callable[..., object], *values: object, options: tuple[str, ...] = ()) -> None:
        with_server(model, lambda served: test(report, served, *values), *options)

    def slow() -> None:
        on_a_server(load.slow, int(500 * scale))
        on_a_server(load.unread, max(1, int(4 * scale)))

    def ends() -> None:
        life.drains(report, model, max(1, int(50 * scale)))
        life.stuck(report, model)

    rows: dict[str, Callable[[], object]] = {
        "S2": lambda: on_a_server(load.leavers, int(500 * scale), options=("--max-queue", "64")),
        "S3": slow,
        "S4": lambda: on_a_server(limits.refusals),
        "S5": lambda: on_a_server(limits.large),
        "S6": lambda: on_a_server(load.overload, 20 * scale, options=("--max-queue", "64")),
        "S7": ends,
        "S9": lambda: limits.drafts(report, model, int(200 * scale)),
        "S10": lambda: on_a_server(life.killed, options=("--max-slots", str(life.STREAMS))),
    }
    for name in args.rows:
        rows[name]()
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
