"""Text to token shards: read, split off validation, fill-in-the-middle, encode, write."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from glmctl import console
from glmctl.data import fim
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.reading import BadRows
from glmctl.data.shards import ShardWriter
from glmctl.data.sources import Document, documents, size_hint
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError
from glmctl.run import atomic

if TYPE_CHECKING:
    from glmctl.recipe.schema import DataRecipe
    from glmctl.run.directory import Run

SPLITS = ("train", "validation")
_CHUNK_CHARS = 2_000_000


def run(recipe: DataRecipe, run: Run) -> dict[str, Any]:
    """Prepare the data of `recipe` under the run's export: `train/`, `validation/`, `report.json`, manifest.

    Each document ends in `<|endoftext|>`. The split goes by content hash, so the same text is never on both sides;
    validation takes each of its documents once and as it is (no fill-in-the-middle).
    Summary: `tokens_train`, `tokens_validation`, `documents`, `unigram_entropy` (see there), `bad_rows`.
    DataError when either split ends up empty, or a source has more bad rows than `max_bad_rows`.
    """
    tokenizer = Tokenizer.load(recipe.tokenizer)
    bad = BadRows(limit=recipe.max_bad_rows)
    tokens: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    with atomic.publish(run.export) as folder:
        writers = {
            split: ShardWriter(
                folder / split,
                vocab_size=tokenizer.vocab_size,
                tokenizer_hash=tokenizer.hash,
                end_of_document=tokenizer.pad_id,
                shard_tokens=recipe.shard_tokens,
            )
            for split in SPLITS
        }
        with writers["train"], writers["validation"]:
            size = _write(recipe, tokenizer, writers, tokens, bad)
        _require_both(writers, recipe.validation_fraction)
        entropy = unigram_entropy(writers["validation"].counts)
        report = {
            "tokens": {split: dict(sorted(tokens[split].items())) for split in SPLITS},
            "documents": {split: writers[split].documents for split in SPLITS},
            "unigram_entropy": entropy,
            "bad_rows": {"by_kind": dict(bad.kinds), "places": bad.places},
            "tokenizer_hash": tokenizer.hash,
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if bad.total:
        console.warn(f"{bad.total} rows left out: {bad.summary()}")
    total = sum(writer.total_tokens for writer in writers.values())
    summary: dict[str, Any] = {f"tokens_{split}": writers[split].total_tokens for split in SPLITS}
    summary["documents"] = sum(writer.documents for writer in writers.values())
    summary["unigram_entropy"] = entropy
    summary["bytes_per_token"] = size / total
    summary["bad_rows"] = bad.total
    return summary | {f"tokens_train_{domain}": count for domain, count in sorted(tokens["train"].items())}


def _write(
    recipe: DataRecipe,
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    tokens: dict[str, Counter[str]],
    bad: BadRows,
) -> int:
    """Encode every document into its split; returns the UTF-8 bytes encoded."""
    template = ChatTemplate(tokenizer)
    size = 0
    with console.progress("data", size_hint(recipe.sources), "byte") as progress:
        found = documents(recipe.sources, recipe.seed, bad=bad)
        for chunk in _chunks(found):
            prepared = [
                (split, document, _parts(document, split, recipe))
                for document in chunk
                if (split := split_of(document, recipe.validation_fraction)) == "train" or document.copy == 0
            ]
            texts = [part.text for _, _, parts in prepared for part in parts]
            encoded = iter(tokenizer.encode_plain_batch(texts))
            for split, document, parts in prepared:
                ids = _talk_tokens(document.conversation, template) if document.conversation else []
                for part in parts:
                    if part.sentinel is not None:
                        ids.append(tokenizer.id(part.sentinel))
                    ids += next(encoded)
                ids.append(tokenizer.pad_id)
                writers[split].add(ids)
                tokens[split][document.domain] += len(ids)
            done = sum(len(document.text.encode("utf-8", "replace")) for _, document, _ in prepared)
            size += done
            progress.advance(done)
    return size


def _chunks(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about `_CHUNK_CHARS` characters: enough to keep the cores busy, little memory."""
    chunk: list[Document] = []
    size = 0
    for document in found:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def split_of(document: Document, validation_fraction: float) -> str:
    """Which split a document is in, by its text alone: neither order, seed nor source matters."""
    draw = int.from_bytes(_hash(b"validation:", document)[:8], "big") / 2.0**64
    return "validation" if draw < validation_fraction else "train"


def _hash(purpose: bytes, document: Document) -> bytes:
    return hashlib.sha256(purpose + document.digest).digest()


def _talk_tokens(talk: Conversation, template: ChatTemplate) -> list[int]:
    """A conversation's tokens; mid-training learns all of them, as it learns any text."""
    return template.encode_training(
        talk.messages, talk.tools, enable_thinking=talk.enable_thinking, loss_on="all_turns"
    ).tokens


def _parts(document: Document, split: str, recipe: DataRecipe) -> list[fim.Part]:
    """The document's text as it is to be encoded; nothing for a conversation, which the template encodes."""
    if document.conversation is not None:
        return []
    if not document.is_code or split != "train":
        return [fim.Part(None, document.text)]
    purpose = f"fim:{recipe.seed}:{document.copy}:".encode()
    return fim.rearrange(document.text, recipe.fim, random.Random(_hash(purpose, document)))


def _require_both(writers: dict[str, ShardWriter], fraction: float) -> None:
    count = sum(writer.documents for writer in writers.values())
    for split, writer in writers.items():
        if writer.documents == 0:
            raise DataError(
                f"the {split} split is empty: {count} documents, validation_fraction {fraction}",
                hint="add documents or change validation_fraction" if count else "the sources hold no text",
            )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats a token of the distribution that `counts` [vocab] of ids describe.

    It is the loss of the best model that ignores context, so how far a model's loss is below it is what the model
    learnt from context.
    """
    total = counts.sum()
    assert total > 0, "entropy of nothing"
    p = counts[counts > 0] / total
    return float(-(p * np.log(p)).sum())
