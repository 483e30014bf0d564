"""Issues, pull requests and commits that belong together, as one text (spec section 2, Data: repo-level).

A change and what links to it directly form one context: the files their diffs touch, then issues, pull requests and
commits in the order of their dates (else of the file), commits as diffs.
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
_SHA = re.compile(rf"[0-9a-f]{{{_MIN_SHA},40}}")


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
    repository: str
    """names of records count inside it: the row's field, else the file"""


def record_of(row: dict[str, Any], place: str) -> Record:
    """A checked record. DataError says what is wrong."""
    kind = row.get("type")
    if kind not in KINDS:
        raise DataError(f"'type' is {kind!r}, not one of {', '.join(KINDS)}")
    key = "sha" if kind == "commit" else "number"
    if not isinstance(row.get(key), str | int):
        raise DataError(f"a {kind} needs '{key}'")
    texts = {name: row.get(name) or "" for name in ("title", "body", "diff", "date", "repository")}
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
        texts["repository"] or place.rpartition(":")[0],
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
    """Every record once: a pull request with its commits and what links to any of them directly, then a commit, then an
    issue, each with what links to it directly and is in no group yet.

    Links of links do not join, so a busy tracker does not become one group. A commit or an issue is in the first group
    that it belongs to. A group is in order of date (then of kind), groups in that of their first record.
    """
    linked = _linked(records)
    free = set(range(len(records)))
    found: list[list[int]] = []
    for kind in ("pull", "commit", "issue"):
        for at, record in enumerate(records):
            if record.kind != kind or at not in free:
                continue
            # a pull request has a group of its own, whoever mentions it
            own = {at} | {other for other in linked[at] & free if kind == "pull" and records[other].kind == "commit"}
            near = {other for member in own for other in linked[member] & free}
            group = own | {other for other in near if records[other].kind != "pull"}
            free -= group
            found.append(sorted(group))
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    return [
        sorted((records[at] for at in group), key=lambda record: (record.date, order[record.kind]))
        for group in sorted(found)
    ]


def _linked(records: Sequence[Record]) -> list[set[int]]:
    """Places of the records that each links to or is linked from."""
    named: dict[tuple[str, str], int] = {}
    commits: dict[tuple[str, str], list[int]] = {}
    for at, record in enumerate(records):
        named.setdefault((record.repository, record.name), at)
        if record.kind == "commit":
            commits.setdefault((record.repository, record.name[:_MIN_SHA].lower()), []).append(at)
    linked: list[set[int]] = [set() for _ in records]
    for at, record in enumerate(records):
        for link in record.links:
            other = named.get((record.repository, link))
            if other is None and _SHA.fullmatch(link.lower()):
                other = _abbreviated(
                    records, commits.get((record.repository, link[:_MIN_SHA].lower()), ()), link.lower()
                )
            if other is not None and other != at:
                linked[at].add(other)
                linked[other].add(at)
    return linked


def _abbreviated(records: Sequence[Record], places: Sequence[int], link: str) -> int | None:
    """The one commit whose hash the link shortens, or is shortened to; None when there are several."""
    fitting = [
        at for at in places if records[at].name.lower().startswith(link) or link.startswith(records[at].name.lower())
    ]
    return fitting[0] if len(fitting) == 1 else None


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
