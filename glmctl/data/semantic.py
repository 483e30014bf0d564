"""SemDedup (Abbas et al. 2023): near neighbours among document embeddings, which finds the template pages that share
too few word n-grams for MinHash (spec section 2, Data: Web).

Embedding offline: TF-IDF of words reduced by a singular value decomposition, so that what many documents share
(the template) counts and what each has alone (the names in its slots) falls away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_WORDS = 50_000
"""of the vocabulary, the commonest"""
BLOCK = 4096
"""most documents compared with each other at once: 64 MB of similarities"""
_KMEANS_SAMPLE = 20_000
_KMEANS_ROUNDS = 10
_MIN_DOCUMENTS_OF_WORD = 2


@dataclass(frozen=True)
class Projection:
    """word hashes -> [dimensions] float32 at unit length."""

    vocabulary_W: np.ndarray
    """uint64, rising: the words that count"""
    idf_W: np.ndarray
    components_WD: np.ndarray

    def embed(self, word_hashes: np.ndarray) -> np.ndarray:
        """A document's embedding; zero for one that has none of the words."""
        columns, counts = _columns(self.vocabulary_W, word_hashes)
        weights = (1.0 + np.log(counts)) * self.idf_W[columns]
        return unit(weights @ self.components_WD[columns])


def _columns(vocabulary_W: np.ndarray, word_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in the vocabulary, counts) of the document's words that are in it."""
    found, counts = np.unique(word_hashes, return_counts=True)
    places = np.searchsorted(vocabulary_W, found)
    known = places < len(vocabulary_W)
    known[known] = vocabulary_W[places[known]] == found[known]
    return places[known], counts[known]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit length; zero rows stay zero."""
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def fit(sample: Sequence[np.ndarray], dimensions: int, seed: int) -> Projection:
    """Vocabulary, inverse document frequencies and singular vectors of a sample of documents' word hashes.

    A word of one document alone is not in the vocabulary: it says nothing about what documents have in common.
    """
    from scipy.sparse import csr_matrix
    from sklearn.utils.extmath import randomized_svd

    every = np.concatenate([np.unique(found) for found in sample]) if sample else np.zeros(0, np.uint64)
    found, documents = np.unique(every, return_counts=True)
    common = documents >= _MIN_DOCUMENTS_OF_WORD
    found, documents = found[common], documents[common]
    most = np.sort(np.argsort(-documents, kind="stable")[:MAX_WORDS])
    vocabulary, documents = found[most], documents[most]
    if not len(vocabulary):
        return Projection(vocabulary, np.zeros(0, np.float32), np.zeros((0, 1), np.float32))
    idf = np.log((1 + len(sample)) / (1 + documents)) + 1.0
    rows = [_columns(vocabulary, document) for document in sample]
    columns = np.concatenate([places for places, _ in rows])
    values = (1.0 + np.log(np.concatenate([counts for _, counts in rows]))) * idf[columns]
    bounds = np.cumsum([0, *(len(places) for places, _ in rows)])
    x = csr_matrix((values, columns, bounds), shape=(len(rows), len(vocabulary)))
    lengths = np.sqrt(np.asarray(x.multiply(x).sum(axis=1))).ravel()
    x = csr_matrix(x.multiply(1.0 / np.where(lengths > 0, lengths, 1.0)[:, None]))
    rank = max(1, min(dimensions, len(rows) - 1, len(vocabulary) - 1))
    _, _, vectors = randomized_svd(x, rank, random_state=seed)
    return Projection(vocabulary, idf.astype(np.float32), np.ascontiguousarray(vectors.T, np.float32))


def near(
    embeddings: Callable[[np.ndarray], np.ndarray],
    index: np.ndarray,
    similarity: float,
    cluster_size: int,
    seed: int,
) -> dict[int, int]:
    """Documents that are near neighbours of an earlier one that stays: document -> that one.

    `embeddings(documents)` gives [n, dimensions] at unit length; `index` are the documents in question, rising.
    Only documents of one cluster (k-means, about `cluster_size` each) are compared.
    """
    clusters = _clusters(embeddings, index, max(1, len(index) // cluster_size), seed)
    found: dict[int, int] = {}
    order = np.argsort(clusters, kind="stable")
    bounds = np.searchsorted(clusters[order], np.arange(clusters.max(initial=0) + 2))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for at in range(start, stop, BLOCK):
            members = index[order[at : min(at + BLOCK, stop)]]
            found |= _near_in_block(embeddings(members), members, similarity)
    return found


def _near_in_block(rows: np.ndarray, members: np.ndarray, similarity: float) -> dict[int, int]:
    close = rows @ rows.T >= similarity
    found: dict[int, int] = {}
    gone = np.zeros(len(members), bool)
    for at in range(len(members)):
        if gone[at]:
            continue
        (later,) = np.nonzero(close[at, at + 1 :] & ~gone[at + 1 :])
        gone[at + 1 + later] = True
        found |= dict.fromkeys(members[at + 1 + later].tolist(), int(members[at]))
    return found


def _clusters(embeddings: Callable[[np.ndarray], np.ndarray], index: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 [len(index)]: the nearest of `count` spherical k-means centres, learnt on a sample."""
    if count == 1:
        return np.zeros(len(index), np.int64)
    rng = np.random.default_rng(seed)
    sample = embeddings(np.sort(rng.choice(index, min(len(index), _KMEANS_SAMPLE), replace=False)))
    centres = sample[np.sort(rng.choice(len(sample), min(count, len(sample)), replace=False))]
    for _ in range(_KMEANS_ROUNDS):
        nearest = (sample @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, sample)
        empty = np.bincount(nearest, minlength=len(centres)) == 0
        centres = np.where(empty[:, None], centres, unit(sums))
    parts = [(embeddings(index[at : at + BLOCK]) @ centres.T).argmax(axis=1) for at in range(0, len(index), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
