"""Laws of token shards: what was written is what is read, wherever the files are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.shards import ShardWriter, TokenShards, token_dtype
from glmctl.errors import DataError, RecipeError
from glmctl.run import atomic


def write(folder: Path, documents: list[list[int]], *, vocab_size: int = 500, shard_tokens: int = 7) -> ShardWriter:
    writer = ShardWriter(
        folder, vocab_size=vocab_size, tokenizer_hash="abc", end_of_document=0, shard_tokens=shard_tokens
    )
    with writer:
        for document in documents:
            writer.add(document)
    return writer


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 499), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 20))
def test_every_range_reads_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = write(folder, documents, shard_tokens=shard_tokens)
    flat = [token for document in documents for token in document]
    shards = TokenShards.open(folder)
    assert shards.total_tokens == writer.total_tokens == len(flat)
    assert shards.document_starts.tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()
    for start in range(0, len(flat) + 1, 3):
        for count in (0, 1, 5, len(flat) - start):
            if start + count <= len(flat):
                assert shards.tokens(start, count).tolist() == flat[start : start + count]
    assert writer.counts.tolist() == np.bincount(flat, minlength=500).tolist()


@pytest.mark.parametrize(("vocab_size", "width"), [(500, 2), (65536, 2), (65537, 4), (151552, 4)])
def test_the_type_is_the_narrowest_that_fits_little_endian(tmp_path: Path, vocab_size: int, width: int) -> None:
    assert token_dtype(vocab_size).itemsize == width
    write(tmp_path, [[1, vocab_size - 1]], vocab_size=vocab_size)
    data = (tmp_path / "tokens-00000.bin").read_bytes()
    assert data == (1).to_bytes(width, "little") + (vocab_size - 1).to_bytes(width, "little")
    assert TokenShards.open(tmp_path).tokens(0, 2).tolist() == [1, vocab_size - 1]


def test_every_byte_is_held_against_the_manifest(tmp_path: Path) -> None:
    """A flipped bit that still names a token of the vocabulary, and a document's border that still rises."""
    with atomic.publish(tmp_path / "export") as folder:
        for split in ("train", "validation"):
            (folder / split).mkdir()
            write(folder / split, [[1, 2, 0], [4, 5, 6, 0]])
    TokenShards.open(tmp_path).verify()
    for name, place in (("tokens-00000.bin", 0), ("documents.npy", -16)):
        path = tmp_path / "export" / "train" / name
        sound = path.read_bytes()
        damaged = bytearray(sound)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        shards = TokenShards.open(tmp_path)
        assert shards.tokens(0, 7).max() < 500
        with pytest.raises(DataError, match=f"{name}: damaged"):
            shards.verify()
        TokenShards.open(tmp_path, "validation").verify()
        path.write_bytes(sound)


def test_a_run_a_data_folder_and_a_split_all_open(tmp_path: Path) -> None:
    write(tmp_path / "export" / "train", [[1, 2]])
    write(tmp_path / "export" / "validation", [[3]])
    assert TokenShards.open(tmp_path).total_tokens == 2
    assert TokenShards.open(tmp_path / "export", "validation").total_tokens == 1
    assert TokenShards.open(tmp_path / "export" / "validation").total_tokens == 1


def test_nothing_there_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no token shards"):
        TokenShards.open(tmp_path / "absent")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[1]])
    TokenShards.open(tmp_path).require_tokenizer("abc")
    with pytest.raises(DataError, match="another tokenizer"):
        TokenShards.open(tmp_path).require_tokenizer("abd")


def test_ids_outside_the_vocabulary_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write(tmp_path, [[500]])


def test_a_domains_documents_are_a_stream_of_their_own(tmp_path: Path) -> None:
    texts = [[5, 6, 0], [7, 0], [8, 9, 10, 0], [11, 0]]
    with ShardWriter(
        tmp_path,
        vocab_size=20,
        tokenizer_hash="h",
        end_of_document=0,
        shard_tokens=4,
        domains=("code", "prose", "none"),
    ) as writer:
        for tokens, domain in zip(texts, (1, 0, 1, 0), strict=True):
            writer.add(tokens, domain)
    shards = TokenShards.open(tmp_path)
    assert shards.domains == ["code", "prose", "none"]
    prose = shards.of_domain("prose")
    assert prose.total_tokens == 7
    found = [prose.tokens(int(start), size).tolist() for start, size in zip(prose.document_starts, (3, 4), strict=True)]
    assert found == [texts[0], texts[2]]
    assert shards.of_domain("none").total_tokens == 0
    (tmp_path / "domains.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"domains\.npy"):
        shards.of_domain("code")
