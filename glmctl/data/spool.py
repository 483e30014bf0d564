"""Documents between two passes: what survived the local stages, as JSON lines beside a table of fixed-size records."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl.data.conversations import Conversation
from glmctl.data.reading import BadRows
from glmctl.data.repository import Links
from glmctl.data.sources import Document, read
from glmctl.data.stages import Page, applies, judge

if TYPE_CHECKING:
    from glmctl.data.stages import LocalStage
    from glmctl.data.units import Unit
    from glmctl.recipe.schema import Source

DOCUMENTS, TABLE, COUNTS = "documents.jsonl", "table.bin", "counts.json"
RECORD = np.dtype(
    [
        ("digest", "<u8", 2),
        ("start", "<u8"),
        ("bytes", "<u4"),
        ("source", "<u2"),
        ("language", "<u8"),
        ("epochs", "<f4"),
    ]
)
"""first half of the text's SHA-256, where its line begins, UTF-8 bytes, source, `language_key`, times shown"""
_RECORDS_AT_ONCE = 4096


def scan(folder: Path, unit: Unit, source: Source, stages: Sequence[LocalStage], max_bad: float) -> None:
    """Read a unit, apply the local stages, and write what survives, its table, and the counts."""
    bad = BadRows(limit=max_bad)
    reasons: list[Counter[str]] = [Counter() for _ in stages]
    seen = [0] * len(stages)
    rows = 0
    with open(folder / DOCUMENTS, "wb") as texts, open(folder / TABLE, "wb") as table:
        records: list[tuple[Any, ...]] = []
        for document in read(unit, source, bad):
            rows += 1
            kept, epochs = _through(document, stages, seen, reasons)
            if kept is None:
                continue
            start = texts.tell()
            texts.write(_line(kept))
            size = len(kept.text.encode("utf-8", "surrogatepass"))
            digest = np.frombuffer(kept.digest[:16], "<u8")
            records.append((digest, start, size, unit.source, language_key(kept.language), epochs))
            if len(records) == _RECORDS_AT_ONCE:
                table.write(np.array(records, RECORD).tobytes())  # `tofile` would hide that a disk is full
                records.clear()
        table.write(np.array(records, RECORD).tobytes())
    counts = {
        "rows": rows,
        "stages": [{"in": total, "reasons": dict(found)} for total, found in zip(seen, reasons, strict=True)],
        "bad": {"kinds": dict(bad.kinds), "places": bad.places},
    }
    (folder / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


@lru_cache(maxsize=1024)
def language_key(language: str) -> int:
    """A number for a language's name: rows may state any, and processes that do not meet must number them alike."""
    return int.from_bytes(hashlib.sha256(language.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def _through(
    document: Document, stages: Sequence[LocalStage], seen: list[int], reasons: list[Counter[str]]
) -> tuple[Document | None, float]:
    """The document as the last stage leaves it, or None, and how many times it is shown."""
    page, epochs = Page(document), 1.0
    for at, stage in enumerate(stages):
        if not applies(stage.domains, document.domain):
            continue
        seen[at] += 1
        page, verdict = judge(stage, page)
        if not verdict.kept:
            reasons[at][verdict.reason] += 1
            return None, 0.0
        epochs *= verdict.epochs
    return page.document, epochs


def _line(document: Document) -> bytes:
    talk = document.conversation.row() if document.conversation is not None else None
    row = [document.text, document.domain, document.path, document.is_code, document.language, talk, document.header]
    if document.repository is not None and document.links is not None:
        row += [document.repository, document.links.names, document.links.needs, document.links.mentions]
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _document(line: bytes) -> Document:
    row = json.loads(line.decode("utf-8", "surrogatepass"))
    text, domain, path, is_code, language, talk, header, *more = row
    conversation = None
    if talk is not None:
        conversation = Conversation(talk["messages"], talk.get("tools"), talk["enable_thinking"])
    repository, links = None, None
    if more:
        repository, names, needs, mentions = more
        links = Links(tuple((name, top) for name, top in names), tuple(needs), tuple(mentions))
    return Document(
        text,
        domain,
        path,
        is_code,
        language,
        conversation=conversation,
        header=header,
        repository=repository,
        links=links,
    )


def documents(folder: Path) -> Iterator[Document]:
    """The documents of a scanned unit, in order."""
    with open(folder / DOCUMENTS, "rb") as stream:
        for line in stream:
            yield _document(line)


def table(folder: Path) -> np.ndarray:
    """The records of a scanned unit."""
    return np.fromfile(folder / TABLE, RECORD)


def counts(folder: Path) -> dict[str, Any]:
    """What the scan of a unit counted."""
    found: dict[str, Any] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return found


def pick(folders: Sequence[Path], bounds: np.ndarray, starts: np.ndarray, index: np.ndarray) -> list[Document]:
    """The documents `index` (rising) of the whole corpus; unit u holds documents `bounds[u]` ... `bounds[u + 1]`."""
    found: list[Document] = []
    for unit, folder in enumerate(folders):
        here = index[(index >= bounds[unit]) & (index < bounds[unit + 1])]
        if not len(here):
            continue
        with open(folder / DOCUMENTS, "rb") as stream:
            for start in starts[here].tolist():
                stream.seek(start)
                found.append(_document(stream.readline()))
    return found
