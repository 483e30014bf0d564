"""Laws of stop strings and token text: cut at the first stop wherever pieces fall, lose nothing otherwise."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.tokenizer import Tokenizer
from glmctl.serving.text import StopStrings, TextStream

TEXT = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


@settings(max_examples=200, deadline=None)
@given(TEXT, STOPS, st.data())
def test_any_pieces_cut_where_the_whole_text_would_be_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        assert text.startswith(out)
        if matcher.hit:
            break
    out += matcher.finish()
    # a piece boundary can end the search early: the stop that completes first wins, then the earliest place
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert out == text
        assert not matcher.hit
    else:
        assert matcher.hit
        assert not any(stop in out for stop in stops)
        assert any(text[len(out) :].startswith(stop) for stop in stops)


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.push(piece) for piece in ("a", "bE", "N", "x", "EN", "D", "more")] == [
        "a",
        "b",
        "",
        "ENx",
        "",
        "",
        "",
    ]
    assert matcher.hit
    assert matcher.finish() == ""


def test_split_characters_and_hidden_tokens(tiny_tokenizer: Tokenizer) -> None:
    stream = TextStream(tiny_tokenizer)
    tokens = [*tiny_tokenizer.encode("ä😀"), tiny_tokenizer.id("[gMASK]"), tiny_tokenizer.id("<think>")]
    assert "".join(map(stream.push, tokens)) + stream.finish() == "ä😀<think>"
    cut = TextStream(tiny_tokenizer)
    assert "".join(map(cut.push, tiny_tokenizer.encode("😀")[:-1])) == ""
    assert cut.finish() == "\ufffd"
