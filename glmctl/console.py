"""The one place that prints: results on stdout, notices on stderr, progress where somebody is looking.

`configure` is called once by the CLI; before that the defaults hold (text, not quiet), so that drivers can be
used as a library too. Nothing here imports rich until a table or a live bar is drawn.
"""

from __future__ import annotations

import json as _json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

PLAIN_SECONDS = 5.0
"""longest silence of a plain (not live) progress, in seconds"""
PLAIN_FRACTION = 0.1
"""share of the total after which a plain progress speaks in any case"""


@dataclass
class _State:
    json: bool = False
    quiet: bool = False
    debug: bool = False
    rank: int = 0


_state = _State()


def configure(*, json: bool = False, quiet: bool = False, debug: bool = False, rank: int = 0) -> None:
    """Set how everything below speaks. `json`: one object on stdout; `quiet`: no notices, no progress.

    rank: this process's place among those of a job. They say the same, so all but the first keep to their errors.
    """
    _state.json, _state.quiet, _state.debug, _state.rank = json, quiet or rank > 0, debug, rank


def is_json() -> bool:
    """Whether results are JSON objects on stdout."""
    return _state.json


def is_quiet() -> bool:
    """Whether notices and progress are left out."""
    return _state.quiet


def is_debug() -> bool:
    """Whether errors show their traceback."""
    return _state.debug


def rank() -> int:
    """This process's place among those of its job, 0 for the first or only one."""
    return _state.rank


def note(message: str) -> None:
    """A notice on stderr; nothing when quiet."""
    if not _state.quiet:
        print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """A warning on stderr, also when quiet."""
    if not _state.rank:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def error(kind: str, message: str, hint: str | None, exit_code: int, *, final: bool = True) -> None:
    """An error: `error: ...` (and `hint: ...`) on stderr, and with --json one object on stdout too.

    Not `final`: one of several, of which only the last becomes the object. A rank but the first names itself on
    stderr and leaves object and hint to the first.
    """
    named = f"rank {_state.rank}: " if _state.rank else ""
    text = f"error: {named}{_one_line(message)}\n"
    if hint and not _state.rank:
        text += f"hint: {_one_line(hint)}\n"
    # in one write, ends of lines too: other ranks may be writing to the same stream
    print(text, file=sys.stderr, end="", flush=True)
    if final and not _state.rank:
        error_object(kind, message, hint, exit_code)


def error_object(kind: str, message: str, hint: str | None, exit_code: int) -> None:
    """With --json, an error as one object on stdout; else nothing."""
    if _state.json:
        body = {"kind": kind, "message": _one_line(message), "hint": hint, "exit_code": exit_code}
        print(_json.dumps({"error": body}, ensure_ascii=False), flush=True)


def out(text: str) -> None:
    """Result text on stdout. Under --json nothing: the object of `result` is all that stdout then holds."""
    if not _state.json:
        print(text, flush=True)


def result(data: dict[str, Any], *, text: str | None = None, next_command: str | None = None) -> None:
    """The final result: with --json `data` as one object on stdout, else `text` or aligned `key  value` lines.

    `next_command` is what a user would type next; it goes to stderr (and into the object as `next`).
    """
    if _state.json:
        body = {**data, "next": next_command} if next_command else data
        print(_json.dumps(body, ensure_ascii=False, default=str), flush=True)
    else:
        body_text = pairs(data) if text is None else text
        if body_text:
            print(body_text, flush=True)
        if next_command:
            note(f"next: {next_command}")


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout, as wide as the terminal allows; plain aligned columns in a pipe; nothing under --json."""
    if _state.json:
        return
    if not sys.stdout.isatty():
        print(_plain_table(title, columns, rows), flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, title=title or None, title_justify="left", title_style="bold", header_style="bold")
    for row in rows:
        drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(highlight=False).print(drawn)


def pairs(data: dict[str, Any], indent: int = 0) -> str:
    """`data` as lines of `key  value`, values aligned; nested mappings are indented below their key."""
    scalars = [str(k) for k, v in data.items() if not isinstance(v, dict)]
    width = max((len(key) for key in scalars), default=0)
    lines = []
    for key, value in data.items():
        pad = " " * indent
        if isinstance(value, dict):
            lines += [f"{pad}{key}", pairs(value, indent + 2)]
        else:
            lines.append(f"{pad}{key:<{width}}  {number(value)}".rstrip())
    return "\n".join(line for line in lines if line)


def number(value: object) -> str:
    """A value as people read it: thousands separated, floats to 4 significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as `8s`, `3m05s`, `2h07m` or `4d02h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Progress(Protocol):
    """A started progress; `advance` moves it and shows the latest `fields` beside it."""

    def advance(self, n: int = 1, **fields: float | str) -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str = "step", start: int = 0) -> Iterator[Progress]:
    """Progress from `start` to `total` with rate and time left.

    A live bar when stderr is a terminal; else a line every 5 s, at every tenth and at the end; nothing when quiet.
    """
    if _state.quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _live(label, total, unit, start) as bar:
            yield bar
    else:
        plain = _Plain(label, total, unit, start)
        yield plain
        plain.close()


class _Silent:
    def advance(self, n: int = 1, **fields: float | str) -> None:
        """Nothing: quiet was asked for."""


class _Plain:
    """Whole lines, few of them: what logs and CI want."""

    def __init__(self, label: str, total: int, unit: str, start: int) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.start = self.done = self.said = start
        self.fields: dict[str, float | str] = {}
        self.began = self.spoke = time.monotonic()

    def advance(self, n: int = 1, **fields: float | str) -> None:
        self.done += n
        self.fields.update(fields)
        now = time.monotonic()
        far = self.done - self.said >= PLAIN_FRACTION * self.total
        if far or now - self.spoke >= PLAIN_SECONDS or self.done == self.total:
            self._say(now)

    def close(self) -> None:
        if self.said != self.done:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        self.said, self.spoke = self.done, now
        rate = (self.done - self.start) / max(now - self.began, 1e-9)
        words = [f"{self.label}: {self.done}/{self.total} {self.unit}s", f"{_rate(rate)} {self.unit}s/s"]
        if 0 < self.done < self.total and rate > 0:
            words.append(f"{duration((self.total - self.done) / rate)} left")
        words += [f"{key} {number(value)}" for key, value in self.fields.items()]
        note(", ".join(words))


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


@contextmanager
def _live(label: str, total: int, unit: str, start: int) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    began = time.monotonic()

    class Live:
        """Writes rate and fields as text columns beside rich's bar."""

        def __init__(self) -> None:
            self.done = start
            self.fields: dict[str, float | str] = {}

        def advance(self, n: int = 1, **fields: float | str) -> None:
            self.done += n
            self.fields.update(fields)
            rate = (self.done - start) / max(time.monotonic() - began, 1e-9)
            shown = "  ".join(f"{key} {number(value)}" for key, value in self.fields.items())
            bar.update(task, completed=self.done, rate=f"{_rate(rate)} {unit}s/s", shown=shown)

    bar = bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}", markup=False),
        bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        bars.TextColumn("{task.fields[shown]}", markup=False),
        console=Console(stderr=True, highlight=False),
    )
    with bar:
        task = bar.add_task(label, total=total, completed=start, rate="", shown="")
        yield Live()


def _plain_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = "  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*([title] if title else []), head, rule, *lines])


def _one_line(message: str) -> str:
    return " ".join(message.split())
