"""Laws of deduplication: the first stays, nothing unlike is dropped, what MinHash leaves SemDedup removes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data import duplicates, semantic
from glmctl.data.words import hashes, ngrams, words

WORDS = [f"w{i}" for i in range(5000)]


def digests(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**63, (count, 2)).astype(np.uint64)


def near(texts: list[str], similarity: float = 0.8, permutations: int = 128) -> list[int]:
    bands, rows = duplicates.band_shape(permutations, similarity)
    found = duplicates.signatures(hashes([words(text) for text in texts]), digests(len(texts)), 5, permutations)
    keys = duplicates.band_keys(found, bands, rows)
    asked = np.ones(len(texts), bool)
    return duplicates.near(lambda band: keys[:, band], bands, lambda i: found[i], asked, similarity).tolist()


def jaccard(one: str, two: str) -> float:
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (one.split(), two.split()))
    return len(a & b) / len(a | b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40), st.data())
def test_exact_points_to_the_first_equal_document_that_is_asked_for(pairs: list[tuple[int, int]], data: object) -> None:
    asked = data.draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))  # type: ignore[attr-defined]
    found = duplicates.exact(np.array(pairs, np.uint64).reshape(-1, 2), np.array(asked, bool)).tolist()
    for at, pair in enumerate(pairs):
        equal = [i for i, other in enumerate(pairs) if other == pair and asked[i]]
        assert found[at] == (-1 if not asked[at] or equal[0] == at else equal[0])


@pytest.mark.parametrize("similarity", [0.6, 0.8, 0.9])
def test_bands_meet_at_the_similarity_asked_for_and_no_wider_band_would(similarity: float) -> None:
    bands, rows = duplicates.band_shape(128, similarity)
    assert bands * rows <= 128
    assert 1 - (1 - similarity**rows) ** bands >= 0.99
    assert 1 - (1 - similarity ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


def test_near_duplicates_are_found_and_unlike_documents_are_not() -> None:
    rng = random.Random(1)
    texts, like = [], []
    for _ in range(60):
        base = [rng.choice(WORDS) for _ in range(300)]
        close, far = list(base), list(base)
        close[rng.randrange(300)] = "changed"  # 5 of about 296 shingles
        for _ in range(60):
            far[rng.randrange(300)] = rng.choice(WORDS)
        texts += [" ".join(base), " ".join(close), " ".join(far)]
        like += [-1, len(texts) - 3, -1]
    assert min(jaccard(texts[i], texts[i + 1]) for i in range(0, 180, 3)) > 0.95
    assert max(jaccard(texts[i], texts[i + 2]) for i in range(0, 180, 3)) < 0.6
    assert near(texts) == like


def test_signatures_estimate_jaccard() -> None:
    rng = random.Random(2)
    base = [rng.choice(WORDS) for _ in range(2000)]
    for changed in (10, 60, 200):
        other = list(base)
        for at in rng.sample(range(2000), changed):
            other[at] = "x"
        found = duplicates.signatures(hashes([base, other]), digests(2), 5, 512)
        # four standard deviations of a binomial share of 512
        assert (found[0] == found[1]).mean() == pytest.approx(jaccard(" ".join(base), " ".join(other)), abs=4 * 0.0221)


def test_documents_without_words_are_like_no_other() -> None:
    assert near(["...", "---", "a b c d e f", "a b c d e f"]) == [-1, -1, -1, 2]


def test_a_signature_depends_on_the_text_alone() -> None:
    texts = [" ".join(random.Random(i).choices(WORDS, k=50)) for i in range(20)]
    all_at_once = duplicates.signatures(hashes([words(t) for t in texts]), digests(20), 5, 64)
    for at in (0, 7, 19):
        alone = duplicates.signatures(hashes([words(texts[at])]), digests(20)[at : at + 1], 5, 64)
        assert (alone[0] == all_at_once[at]).all()


def test_words_are_lower_case_without_punctuation_and_characters_where_there_are_no_spaces() -> None:
    assert words("Don't STOP, (now)!") == ["don", "t", "stop", "now"]
    assert words("我爱 Python。") == ["我", "爱", "python"]
    assert len(ngrams(np.arange(3, dtype=np.uint64), 5)) == 1


# ------------------------------------------------------------------ SemDedup


def template_pages(count: int, seed: int) -> list[str]:
    """Pages of one generator: the same sentences around slots so dense that five words rarely repeat."""
    rng = random.Random(seed)

    def slot() -> str:
        return "".join(rng.choices("abcdefghijklmnop", k=7))

    return [
        f"best {slot()} plumbers near {slot()} county call {slot()} today for {slot()} repairs "
        f"our {slot()} team serves {slot()} and {slot()} homes since {slot()} with {slot()} prices "
        f"read {slot()} reviews from {slot()} customers in {slot()} and book {slot()} online now {slot()}"
        for _ in range(count)
    ]


def other_pages(count: int) -> list[str]:
    """Pages about different things: each draws most of its words from a subject of its own."""
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS[at * 40 : at * 40 + 40] + WORDS[-40:], k=60)) for at in range(count)]


def semantic_near(texts: list[str], similarity: float = 0.95, cluster_size: int = 1000) -> dict[int, int]:
    found = hashes([words(text) for text in texts])
    projection = semantic.fit(found, 64, seed=0)
    rows = np.stack([projection.embed(one) for one in found])
    return semantic.near(lambda index: rows[index], np.arange(len(texts)), similarity, cluster_size, seed=0)


@pytest.mark.parametrize("cluster_size", [1000, 30])
def test_semdedup_removes_the_template_pages_that_minhash_leaves(cluster_size: int) -> None:
    templates, others = template_pages(60, seed=0), other_pages(60)
    texts = [text for pair in zip(others, templates, strict=True) for text in pair]
    assert set(near(texts, similarity=0.5)) == {-1}
    found = semantic_near(texts, cluster_size=cluster_size)
    # one page of the template stays, every page about something of its own does
    assert set(found) == set(range(3, 120, 2))
    assert set(found.values()) == {1}


def test_semdedup_keeps_what_the_dropped_are_like() -> None:
    found = semantic_near(template_pages(40, 1) + other_pages(40) + template_pages(40, 1))
    assert not set(found) & set(found.values())
    assert all(later > first for later, first in found.items())


def test_documents_without_known_words_are_never_semantic_duplicates() -> None:
    texts = [*other_pages(20), "", "", "unseen1", "unseen2"]
    assert not set(semantic_near(texts)) & {20, 21, 22, 23}
