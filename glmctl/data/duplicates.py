"""Exact and near duplicates over a whole corpus, in memory that grows by a few tens of bytes a document.

Near duplicates: MinHash signatures (Broder 1997) by rensa, bucketed by bands (locality-sensitive hashing), every
candidate pair checked against its signatures, so that a chance collision of one band never drops a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from glmctl.data.words import ngrams

CANDIDATE_PROBABILITY = 0.99
"""of a pair at the similarity asked for to meet in some band"""
_PAIRS_AT_ONCE = 1 << 15

Rows = Callable[[np.ndarray], np.ndarray]
"""documents [n] int64 -> signatures [n, permutations] uint32"""


def exact(digests: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """int64 [documents]: the first document with the same digest, -1 where it is the document itself.

    `digests` [documents, 2] uint64; only documents where `asked` (bool) are compared.
    """
    first = np.full(len(digests), -1, np.int64)
    (index,) = np.nonzero(asked)
    order = index[np.lexsort((index, digests[index, 1], digests[index, 0]))]
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    starts = np.concatenate([[True], ~same])[: len(order)]
    leaders = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))] if len(order) else order
    first[order] = np.where(starts, -1, leaders)
    return first


def band_shape(permutations: int, similarity: float) -> tuple[int, int]:
    """(bands, rows in a band): the most rows with which a pair at `similarity` still meets in some band."""
    best = (permutations, 1)
    for rows in range(1, permutations + 1):
        bands = permutations // rows
        if 1.0 - (1.0 - similarity**rows) ** bands >= CANDIDATE_PROBABILITY:
            best = (bands, rows)
    return best


def signatures(word_hashes: Sequence[np.ndarray], digests: np.ndarray, ngram: int, permutations: int) -> np.ndarray:
    """uint32 [documents, permutations]: MinHash signatures of word n-grams.

    A document without words is like no other: its only shingle is its digest.
    """
    from rensa import RMinHash

    shingles = [ngrams(found, ngram) if len(found) else digests[at, :1] for at, found in enumerate(word_hashes)]
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in shingles])]).astype(np.uint64)
    flat = np.concatenate(shingles) if shingles else np.zeros(0, np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, bounds, permutations, 1)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(shingles), permutations)


def band_keys(signatures_NP: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [documents, bands]: documents with equal keys are candidates in that band."""
    parts = signatures_NP[:, : bands * rows].reshape(len(signatures_NP), bands, rows).astype(np.uint64)
    mixed = np.zeros(parts.shape[:2], np.uint64)
    for row in range(rows):
        mixed = (mixed ^ parts[:, :, row]) * np.uint64(0x100000001B3)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def near(
    keys_of_band: Callable[[int], np.ndarray], bands: int, rows: Rows, asked: np.ndarray, similarity: float
) -> np.ndarray:
    """int64 [documents]: the first document of the group of near duplicates that a document is in, -1 for the first.

    Groups are the connected pairs whose estimated Jaccard similarity is at least `similarity`. Inside a band's bucket
    each document is compared with the bucket's first and with the one before it, not with all.
    """
    parent = np.arange(len(asked), dtype=np.int64)
    (index,) = np.nonzero(asked)
    for band in range(bands):
        for one, two in _candidates(keys_of_band(band)[index], index):
            _join(parent, one, two, rows, similarity)
    roots = _roots(parent)
    return np.where(roots == np.arange(len(roots)), -1, roots)


def _candidates(keys: np.ndarray, index: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of pairs (earlier, later) of documents that share a key."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    (later,) = np.nonzero(same)
    starts = np.concatenate([[True], ~same])
    firsts = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))[later + 1] if len(order) else later
    for at in range(0, len(later), _PAIRS_AT_ONCE):
        here = later[at : at + _PAIRS_AT_ONCE]
        two = index[order[here + 1]]
        yield index[order[firsts[at : at + _PAIRS_AT_ONCE]]], two
        yield index[order[here]], two


def _join(parent: np.ndarray, one: np.ndarray, two: np.ndarray, rows: Rows, similarity: float) -> None:
    """Put the pairs that are alike into one group; the smaller root leads."""
    apart = np.array(
        [_root(parent, a) != _root(parent, b) for a, b in zip(one.tolist(), two.tolist(), strict=True)], bool
    )
    if not apart.any():
        return
    one, two = one[apart], two[apart]
    alike = (rows(one) == rows(two)).mean(axis=1) >= similarity
    for a, b in zip(one[alike].tolist(), two[alike].tolist(), strict=True):
        first, second = sorted((_root(parent, a), _root(parent, b)))
        parent[second] = first


def _root(parent: np.ndarray, at: int) -> int:
    while (above := int(parent[at])) != at:
        parent[at] = parent[above]
        at = above
    return at


def _roots(parent: np.ndarray) -> np.ndarray:
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return parent
