"""Laws of data preparation: splits are disjoint and stable, every token is text, sentinel or an end, counts add up."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glmctl.data.encode import split_of
from glmctl.data.prepare import run, unigram_entropy
from glmctl.data.shards import TokenShards
from glmctl.data.sources import Document
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError
from glmctl.recipe.schema import ConversationsSource, DataRecipe, FillInTheMiddle, JsonLinesSource, SourceTree
from glmctl.run import atomic


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_tokenizer.save(folder / "tokenizer")
    rows = [{"text": f"The answer to {i} <|user|> is {i * 7}.\n" * 3} for i in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(30):
        (folder / "code").mkdir(exist_ok=True)
        (folder / "code" / f"m{i}.py").write_text(f"def f{i}(a):\n    return a + {i}\n" * 4)
    talk = {"messages": [{"role": "user", "content": "1<|user|>"}, {"role": "assistant", "content": "2"}]}
    (folder / "talk.jsonl").write_text((json.dumps(talk) + "\n") * 2)
    return folder


def prepare(home: Path, out: Path, **fields: Any) -> dict[str, Any]:
    sources = fields.pop(
        "sources",
        [
            JsonLinesSource(domain="prose", paths=[str(home / "rows.jsonl")], weight=2),
            SourceTree(domain="code", root=str(home / "code")),
            ConversationsSource(domain="chat", paths=[str(home / "talk.jsonl")]),
        ],
    )
    recipe = DataRecipe(
        name="d", tokenizer=str(home / "tokenizer"), sources=sources, **{"validation_fraction": 0.1, **fields}
    )
    return run(recipe, SimpleNamespace(export=out / "export"))  # type: ignore[arg-type]


def split_texts(out: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    shards = TokenShards.open(out, split)
    bounds = [*shards.document_starts.tolist(), shards.total_tokens]
    return [tokenizer.decode(shards.tokens(a, b - a).tolist()) for a, b in pairwise(bounds)]


def test_every_document_ends_once_and_the_splits_share_none(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    summary = prepare(home, tmp_path)
    atomic.verify(tmp_path / "export")
    train, held = (split_texts(tmp_path, split, tiny_tokenizer) for split in ("train", "validation"))
    assert not set(train) & set(held)
    assert len(held) == len(set(held))
    assert all(text.endswith("<|endoftext|>") and text.count("<|endoftext|>") == 1 for text in train + held)
    assert len({text for text in train + held if text.startswith("The answer")}) == 300
    assert sum(text.startswith("The answer") for text in train) == 2 * len(
        {text for text in train if text.startswith("The answer")}
    )
    assert summary["documents"] == len(train) + len(held)
    parts = sum(value for key, value in summary.items() if key.startswith("tokens_train_"))
    assert parts == summary["tokens_train"] == TokenShards.open(tmp_path).total_tokens


def test_special_strings_in_text_stay_text_and_a_conversations_are_special(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    prepare(home, tmp_path, validation_fraction=0.2)
    user = tiny_tokenizer.id("<|user|>")
    found = []
    for split in ("train", "validation"):
        shards = TokenShards.open(tmp_path, split)
        found += (shards.tokens(0, shards.total_tokens) == user).nonzero()[0].tolist()
        tokens = shards.tokens(0, shards.total_tokens).tolist()
        if user in tokens:
            assert tiny_tokenizer.decode(tokens).count("[gMASK]<sop><|user|>\n1<|user|><|assistant|>") >= 1
    # the conversation's user turn, and the one that closes the assistant's; once or twice by the split
    assert len(found) in (2, 4)


def test_fill_in_the_middle_is_for_code_in_training_only(home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    prepare(home, tmp_path, fim=FillInTheMiddle(rate=1.0))
    prefix = tiny_tokenizer.id("<|code_prefix|>")
    train, held = TokenShards.open(tmp_path, "train"), TokenShards.open(tmp_path, "validation")
    code = [text for text in split_texts(tmp_path, "train", tiny_tokenizer) if "<|code_" in text]
    held_back = sum(text.count("def f") for text in split_texts(tmp_path, "validation", tiny_tokenizer)) // 4
    assert int((train.tokens(0, train.total_tokens) == prefix).sum()) == 30 - held_back > 15
    assert not any("The answer" in text for text in code)
    assert not (held.tokens(0, held.total_tokens) == prefix).any()


def test_preparing_twice_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    one, two = prepare(home, tmp_path / "1"), prepare(home, tmp_path / "2")
    assert one == two
    for name in ("train/tokens-00000.bin", "validation/documents.npy", "manifest.json"):
        assert (tmp_path / "1/export" / name).read_bytes() == (tmp_path / "2/export" / name).read_bytes()


def test_the_split_goes_by_text_alone() -> None:
    def document(i: int, **fields: Any) -> Document:
        return Document(f"text {i}", fields.get("domain", "a"), fields.get("path", "p"), copy=fields.get("copy", 0))

    splits = [split_of(document(i), 0.2) for i in range(1000)]
    # three standard deviations of a binomial
    assert abs(splits.count("validation") / 1000 - 0.2) < 3 * (0.16 / 1000) ** 0.5
    assert splits == [split_of(document(i, domain="b", path="q", copy=3), 0.2) for i in range(1000)]


def test_unigram_entropy_by_hand() -> None:
    assert unigram_entropy(np.array([2, 1, 1, 0])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(np.array([0, 9])) == 0.0


def test_an_empty_split_is_an_error_and_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(DataError, match="validation split is empty: 1 documents"):
        prepare(home, tmp_path, sources=[JsonLinesSource(domain="d", paths=[str(tmp_path / "one.jsonl")])])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl"]
