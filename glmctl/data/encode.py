"""Documents to token ids: split off validation, rearrange code for fill-in-the-middle, encode. One unit at a time.

Files of a repository that are still there become contexts here, last of all, so that every stage has seen files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl.data import fim, spool
from glmctl.data.chat import ChatTemplate
from glmctl.data.contexts import Repository
from glmctl.data.conversations import Conversation
from glmctl.data.shards import ShardWriter, token_dtype
from glmctl.data.sources import Document, split_long, times
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError

if TYPE_CHECKING:
    from glmctl.recipe.schema import DataRecipe, Source

SPLITS = ("train", "validation")
COUNTS, PLACES = "counts.json", "places.bin"
NOWHERE = -1
PLACE = np.dtype([("split", "i1"), ("document", "<i8")])
"""the first document of the shards that holds one of the sources' documents: place in `SPLITS` or `NOWHERE`, number"""
_CHUNK_CHARS = 2_000_000
_TOKENS_AT_ONCE = 1 << 22


def encode(
    folder: Path, scanned: Path, epochs: np.ndarray, source: Source, recipe: DataRecipe, tokenizer_folder: str
) -> None:
    """Tokens of a scanned unit's documents, each as often as `epochs` [documents] says; the unit is of `source`.

    Writes for each split `tokens-SPLIT.bin` (as in shards), `lengths-SPLIT.bin` (int64) and `domains-SPLIT.bin` (places
    in `domain_names`); `places.bin` (`PLACE` [documents]); and the counts: bytes encoded, tokens and documents by split
    and domain, documents by split, domain and power of two of their length, and by split and domain how many files of
    repositories are in how many contexts.
    """
    tokenizer = _tokenizer(tokenizer_folder)
    template = ChatTemplate(tokenizer)
    with _Output(folder, token_dtype(tokenizer.vocab_size), domain_names(recipe), len(epochs)) as output:
        shown = _shown(scanned, epochs, recipe)
        for repository, group in groupby(shown, key=lambda item: item.document.repository):
            if repository is not None:
                assert source.type == "source_tree", "only source trees have repositories"
                _contexts(group, output, source.context_tokens, recipe, tokenizer)
                continue
            for chunk in _chunks(group):
                for item, ids in _encoded(chunk, recipe, tokenizer, template):
                    output.add(item.split, item.document.domain, [*ids, tokenizer.pad_id], [item.at])
                    output.size += item.document.size


class _Output:
    """The files of one encoded unit, and what is counted on the way; use as a context manager."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], domains: Sequence[str], documents: int) -> None:
        self.folder = folder
        self.dtype = dtype
        self.size = 0
        """UTF-8 bytes of the documents"""
        self.repositories: dict[str, dict[str, Counter[str]]] = {split: {} for split in SPLITS}
        self._numbers = {name: number for number, name in enumerate(domains)}
        self._places = np.zeros(documents, PLACE)
        self._places["split"] = NOWHERE
        self._tokens: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._documents: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._lengths: dict[str, dict[str, Counter[int]]] = {split: {} for split in SPLITS}

    def __enter__(self) -> _Output:
        self._stack = ExitStack()
        self._streams = {
            (kind, split): self._stack.enter_context(open(self.folder / f"{kind}-{split}.bin", "wb"))  # noqa: SIM115
            for kind in ("tokens", "lengths", "domains")
            for split in SPLITS
        }
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stack.close()
        if kind is not None:
            return
        (self.folder / PLACES).write_bytes(self._places.tobytes())
        counts = {
            "bytes": self.size,
            "tokens": self._tokens,
            "documents": self._documents,
            "lengths": self._lengths,
            "repositories": self.repositories,
        }
        (self.folder / COUNTS).write_text(json.dumps(counts), encoding="utf-8")

    def add(self, split: str, domain: str, ids: Sequence[int] | np.ndarray, documents: Sequence[int]) -> None:
        """Append one document of the shards that holds `documents` (places in the unit), its end token included."""
        number = self._documents[split].total()
        for at in documents:
            if self._places[at]["split"] == NOWHERE:
                self._places[at] = (SPLITS.index(split), number)
        # `tofile` would hide that a disk is full
        self._streams["tokens", split].write(np.asarray(ids, self.dtype).tobytes())
        self._streams["lengths", split].write(len(ids).to_bytes(8, "little"))
        self._streams["domains", split].write(self._numbers[domain].to_bytes(2, "little"))
        self._tokens[split][domain] += len(ids)
        self._documents[split][domain] += 1
        self._lengths[split].setdefault(domain, Counter())[len(ids).bit_length() - 1] += 1


def domain_names(recipe: DataRecipe) -> list[str]:
    """The domains of a recipe, in the order of their numbers in the shards."""
    return list(dict.fromkeys(source.domain for source in recipe.sources))


def append(folder: Path, writers: dict[str, ShardWriter], vocab_size: int) -> tuple[dict[str, Any], np.ndarray]:
    """Add an encoded unit to the shards; returns its counts, and `PLACE` of each of its documents in the shards.

    DataError when its files do not hold what its counts say.
    """
    counts: dict[str, Any] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    places = np.fromfile(folder / PLACES, PLACE)
    for number, split in enumerate(SPLITS):
        places["document"][places["split"] == number] += writers[split].documents
    for split, writer in writers.items():
        lengths = np.fromfile(folder / f"lengths-{split}.bin", "<i8")
        domains = np.fromfile(folder / f"domains-{split}.bin", "<u2")
        path = folder / f"tokens-{split}.bin"
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        found = (path.stat().st_size, len(lengths), len(domains), total)
        tokens, documents = sum(counts["tokens"][split].values()), sum(counts["documents"][split].values())
        if found != (tokens * token_dtype(vocab_size).itemsize, documents, documents, tokens):
            raise DataError(f"{path}: does not hold the {documents} documents of {tokens} tokens that were counted")
        if not len(lengths):
            continue
        stored = np.memmap(path, token_dtype(vocab_size), "r")
        at = first = 0
        while first < len(lengths):
            # whole documents, about _TOKENS_AT_ONCE of tokens, at least one
            last = max(first + 1, int(np.searchsorted(ends, at + _TOKENS_AT_ONCE, side="right")))
            stop = int(ends[last - 1])
            writer.add_many(np.asarray(stored[at:stop], np.int64), lengths[first:last], domains[first:last])
            at, first = stop, last
    return counts, places


def split_of(document: Document, validation_fraction: float) -> str:
    """Which split a document is in, by its text alone: neither order, seed nor source matters."""
    draw = int.from_bytes(_hash(b"validation:", document)[:8], "big") / 2.0**64
    return "validation" if draw < validation_fraction else "train"


@dataclass(frozen=True)
class _Item:
    """A document that is shown."""

    at: int
    """its place in the unit"""
    split: str
    document: Document


def _shown(scanned: Path, epochs: np.ndarray, recipe: DataRecipe) -> Iterator[_Item]:
    """Documents as often as they are shown; validation has each of its documents once."""
    for at, (document, shown) in enumerate(zip(spool.documents(scanned), epochs.tolist(), strict=True)):
        if shown == 0:
            continue
        split = split_of(document, recipe.validation_fraction)
        count = times(document.digest, shown, recipe.seed)
        for copy in range(count if split == "train" else min(count, 1)):
            yield _Item(at, split, replace(document, copy=copy))


def _chunks(shown: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Documents in groups of about `_CHUNK_CHARS` characters: enough to keep the cores busy, little memory."""
    chunk: list[_Item] = []
    size = 0
    for item in shown:
        chunk.append(item)
        size += len(item.document.text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(
    chunk: Sequence[_Item], recipe: DataRecipe, tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> Iterator[tuple[_Item, list[int]]]:
    """Each document's ids, without an end token. Files of repositories are no conversations and need no template."""
    prepared = [(item, _parts(item, recipe)) for item in chunk]
    encoded = iter(tokenizer.encode_plain_batch([part.text for _, parts in prepared for part in parts]))
    for item, parts in prepared:
        talk = item.document.conversation
        ids = talk_tokens(talk, template) if talk is not None and template is not None else []
        for part in parts:
            if part.sentinel is not None:
                ids.append(tokenizer.id(part.sentinel))
            ids += next(encoded)
        yield item, ids


def _contexts(group: Iterable[_Item], output: _Output, limit: int, recipe: DataRecipe, tokenizer: Tokenizer) -> None:
    """Add the contexts of one repository, of at most `limit` tokens: round k has the files that are shown more often.

    The header of a file stands outside of what fill-in-the-middle rearranges. A file longer than a context is cut after
    a line, and each part rearranged on its own.
    """
    domain = ""
    with Repository(output.folder, output.dtype) as repository:
        for chunk in _chunks(group):
            for item, ids in _encoded(chunk, recipe, tokenizer):
                document, domain = item.document, item.document.domain
                pieces = [ids]
                if len(ids) >= limit:  # with its end token, it does not fit
                    pieces = list(_parts_of_long(item, len(ids), limit - 1, recipe, tokenizer))
                repository.add(item.split, document.copy, document.path, document.links, item.at, pieces)
                output.size += document.size
                output.repositories[item.split].setdefault(domain, Counter())["files"] += 1
        for found in repository.contexts(limit, tokenizer.encode_plain("\n"), tokenizer.pad_id):
            output.add(found.split, domain, found.tokens, found.documents)
            output.repositories[found.split][domain]["contexts"] += 1


def _parts_of_long(
    item: _Item, count: int, limit: int, recipe: DataRecipe, tokenizer: Tokenizer
) -> Iterator[list[int]]:
    """The ids of a document of `count` tokens, in parts of at most `limit`."""
    document = item.document
    if document.header and len(tokenizer.encode_plain(document.header)) > limit // 2:
        document = replace(document, header="")  # so long a path would leave no room
    # a tenth less than fits on average, so that few parts have to be cut again
    texts = split_long(document.text, max(1, len(document.text) * limit * 9 // (count * 10)))
    parts = [
        replace(item, document=replace(document, text=text, header="" if number else document.header))
        for number, text in enumerate(texts)
    ]
    for part, ids in _encoded(parts, recipe, tokenizer):
        if len(ids) <= limit:
            yield ids
        else:
            yield from _parts_of_long(part, len(ids), limit, recipe, tokenizer)


def _hash(purpose: bytes, document: Document) -> bytes:
    return hashlib.sha256(purpose + document.digest).digest()


def talk_tokens(talk: Conversation, template: ChatTemplate) -> list[int]:
    """A conversation's tokens; mid-training learns all of them, as it learns any text."""
    return template.encode_whole(talk.messages, talk.tools, enable_thinking=talk.enable_thinking)


def _parts(item: _Item, recipe: DataRecipe) -> list[fim.Part]:
    """The document's text as it is to be encoded; nothing for a conversation, which the template encodes."""
    document = item.document
    if document.conversation is not None:
        return []
    if document.is_code and item.split == "train":
        purpose = f"fim:{recipe.seed}:{document.copy}:".encode()
        parts = fim.rearrange(document.text, recipe.fim, random.Random(_hash(purpose, document)))
        if len(parts) > 1:
            return [fim.Part(None, document.header), *parts] if document.header else parts
    return [fim.Part(None, document.header + document.text)]


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
