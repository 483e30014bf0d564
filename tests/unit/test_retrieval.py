"""Generated long documents: what their end states was stated before, and a probe asks for one fact at its depth."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from glmctl.data import retrieval
from glmctl.data.reading import BadRows
from glmctl.data.sources import documents, read
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.units import plan
from glmctl.recipe.schema import RetrievalSource

FACT = re.compile(r"Remember (\w+) (\w+)\.")


def source(**changes: object) -> RetrievalSource:
    body = {"domain": "long", "documents": 30, "characters": (400, 900), "facts": 4, "seed": 3}
    return RetrievalSource.model_validate({**body, **changes})


def test_every_fact_of_the_end_stands_once_before_it() -> None:
    for document in documents([source()], 0):
        body, recall = document.text.split(retrieval.RECALL)
        assert 1 <= len(FACT.findall(recall)) <= 4
        assert Counter(FACT.findall(body)) == Counter(FACT.findall(recall))
        assert len({name for name, _ in FACT.findall(recall)}) == len(FACT.findall(recall))
        assert "Remember" not in FACT.sub("", document.text), "nothing else could be taken for a fact"
        assert 350 <= len(document.text) <= 1200


def test_a_rehearsal_says_its_words_twice_and_no_word_tells_the_next() -> None:
    texts = [document.text for document in documents([source(documents=300, rehearsals=1.0)], 0)]
    followers: dict[str, set[str]] = {}
    for text in texts:
        first, again = text.strip().split(retrieval.AGAIN)
        assert first.split() == again.split()
        assert 350 <= len(text) <= 1000
        for word, following in pairwise(first.split()):
            followers.setdefault(word, set()).add(following)
    assert min(len(following) for following in followers.values()) > 20


def test_rehearsals_are_the_stated_share_of_the_documents() -> None:
    texts = [document.text for document in documents([source(documents=400, rehearsals=0.5)], 0)]
    share = sum(retrieval.AGAIN in text for text in texts) / len(texts)
    assert share == pytest.approx(0.5, abs=0.08)
    assert all((retrieval.AGAIN in text) != (retrieval.RECALL in text) for text in texts)


def test_facts_come_at_any_depth() -> None:
    places = [
        match.start() / document.text.index(retrieval.RECALL)
        for document in documents([source(documents=200)], 0)
        for match in FACT.finditer(document.text.split(retrieval.RECALL)[0])
    ]
    for low in (0.0, 0.25, 0.5, 0.75):
        assert sum(low <= place < low + 0.25 for place in places) > 0.1 * len(places)


def test_documents_are_the_same_however_they_are_cut_into_units() -> None:
    one = source()
    whole = [document.text for document in documents([one], 0)]
    units = plan([one], unit_bytes=2000)
    assert len(units) > 5
    assert [document.text for unit in units for document in read(unit, one, BadRows())] == whole
    assert whole != [document.text for document in documents([source(seed=4)], 0)]


def test_max_bytes_holds_for_generated_text_too() -> None:
    texts = [document.text for document in documents([source(max_bytes=3000)], 0)]
    assert sum(map(len, texts)) <= 3000
    assert 1 <= len(texts) < 30


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_probe_has_one_fact_at_its_depth_and_ends_where_it_is_asked_for(
    tiny_tokenizer: Tokenizer, depth: float
) -> None:
    tokens, answer = retrieval.probe_of_tokens(random.Random(5), tiny_tokenizer.encode_plain, 700, depth)
    assert 600 <= len(tokens) <= 700
    text = tiny_tokenizer.decode(tokens)
    (name, value) = FACT.findall(text)[0]
    assert len(FACT.findall(text)) == 1
    assert answer == f" {value}."
    assert text.endswith(f"{retrieval.RECALL} Remember {name}")
    place = text.index("Remember") / text.index(retrieval.RECALL)
    assert place == pytest.approx(depth, abs=0.15)
