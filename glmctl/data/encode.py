"""Documents to token ids: split off validation, rearrange code for fill-in-the-middle, encode. One unit at a time."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl.data import fim, spool
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.shards import ShardWriter, token_dtype
from glmctl.data.sources import Document, times
from glmctl.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from glmctl.recipe.schema import DataRecipe

SPLITS = ("train", "validation")
COUNTS = "counts.json"
_CHUNK_CHARS = 2_000_000
_TOKENS_AT_ONCE = 1 << 22


def encode(folder: Path, scanned: Path, epochs: np.ndarray, recipe: DataRecipe, tokenizer_folder: str) -> None:
    """Tokens of a scanned unit's documents, each as often as `epochs` [documents] says.

    Writes for each split `tokens-SPLIT.bin` (as in shards), `lengths-SPLIT.bin` (int64) and `domains-SPLIT.bin` (places
    in `domain_names`), and the counts: bytes encoded, tokens and documents by split and domain, and documents by split,
    domain and power of two of their length.
    """
    tokenizer = _tokenizer(tokenizer_folder)
    template = ChatTemplate(tokenizer)
    places = {name: place for place, name in enumerate(domain_names(recipe))}
    size = 0
    tokens: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    documents: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    lengths: dict[str, dict[str, Counter[int]]] = {split: {} for split in SPLITS}
    stored = {"tokens": token_dtype(tokenizer.vocab_size), "lengths": np.dtype("<i8"), "domains": np.dtype("<u2")}
    with ExitStack() as stack:
        streams = {
            (kind, split): stack.enter_context(open(folder / f"{kind}-{split}.bin", "wb"))
            for kind in stored
            for split in SPLITS
        }
        for chunk in _chunks(_shown(scanned, epochs, recipe)):
            held: dict[tuple[str, str], list[int]] = {key: [] for key in streams}
            for split, document, ids in _encoded(chunk, recipe, tokenizer, template):
                held["tokens", split] += ids
                held["lengths", split].append(len(ids))
                held["domains", split].append(places[document.domain])
                tokens[split][document.domain] += len(ids)
                documents[split][document.domain] += 1
                lengths[split].setdefault(document.domain, Counter())[len(ids).bit_length() - 1] += 1
                size += len(document.text.encode("utf-8", "replace"))
            for key, stream in streams.items():
                np.array(held[key], stored[key[0]]).tofile(stream)
    counts = {"bytes": size, "tokens": tokens, "documents": documents, "lengths": lengths}
    (folder / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


def domain_names(recipe: DataRecipe) -> list[str]:
    """The domains of a recipe, in the order of their numbers in the shards."""
    return list(dict.fromkeys(source.domain for source in recipe.sources))


def append(folder: Path, writers: dict[str, ShardWriter], vocab_size: int) -> dict[str, Any]:
    """Add an encoded unit to the shards; returns its counts."""
    for split, writer in writers.items():
        lengths = np.fromfile(folder / f"lengths-{split}.bin", "<i8")
        domains = np.fromfile(folder / f"domains-{split}.bin", "<u2")
        if not len(lengths):
            continue
        stored = np.memmap(folder / f"tokens-{split}.bin", token_dtype(vocab_size), "r")
        ends = np.cumsum(lengths)
        at = first = 0
        while first < len(lengths):
            # whole documents, about _TOKENS_AT_ONCE of tokens, at least one
            last = max(first + 1, int(np.searchsorted(ends, at + _TOKENS_AT_ONCE, side="right")))
            stop = int(ends[last - 1])
            writer.add_many(np.asarray(stored[at:stop], np.int64), lengths[first:last], domains[first:last])
            at, first = stop, last
    counts: dict[str, Any] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return counts


def split_of(document: Document, validation_fraction: float) -> str:
    """Which split a document is in, by its text alone: neither order, seed nor source matters."""
    draw = int.from_bytes(_hash(b"validation:", document)[:8], "big") / 2.0**64
    return "validation" if draw < validation_fraction else "train"


def _shown(scanned: Path, epochs: np.ndarray, recipe: DataRecipe) -> Iterator[tuple[str, Document]]:
    """(split, document) as often as it is shown; validation has each of its documents once."""
    for document, shown in zip(spool.documents(scanned), epochs.tolist(), strict=True):
        if shown == 0:
            continue
        split = split_of(document, recipe.validation_fraction)
        count = times(document.digest, shown, recipe.seed)
        for copy in range(count if split == "train" else min(count, 1)):
            yield split, replace(document, copy=copy)


def _chunks(shown: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Documents in groups of about `_CHUNK_CHARS` characters: enough to keep the cores busy, little memory."""
    chunk: list[tuple[str, Document]] = []
    size = 0
    for split, document in shown:
        chunk.append((split, document))
        size += len(document.text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encoded(
    chunk: list[tuple[str, Document]], recipe: DataRecipe, tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[str, Document, list[int]]]:
    prepared = [(split, document, _parts(document, split, recipe)) for split, document in chunk]
    encoded = iter(tokenizer.encode_plain_batch([part.text for _, _, parts in prepared for part in parts]))
    for split, document, parts in prepared:
        ids = _talk_tokens(document.conversation, template) if document.conversation else []
        for part in parts:
            if part.sentinel is not None:
                ids.append(tokenizer.id(part.sentinel))
            ids += next(encoded)
        ids.append(tokenizer.pad_id)
        yield split, document, ids


def _hash(purpose: bytes, document: Document) -> bytes:
    return hashlib.sha256(purpose + document.digest).digest()


def _talk_tokens(talk: Conversation, template: ChatTemplate) -> list[int]:
    """A conversation's tokens; mid-training learns all of them, as it learns any text."""
    return template.encode_whole(talk.messages, talk.tools, enable_thinking=talk.enable_thinking)


def _parts(document: Document, split: str, recipe: DataRecipe) -> list[fim.Part]:
    """The document's text as it is to be encoded; nothing for a conversation, which the template encodes."""
    if document.conversation is not None:
        return []
    if not document.is_code or split != "train":
        return [fim.Part(None, document.text)]
    purpose = f"fim:{recipe.seed}:{document.copy}:".encode()
    return fim.rearrange(document.text, recipe.fim, random.Random(_hash(purpose, document)))


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
