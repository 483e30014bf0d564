"""Issues, pull requests and commits that belong together, as one text (spec section 2, Data: repo-level).

Records that link to each other form one context: the files their diffs touch, then issues, pull requests and commits
in the order of their dates (else of the file), commits as diffs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmctl.data.repository import dependency_order, headed
from glmctl.errors import DataError

KINDS = ("issue", "pull", "commit")
_NUMBER_LINK = re.compile(r"(?<![\w&])#(\d+)\b")
_TOUCHED = re.compile(r"^\+\+\+ b/(.+?)\s*$", re.MULTILINE)
_MIN_SHA = 7


@dataclass(frozen=True)
class Record:
    """One issue, pull request or commit."""

    kind: str
    name: str
    """`#12`, or a commit's hash"""
    title: str
    body: str
    diff: str
    comments: tuple[str, ...]
    links: tuple[str, ...]
    """names of other records, from the field `links` and from `#12` in the texts"""
    date: str
    place: str


def record_of(row: dict[str, Any], place: str) -> Record:
    """A checked record. DataError says what is wrong."""
    kind = row.get("type")
    if kind not in KINDS:
        raise DataError(f"'type' is {kind!r}, not one of {', '.join(KINDS)}")
    key = "sha" if kind == "commit" else "number"
    if not isinstance(row.get(key), str | int):
        raise DataError(f"a {kind} needs '{key}'")
    texts = {name: row.get(name) or "" for name in ("title", "body", "diff", "date")}
    wrong = next((name for name, value in texts.items() if not isinstance(value, str)), None)
    comments, links = row.get("comments") or [], row.get("links") or []
    if wrong is not None or not isinstance(comments, list) or not isinstance(links, list):
        raise DataError(f"'{wrong or 'comments or links'}' has the wrong type")
    said = [texts["title"], texts["body"], *map(str, comments)]
    mentioned = [f"#{number}" for text in said for number in _NUMBER_LINK.findall(text)]
    named = [f"#{link}" if isinstance(link, int) or str(link).isdigit() else str(link) for link in links]
    name = str(row[key]) if kind == "commit" else f"#{row[key]}"
    return Record(
        kind,
        name,
        texts["title"],
        texts["body"],
        texts["diff"],
        tuple(map(str, comments)),
        tuple(dict.fromkeys([*named, *mentioned])),
        texts["date"],
        place,
    )


def contexts(records: Sequence[Record], root: Path | None, limit: int) -> Iterator[tuple[str, str]]:
    """(place of the first record, text) of every group, of at most about `limit` characters.

    A group whose records do not fit is continued in a new context; a record longer than that is cut.
    """
    for group in groups(records):
        touched = _touched(group, root, limit // 2)
        parts = [headed(path, touched[path]) for path in dependency_order(touched, root)]
        place, size = group[0].place, sum(map(len, parts))
        for record in group:
            text = render(record)[:limit]
            if parts and size + len(text) > limit:
                yield place, "\n\n".join(parts)
                parts, size, place = [], 0, record.place
            parts.append(text)
            size += len(text)
        yield place, "\n\n".join(parts)


def groups(records: Sequence[Record]) -> list[list[Record]]:
    """Records connected by links, each group by date (then by place in the input), groups by their first record."""
    parent = list(range(len(records)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    named: dict[str, int] = {}
    for at, record in enumerate(records):
        named.setdefault(record.name, at)
        if record.kind == "commit":
            named.setdefault(record.name[:_MIN_SHA], at)
    for at, record in enumerate(records):
        for link in record.links:
            other = named.get(link, named.get(link[:_MIN_SHA]) if len(link) >= _MIN_SHA else None)
            if other is not None:
                one, two = sorted((root(at), root(other)))
                parent[two] = one
    found: dict[int, list[Record]] = {}
    for at in range(len(records)):
        found.setdefault(root(at), []).append(records[at])
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    return [sorted(group, key=lambda record: (record.date, order[record.kind])) for group in found.values()]


def render(record: Record) -> str:
    """A record as a reader of the repository would meet it; a commit is its message above its diff."""
    if record.kind == "commit":
        message = "\n".join(f"    {line}".rstrip() for line in f"{record.title}\n\n{record.body}".strip().splitlines())
        return f"commit {record.name}\n\n{message}\n\n{record.diff}".rstrip() + "\n"
    head = "Issue" if record.kind == "issue" else "Pull request"
    parts = [f"{head} {record.name}: {record.title}", record.body.strip()]
    parts += [f"> {comment.strip()}" for comment in record.comments]
    parts.append(record.diff.rstrip())
    return "\n\n".join(part for part in parts if part) + "\n"


def _touched(group: Sequence[Record], root: Path | None, limit: int) -> dict[str, str]:
    """Files of the checkout that the group's diffs change, as long as they fit; never one outside it."""
    if root is None:
        return {}
    found: dict[str, str] = {}
    home = root.resolve()
    for path in dict.fromkeys(path for record in group for path in _TOUCHED.findall(record.diff)):
        file = (home / path).resolve()
        if not file.is_relative_to(home) or not file.is_file() or file.stat().st_size > limit:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if sum(map(len, found.values())) + len(text) <= limit:
            found[path] = text
    return found
