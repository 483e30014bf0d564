"""Laws of the tokenizer: GLM's specials in order, lossless bytes, no injection, determinism, and files others load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data import tokenizer as module
from glmctl.data.template_source import exported_template
from glmctl.data.tokenizer import SPECIAL_TOKENS, VISIBLE_TOKENS, Tokenizer
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import TextSource, TokenizerRecipe

TEXTS = ["def add(a, b):\n    return a + b  # 12345\n", "the quick brown fox don't jump", "naïve café, 数学 42"] * 4


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=400)


def test_the_36_specials_follow_the_bpe_tokens_in_the_released_order(small: Tokenizer) -> None:
    assert len(SPECIAL_TOKENS) == 36
    first = small.vocab_size - 36
    assert [small.id(token) for token in SPECIAL_TOKENS] == list(range(first, first + 36))
    # spec 1.7: offsets of the ids that were confirmed in the released files, from 151329
    offsets = {"<|endoftext|>": 0, "[gMASK]": 2, "<sop>": 4, "<|user|>": 7, "<|observation|>": 9, "<think>": 21}
    assert {token: small.id(token) - first for token in offsets} == offsets
    assert small.eos_ids == (first, first + 7, first + 9)
    assert small.pad_id == first


def test_think_and_tool_tags_survive_skipping_specials(small: Tokenizer) -> None:
    text = "<|user|>\nhi/nothink<|assistant|>\n<think></think>\n<tool_call>f\n</tool_call>"
    assert small.decode(small.encode(text), skip_special=True) == (
        "\nhi/nothink\n<think></think>\n<tool_call>f\n</tool_call>"
    )
    assert {"<think>", "</arg_value>", "/nothink", "<tool_response>"} <= VISIBLE_TOKENS
    assert len(VISIBLE_TOKENS) == 11


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.text())
def test_every_text_comes_back_from_its_ids(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode_plain(text)) == text
    assert small.decode(small.encode(text)) == text
    assert small.decode(small.encode(text)) == small._full.decode(small.encode(text), skip_special_tokens=False)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "\n", "<", "|>", "数"]), max_size=12))
def test_plain_encoding_never_gives_a_special_id(small: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = small.encode_plain(text)
    assert all(i < small.id("<|endoftext|>") for i in ids)
    assert small.decode(ids) == text


def test_special_strings_are_recognised_only_when_asked(small: Tokenizer) -> None:
    assert small.encode("a<|user|>b")[1] == small.id("<|user|>")
    assert small.id("<|user|>") not in small.encode_plain("a<|user|>b")


def test_a_special_in_the_training_text_is_not_learnt_as_an_ordinary_token() -> None:
    trained = Tokenizer.train(["/nothink <think> /nothink"] * 50, vocab_size=320)
    assert trained.encode("/nothink") == [trained.id("/nothink")]
    assert trained.id("/nothink") not in trained.encode_plain("/nothink")


@pytest.mark.parametrize(("digits", "pieces"), [(1, 6), (3, 2)])
def test_digits_sets_the_longest_run_in_one_piece(digits: int, pieces: int) -> None:
    trained = Tokenizer.train(["123456 " * 20], vocab_size=400, digits=digits)
    assert len(trained.encode_plain("123456")) == pieces


def test_training_depends_on_the_texts_and_not_on_their_order() -> None:
    one, two = Tokenizer.train(TEXTS, 310), Tokenizer.train(reversed(TEXTS), 310)
    assert one.hash == two.hash
    assert one.hash != Tokenizer.train(TEXTS, 309).hash


def test_a_vocabulary_without_room_for_bytes_and_specials_is_refused() -> None:
    with pytest.raises(RecipeError, match="256 bytes"):
        Tokenizer.train(TEXTS, vocab_size=291)


def test_saved_and_loaded_is_the_same_tokenizer(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == small.hash
    assert again.encode("x<|user|>\n 12345 数") == small.encode("x<|user|>\n 12345 数")
    assert (tmp_path / "chat_template.jinja").read_text() == exported_template()


def test_a_run_directory_stands_for_its_export(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "export")
    assert Tokenizer.load(tmp_path).hash == small.hash


def test_streaming_holds_back_incomplete_characters(small: Tokenizer) -> None:
    ids = small.encode("a数😀b")
    stream = small.detokenizer()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == "a数😀b"
    assert all("\ufffd" not in piece for piece in pieces)
    cut = small.detokenizer()
    half = "".join(cut.push(i) for i in small.encode_plain("数")[:1])
    assert half == "" or half == "数"
    assert half + cut.flush() in ("\ufffd", "数")


def test_lone_surrogates_become_the_replacement_character(small: Tokenizer) -> None:
    assert small.decode(small.encode_plain("a\ud800b")) == "a\ufffdb"


def test_ids_without_a_token_decode_to_nothing(small: Tokenizer) -> None:
    assert small.decode([small.vocab_size + 5, *small.encode("ok")]) == "ok"


def test_a_model_smaller_than_the_tokenizer_is_refused(small: Tokenizer) -> None:
    small.require_fits(small.vocab_size)
    with pytest.raises(DataError, match="smaller than the tokenizer"):
        small.require_fits(small.vocab_size - 1)


def test_the_released_layout_loads(tmp_path: Path) -> None:
    """GLM's file: vocabulary first, merges as pairs, 36 added tokens after it, and a post-processor of its own."""
    spec = json.loads(Tokenizer.train(TEXTS, 350)._full.to_str())
    spec["model"]["merges"] = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["model"]["merges"]]
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("one two three four<|user|>")) == "one two three four<|user|>"


def test_transformers_loads_the_folder_and_gives_the_same_ids(small: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["hello 1234", "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>\n  x ", "数 ’ \n\n y"]:
        assert theirs.encode(text, add_special_tokens=False) == small.encode(text)
        assert theirs.decode(small.encode(text), skip_special_tokens=True) == small.decode(small.encode(text), True)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (small.pad_id, small.pad_id, small.vocab_size)


def test_the_stage_trains_publishes_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    recipe = TokenizerRecipe(
        name="t", sources=[TextSource(domain="x", paths=[str(tmp_path / "a.txt")])], vocab_size=330, digits=1
    )
    summary = module.run(recipe, SimpleNamespace(export=tmp_path / "run" / "export"))  # type: ignore[arg-type]
    assert Tokenizer.load(tmp_path / "run").vocab_size == summary["vocab_size"]
    assert (tmp_path / "run" / "export" / "manifest.json").is_file()
    assert summary["bytes_per_token"] > 1.5


def test_the_byte_table_is_gpt2s() -> None:
    assert set(module._BYTES) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(module._BYTES.values()) == list(range(256))
