"""Token shards: flat little-endian unsigned integers on disk, memory-mapped, with a document index.

A split folder holds `tokens-00000.bin`, `tokens-00001.bin`, ... (uint16 when the vocabulary fits, else uint32),
`documents.npy` (int64 [documents + 1]: where each document starts, and the end) and `shards.json` (sizes, dtype,
vocabulary, tokenizer hash, names of domains). With domains, `domains.npy` (uint16 [documents]) tells each document's.
The folder above carries the manifest with checksums.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glmctl.errors import DataError, RecipeError
from glmctl.run import atomic

INDEX = "shards.json"
DOCUMENTS = "documents.npy"
DOMAINS = "domains.npy"
FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one split; use as a context manager. A file ends when it has `shard_tokens`, also within a document."""

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        tokenizer_hash: str,
        end_of_document: int,
        shard_tokens: int,
        domains: Sequence[str] = (),
    ) -> None:
        """`domains`: names, in the order of the numbers that documents are then added with."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._vocab_size = vocab_size
        self._hash = tokenizer_hash
        self._end = end_of_document
        self._shard_tokens = shard_tokens
        self._domains = list(domains)
        self._dtype = token_dtype(vocab_size)
        self._files: list[dict[str, Any]] = []
        self._stream: BinaryIO | None = None
        self._bounds = [np.zeros(1, np.int64)]
        self._of_domain: list[np.ndarray] = []
        self.total_tokens = 0
        self.documents = 0
        self.counts = np.zeros(vocab_size, np.int64)
        """how often each id was written"""

    def add(self, tokens: Sequence[int], domain: int | None = None) -> None:
        """Append one document, `<|endoftext|>` included by the caller."""
        self.add_many(np.asarray(tokens, np.int64), [len(tokens)], None if domain is None else np.array([domain]))

    def add_many(
        self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, domains: np.ndarray | None = None
    ) -> None:
        """Append documents of `lengths` tokens that stand one after the other in `tokens` [sum of lengths].

        `domains` [documents]: each one's number, when the writer has domains. An id outside the vocabulary, or a
        document without its end token, is our bug.
        """
        sizes = np.asarray(lengths, np.int64)
        assert sizes.sum() == len(tokens), "the lengths add up to the tokens"
        assert (domains is not None) == bool(self._domains), "documents have domains when the shards have"
        if domains is not None:
            assert len(domains) == len(sizes), "each document has one domain"
            self._of_domain.append(domains.astype("<u2"))
        if not len(sizes):
            return
        assert sizes.min() > 0, "a document has at least its end token"
        assert tokens.min() >= 0, "token ids are not negative"
        assert tokens.max() < self._vocab_size, "token ids are below the vocabulary size"
        self.counts += np.bincount(tokens, minlength=self._vocab_size)
        self._bounds.append(self.total_tokens + np.cumsum(sizes))
        self.total_tokens += len(tokens)
        self.documents += len(sizes)
        data = tokens.astype(self._dtype)
        while len(data):
            if self._stream is None:
                self._files.append({"name": f"tokens-{len(self._files):05d}.bin", "tokens": 0})
                self._stream = open(self._folder / self._files[-1]["name"], "wb")  # noqa: SIM115 - closed in _roll
            room = self._shard_tokens - self._files[-1]["tokens"]
            part, data = data[:room], data[room:]
            self._stream.write(part.tobytes())
            self._files[-1]["tokens"] += len(part)
            if self._files[-1]["tokens"] == self._shard_tokens:
                self._roll()

    def close(self) -> None:
        """Finish the last file and write the index."""
        self._roll()
        np.save(self._folder / DOCUMENTS, np.concatenate(self._bounds).astype("<i8"))
        if self._domains:
            np.save(self._folder / DOMAINS, np.concatenate([np.zeros(0, "<u2"), *self._of_domain]))
        index = {
            "format": FORMAT,
            "dtype": self._dtype.str,
            "vocab_size": self._vocab_size,
            "tokenizer_hash": self._hash,
            "end_of_document": self._end,
            "total_tokens": self.total_tokens,
            "documents": self.documents,
            "files": self._files,
        }
        if self._domains:
            index["domains"] = self._domains
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._roll()

    def _roll(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


@dataclass(frozen=True)
class _File:
    path: Path
    start: int
    tokens: np.ndarray


class TokenShards:
    """One split, memory-mapped. Make one with `TokenShards.open`."""

    def __init__(self, folder: Path, index: dict[str, Any], files: list[_File], bounds: np.ndarray) -> None:
        self.folder = folder
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_hash: str = index["tokenizer_hash"]
        self.pad_id: int = index["end_of_document"]
        self.total_tokens: int = index["total_tokens"]
        self.document_starts: np.ndarray = bounds[:-1]
        """[documents] int64: where each document begins in the flat stream"""
        self.domains: list[str] = index.get("domains", [])
        """names; empty when the shards were written without"""
        self._files = files
        self._file_starts = np.array([file.start for file in files] or [0])

    @classmethod
    def open(cls, folder: Path | str, split: str = "train") -> TokenShards:
        """Open a split folder, or `split` of a prepared data folder or run directory.

        RecipeError when nothing is there; DataError naming the file when one is missing, truncated or inconsistent.
        """
        folder = Path(folder)
        choices = [folder, folder / split, folder / "export" / split]
        home = next((choice for choice in choices if (choice / INDEX).is_file()), None)
        if home is None:
            if (folder / DOCUMENTS).is_file() or any((c / DOCUMENTS).is_file() for c in choices):
                raise DataError(f"{folder}: {INDEX} is missing")
            raise RecipeError(f"{folder}: no token shards there", hint="run `glmctl data` first, or name its run")
        index = _read_index(home / INDEX)
        dtype = np.dtype(index["dtype"])
        files, start = [], 0
        for entry in index["files"]:
            path, count = home / entry["name"], entry["tokens"]
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise DataError(f"{path}: missing")
            if size != count * dtype.itemsize:
                raise DataError(f"{path}: {size} bytes instead of {count * dtype.itemsize}: truncated or damaged")
            files.append(_File(path, start, np.memmap(path, dtype, "r")))
            start += count
        if start != index["total_tokens"]:
            raise DataError(f"{home / INDEX}: total_tokens is {index['total_tokens']}, its files hold {start}")
        return cls(home, index, files, _read_bounds(home / DOCUMENTS, index))

    def verify(self) -> None:
        """Read every byte and compare it with the manifest of the folder that the split was published in.

        DataError naming the first file that differs. Shards without a manifest (made by hand) are taken as they are.
        """
        home = next((f for f in (self.folder, self.folder.parent) if (f / atomic.MANIFEST).is_file()), None)
        if home is not None:
            below = [name for name in atomic.read_manifest(home) if self.folder in (home / name).parents]
            atomic.verify(home, only=below)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """[count] ids of the flat stream from `start`. DataError when an id is outside the vocabulary."""
        assert 0 <= start <= start + count <= self.total_tokens, "the range lies within the stream"
        parts = []
        place = int(np.searchsorted(self._file_starts, start, side="right")) - 1
        while count > 0:
            file = self._files[place]
            part = np.asarray(file.tokens[start - file.start : start - file.start + count])
            if part.max() >= self.vocab_size:
                raise DataError(f"{file.path}: token id {part.max()} in a vocabulary of {self.vocab_size}")
            parts.append(part)
            start, count, place = start + len(part), count - len(part), place + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def of_domain(self, name: str) -> DomainTokens:
        """The documents of one domain as a stream of their own. DataError when the list of domains is damaged."""
        path = self.folder / DOMAINS
        found = _load_array(path)
        if found.shape != self.document_starts.shape or found.dtype != np.uint16:
            raise DataError(f"{path}: expected the domains of {len(self.document_starts)} documents")
        return DomainTokens(self, np.nonzero(found == self.domains.index(name))[0])

    def require_tokenizer(self, tokenizer_hash: str) -> None:
        """DataError unless these shards were made by the tokenizer of that hash."""
        if tokenizer_hash != self.tokenizer_hash:
            raise DataError(
                f"{self.folder}: made with another tokenizer ({self.tokenizer_hash[:12]}, not {tokenizer_hash[:12]})",
                hint="prepare the data again with this tokenizer",
            )


class DomainTokens:
    """Some documents of shards, as a flat stream in which they follow each other."""

    def __init__(self, shards: TokenShards, documents: np.ndarray) -> None:
        """`documents` [chosen] int64, rising."""
        self._shards = shards
        ends = np.append(shards.document_starts[1:], shards.total_tokens)
        self._stored = shards.document_starts[documents]
        bounds = np.concatenate([[0], np.cumsum(ends[documents] - self._stored)])
        self.document_starts: np.ndarray = bounds[:-1]
        self.total_tokens = int(bounds[-1])
        self.pad_id = shards.pad_id

    def tokens(self, start: int, count: int) -> np.ndarray:
        """[count] ids from `start`, all inside one document."""
        place = int(np.searchsorted(self.document_starts, start, side="right")) - 1
        return self._shards.tokens(int(self._stored[place]) + start - int(self.document_starts[place]), count)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: not a shard index of format {FORMAT}")
    numbers = ("vocab_size", "end_of_document", "total_tokens", "documents")
    entries = index.get("files")
    sound = (
        all(isinstance(index.get(name), int) and index[name] >= 0 for name in numbers)
        and index.get("dtype") in ("<u2", "<u4")
        and isinstance(index.get("tokenizer_hash"), str)
        and isinstance(index.get("domains", []), list)
        and all(isinstance(name, str) for name in index.get("domains", []))
        and isinstance(entries, list)
        and all(isinstance(e, dict) and isinstance(e.get("tokens"), int) and e["tokens"] > 0 for e in entries)
    )
    if not sound:
        raise DataError(f"{path}: damaged shard index")
    expected = [f"tokens-{number:05d}.bin" for number in range(len(index["files"]))]
    if [entry.get("name") for entry in index["files"]] != expected:
        raise DataError(f"{path}: unexpected file names")
    return index


def _load_array(path: Path) -> np.ndarray:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: truncated or damaged: {error}") from error
    return found


def _read_bounds(path: Path, index: dict[str, Any]) -> np.ndarray:
    bounds = _load_array(path)
    if bounds.dtype != np.int64 or bounds.shape != (index["documents"] + 1,):
        raise DataError(f"{path}: expected {index['documents'] + 1} document bounds")
    if bounds[0] != 0 or bounds[-1] != index["total_tokens"] or (np.diff(bounds) <= 0).any():
        raise DataError(f"{path}: document bounds do not match the tokens")
    return bounds
