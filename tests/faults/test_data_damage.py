"""Damaged, truncated and hostile inputs: a DataError that names the file, never a crash, a hang or silence."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from glmctl.data import reading
from glmctl.data.batches import PretrainBatches
from glmctl.data.conversations import read_conversations
from glmctl.data.reading import BadRows
from glmctl.data.shards import ShardWriter, TokenShards
from glmctl.data.sources import documents
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import JsonLinesSource, ParquetSource, TextSource

# ------------------------------------------------------------------ shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    with ShardWriter(folder, vocab_size=300, tokenizer_hash="h", end_of_document=0, shard_tokens=16) as writer:
        for length in (10, 3, 20):
            writer.add([*range(1, length), 0])
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / "shards.json").read_text())
        change(index)
        (folder / "shards.json").write_text(json.dumps(index))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "token file cut short": (lambda f: truncate(f / "tokens-00001.bin"), "tokens-00001.bin"),
    "token file grown": (lambda f: (f / "tokens-00000.bin").open("ab").write(b"xx"), "tokens-00000.bin"),
    "token file gone": (lambda f: (f / "tokens-00002.bin").unlink(), "tokens-00002.bin"),
    "index cut short": (lambda f: truncate(f / "shards.json"), "shards.json"),
    "index not an object": (lambda f: (f / "shards.json").write_text("[]"), "shards.json"),
    "index of another format": (edit_index(lambda i: i.update(format=2)), "shards.json"),
    "index with a strange type": (edit_index(lambda i: i.update(dtype="O")), "shards.json"),
    "index that names a path": (edit_index(lambda i: i["files"][0].update(name="../../etc/passwd")), "shards.json"),
    "index with a wrong total": (edit_index(lambda i: i.update(total_tokens=5)), "shards.json"),
    "index with a negative count": (edit_index(lambda i: i["files"][0].update(tokens=-1)), "shards.json"),
    "index without a key": (edit_index(lambda i: i.pop("documents")), "shards.json"),
    "index gone": (lambda f: (f / "shards.json").unlink(), "shards.json"),
    "bounds cut short": (lambda f: truncate(f / "documents.npy"), "documents.npy"),
    "bounds gone": (lambda f: (f / "documents.npy").unlink(), "documents.npy"),
    "bounds not an array": (lambda f: (f / "documents.npy").write_bytes(b"hello"), "documents.npy"),
    "bounds that go back": (lambda f: np.save(f / "documents.npy", np.array([0, 13, 10, 33])), "documents.npy"),
    "bounds of objects": (
        lambda f: np.save(f / "documents.npy", np.array([{}], dtype=object), allow_pickle=True),
        "documents.npy",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_name_the_file(shards: Path, kind: str) -> None:
    assert TokenShards.open(shards).total_tokens == 33
    damage, name = DAMAGE[kind]
    damage(shards)
    with pytest.raises(DataError, match=name):
        TokenShards.open(shards)


def test_a_token_outside_the_vocabulary_is_found_when_read(shards: Path) -> None:
    data = bytearray((shards / "tokens-00001.bin").read_bytes())
    data[4:6] = (300).to_bytes(2, "little")
    (shards / "tokens-00001.bin").write_bytes(bytes(data))
    batches = PretrainBatches(TokenShards.open(shards), 8)
    with pytest.raises(DataError, match=r"tokens-00001\.bin: token id 300 in a vocabulary of 300"):
        batches.batch(0, batches.sequences_per_epoch)


# ------------------------------------------------------------------ text files


def found(path: Path, kind: type = JsonLinesSource, bad: BadRows | None = None) -> list[str]:
    return [document.text for document in documents([kind(domain="d", paths=[str(path)])], 0, bad=bad)]


GOOD = b'{"text": "fine"}\n'
BAD_LINES: dict[str, bytes] = {
    "not UTF-8": b'{"text": "\xff\xfe"}\n',
    "holds NUL": b'{"text": "a\x00b"}\n',
    "holds NUL escaped": b'{"text": "a\\u0000b"}\n',
    "not JSON": b'{"text": "open\n',
    "not JSON nested": b"[" * 200_000 + b"\n",
    "not an object": b"null\n",
    "no field 'text'": b"{}\n",
    "'text' is not text": b'{"text": ["x"]}\n',
    "empty": b'{"text": ""}\n',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_each_kind_of_bad_row_is_counted_and_the_rest_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 2 + BAD_LINES[kind] + GOOD)
    bad = BadRows(limit=0.25)
    assert found(path, bad=bad) == ["fine"] * 3
    (counted,) = bad.kinds
    assert kind.startswith(counted)
    assert bad.places[counted] == [f"{path}:3"]
    with pytest.raises(DataError, match=r"1 of 4 rows are unreadable.*rows\.jsonl:3"):
        found(path, bad=BadRows(limit=0.2))


def test_a_row_without_end_is_skipped_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"x" * 5000 + b'"}\n' + GOOD)
    bad = BadRows(limit=0.5)
    assert found(path, bad=bad) == ["fine"] * 2
    assert bad.kinds == {"too long": 1}


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_truncated_gzip_names_the_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(500)))[:-cut])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: truncated or damaged"):
        found(path)


def test_a_damaged_gzip_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    data = bytearray(gzip.compress(b"".join(b'{"text": "row %d"}\n' % (i * i) for i in range(500))))
    for at in range(len(data) // 2, len(data) // 2 + 20):
        data[at] ^= 0x5A
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz"):
        found(path)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz"):
        found(path)


def test_a_gzip_bomb_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(20):
            stream.write(b" " * 999_999 + b"\n")
    with pytest.raises(DataError, match="unpacks to more than 200 times"):
        found(path)


def test_files_that_are_no_text_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt").write_text("fine")
    bad = BadRows(limit=0.5)
    assert found(tmp_path, TextSource, bad) == ["fine"]
    assert bad.places == {"not UTF-8": [str(tmp_path / "a.txt")]}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_packed_file_without_a_byte_is_an_error_and_one_of_nothing_is_not(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    with pytest.raises(DataError, match=rf"{name}: empty"):
        found(path)
    path.write_bytes(gzip.compress(b"") if path.suffix == ".gz" else zstandard.compress(b""))
    assert found(path) == []


def test_a_zst_that_needs_a_long_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    # magic number, no flags, a window of 2 GB (2**(10 + 21)), and one last raw block: what --long=31 begins with
    head = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3])
    path.write_bytes(head + (1 | len(GOOD) << 3).to_bytes(3, "little") + GOOD)
    assert found(path) == ["fine"]


# ------------------------------------------------------------------ Parquet


def unchecked(values: list[bytes | None]) -> pa.Array:
    """A column of text whose bytes nobody has looked at."""
    return pa.array(values, pa.binary()).view(pa.string())


def parquet(path: Path, *, bad: BadRows | None = None, **fields: Any) -> list[str]:
    source = ParquetSource(domain="d", paths=[str(path)], **fields)
    return [document.text for document in documents([source], 0, bad=bad)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_each_kind_of_bad_cell_is_a_bad_row_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    cells = [b"fine", b"\xff\xfe", b"a\0b", b"x" * 1001, None, b"", "ü".encode()]
    text = pa.array(cells, pa.binary())
    text = text.cast(pa.large_binary()).view(kind) if kind == pa.large_string() else text.view(pa.string())
    if pa.types.is_dictionary(kind):
        places = pa.array([at if cell is not None else None for at, cell in enumerate(cells)], pa.int32())
        text = pa.DictionaryArray.from_arrays(places, text.fill_null(""))
    languages = unchecked([b"c"] * 6 + [None])
    pq.write_table(pa.table({"text": text, "lang": languages}), tmp_path / "r.parquet")
    bad = BadRows(limit=1.0)
    assert parquet(tmp_path / "r.parquet", bad=bad, language_field="lang") == ["fine", "ü"]
    path = tmp_path / "r.parquet"
    assert bad.places == {
        "not UTF-8": [f"{path}:2"],
        "holds NUL": [f"{path}:3"],
        "too long": [f"{path}:4"],
        "'text' is not text": [f"{path}:5"],
        "empty": [f"{path}:6"],
    }
    broken = unchecked([b"c", b"\xff", b"c"])
    pq.write_table(pa.table({"text": ["one", "two", "three"], "lang": broken}), path)
    assert parquet(path, bad=BadRows(limit=1.0), language_field="lang") == ["one", "three"]
    with pytest.raises(DataError, match=r"1 of 3 rows are unreadable: 1 x not UTF-8 \(first: .*r\.parquet:2\)"):
        parquet(path, language_field="lang")


@pytest.mark.parametrize("stored", [False, True])
def test_a_dictionary_of_one_huge_text_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    path = tmp_path / "r.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["a" * (1 << 20)]))
    limits = {"dictionary_pagesize_limit": 1 << 25, "compression": "zstd", "store_schema": stored}
    pq.write_table(pa.table({"text": texts}), path, **limits)
    assert path.stat().st_size < 2000
    with pytest.raises(DataError, match=r"r\.parquet: unpacks to more than 200 times its size"):
        parquet(path)
    with pytest.raises(DataError, match=r"r\.parquet: unpacks to more than 200 times its size"):
        list(reading.parquet_rows(path))
    # however much may come out in all, little of it is in memory at once
    monkeypatch.setattr(reading, "MAX_EXPANSION", 10**9)
    monkeypatch.setattr(reading, "MAX_BATCH_BYTES", 4 << 20)
    sizes = []
    inner = reading._batches

    def seen(*arguments: Any) -> Any:
        for batch in inner(*arguments):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(reading, "_batches", seen)
    assert len(parquet(path)) == 200  # each in two parts
    assert max(sizes) < 5 << 20
    monkeypatch.setattr(reading, "MAX_BATCH_BYTES", 1 << 19)
    with pytest.raises(DataError, match="unpacks to more"):
        parquet(path)


def test_a_page_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    text = ["b" * (9 << 20)]
    pq.write_table(pa.table({"text": text}), path, compression="zstd", use_dictionary=False, write_statistics=False)
    with pytest.raises(DataError, match="unpacks to more"):
        parquet(path)


def test_any_damage_to_a_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    texts = [f"text number {i}" for i in range(50)]
    pq.write_table(pa.table({"text": texts, "more": [[text] for text in texts]}), path, row_group_size=20)
    data = path.read_bytes()
    rng = random.Random(0)
    refused = []
    for at in [*range(0, 80, 2), *range(len(data) - 400, len(data), 4), *rng.sample(range(len(data)), 60)]:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        for read in (lambda: parquet(path, bad=BadRows(limit=1.0)), lambda: list(reading.parquet_rows(path))):
            try:
                read()
            except DataError as error:
                refused.append(error.message)
    assert len(refused) > 50
    assert all("r.parquet" in message for message in refused)


@pytest.mark.parametrize("kind", [pa.ArrowNotImplementedError, pa.ArrowKeyError, pa.ArrowMemoryError])
def test_whatever_arrow_says_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"text": ["fine"]}), path)

    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    for read in (lambda: parquet(path), lambda: list(reading.parquet_rows(path))):
        with pytest.raises(DataError, match=r"r\.parquet: damaged Parquet file"):
            read()


def test_metadata_that_contradicts_itself_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"text": ["fine"]}), path)
    data = path.read_bytes()
    # the schema calls floats what is texts by the statistics
    changed = data.replace(b"\x15\x0c%\x02\x18\x04text", b"\x15\x08%\x02\x18\x04text")
    assert changed != data
    path.write_bytes(changed)
    for read in (lambda: parquet(path), lambda: list(reading.parquet_rows(path))):
        with pytest.raises(DataError, match=r"r\.parquet: damaged Parquet file"):
            read()
    path.write_bytes(data.replace(b"\x18\x04text", b"\x18\x04\xf4ext"))
    with pytest.raises(DataError, match=r"r\.parquet: damaged Parquet file"):
        parquet(path)


def test_a_conversation_with_a_cell_that_is_no_text_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    answers = unchecked([b"fine", b"\xff"])
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": answers}), path)
    rows = [row for _, row in reading.parquet_rows(path)]
    assert rows[0] == {"prompt": "a", "completion": "fine"}
    assert isinstance(rows[1], DataError)
    with pytest.raises(DataError, match=r"t\.parquet:2: not UTF-8 text.*1 of 2 rows"):
        read_conversations([path])


# ------------------------------------------------------------------ tokenizers


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def raise_id(spec: dict[str, Any]) -> None:
    first = next(iter(spec["model"]["vocab"]))
    spec["model"]["vocab"][first] = 10**6


def bad_pattern(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(((((["}


def duplicate(spec: dict[str, Any]) -> None:
    spec["added_tokens"][3]["id"] = spec["added_tokens"][2]["id"]


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a special is missing": (lambda s: s["added_tokens"].pop(21), "<think>"),
    "all specials are missing": (lambda s: s["added_tokens"].clear(), "36 of GLM's special tokens"),
    "an id beyond the vocabulary": (raise_id, "token id 1000000"),
    "two tokens with one id": (duplicate, "tokenizer.json"),
    "a negative id": (lambda s: s["added_tokens"][0].update(id=-1), "token id -1"),
    "an id that is text": (lambda s: s["added_tokens"][0].update(id="7"), "token id 7"),
    "an ordinary token with a special's id": (
        lambda s: s["model"]["vocab"].update(zz=s["added_tokens"][0]["id"]),
        "zz",
    ),
    "another kind of model": (lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
    "no model": (lambda s: s.pop("model"), "model"),
    "no merges": (lambda s: s["model"].pop("merges"), "merges"),
    "merges of unknown tokens": (lambda s: s["model"]["merges"].append(["zzz", "qqq"]), "not a tokenizer"),
    "a bad pattern": (bad_pattern, "not a tokenizer"),
    "added tokens that are none": (lambda s: s.update(added_tokens=[1]), "added_tokens"),
    "an added token without content": (lambda s: s["added_tokens"][0].pop("content"), "content"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_wrong_tokenizer_is_refused_by_name(tiny_tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    tiny_tokenizer.save(tmp_path)
    change, problem = HOSTILE[kind]
    edit(tmp_path, change)
    with pytest.raises(DataError, match=problem) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '"x"', "[" * 100_000, '{"model": 5}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_huge_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate(64 * 1024 * 1024 + 1)
    with pytest.raises(DataError, match="more than a tokenizer may have"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
