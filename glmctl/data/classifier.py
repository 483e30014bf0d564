"""A small text classifier: logistic regression on hashed words and word pairs, kept as plain arrays (.npz).

It is what the GLM-4.5 report calls the small classifier that imitates an LLM's scores (spec section 2, Data); fastText
is the usual choice, and this is the same model without the download: a bag of hashed n-grams and one linear layer.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmctl.data.words import features, probe
from glmctl.errors import DataError, RecipeError
from glmctl.run import atomic

WIDTH = 1 << 18
MAX_FILE_BYTES = 64 * 1024 * 1024
HELD_OUT = 5
"""one in so many of the taught documents is kept to measure agreement"""


@dataclass(frozen=True)
class Classifier:
    """p(positive) = sigmoid(weights . x + bias), x the document's features at unit length."""

    weights: np.ndarray
    """[WIDTH] float32"""
    bias: float

    def score(self, word_hashes: np.ndarray) -> float:
        """Probability that a document with these word hashes is positive; 0 for one without words."""
        if not len(word_hashes):
            return 0.0
        columns, values = _row(word_hashes)
        logit = float(np.dot(self.weights[columns], values)) + self.bias
        return float(1.0 / (1.0 + np.exp(-np.clip(logit, -60.0, 60.0))))

    def save(self, path: Path) -> None:
        """Write the classifier so that the same weights give the same bytes."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, weights=self.weights, bias=np.float64(self.bias), probe=np.uint64(probe()))
        atomic.write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """RecipeError when there is no such file; DataError when it is damaged or made with another word hash."""
        if not path.is_file():
            raise RecipeError(f"{path}: no such classifier")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: larger than a classifier can be")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                weights, bias, made_with = arrays["weights"], float(arrays["bias"]), int(arrays["probe"])
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: not a classifier, or damaged: {error}") from error
        if weights.shape != (WIDTH,) or weights.dtype != np.float32 or not np.isfinite(weights).all():
            raise DataError(f"{path}: not a classifier of {WIDTH} finite weights")
        if made_with != probe():
            raise DataError(
                f"{path}: made with a version of rensa that hashes words differently", hint="teach it again"
            )
        return cls(weights, bias)


def teach(
    word_hashes: Sequence[np.ndarray], scores: Sequence[float], positive_from: float
) -> tuple[Classifier, dict[str, Any]]:
    """Learn to tell documents that the teacher scored at least `positive_from` from the others.

    Returns the classifier and how it does on every fifth document, which it has not seen: `accuracy`, that of always
    giving the commoner answer (`baseline`), and the rank correlation with the teacher's scores (`spearman`, null if all
    are equal).
    DataError when the teacher found only one kind.
    """
    from scipy.sparse import csr_matrix
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression

    labels = np.asarray(scores) >= positive_from
    held = np.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
    for part in (labels[~held], labels[held]):
        if part.all() or not part.any():
            raise DataError(
                f"the teacher put {int(labels.sum())} of {len(labels)} documents at {positive_from:g} or more: "
                "nothing to tell apart",
                hint="change positive_from, or take a larger sample",
            )
    rows = [_row(found) for found in word_hashes]
    bounds = np.concatenate([[0], np.cumsum([len(columns) for columns, _ in rows])])
    x = csr_matrix(
        (np.concatenate([v for _, v in rows]), np.concatenate([c for c, _ in rows]), bounds), shape=(len(rows), WIDTH)
    )
    model = LogisticRegression(C=10.0, solver="liblinear", random_state=0, class_weight="balanced")
    model.fit(x[~held], labels[~held])
    classifier = Classifier(model.coef_[0].astype(np.float32), float(model.intercept_[0]))
    given = np.array([classifier.score(found) for found, out in zip(word_hashes, held, strict=True) if out])
    right = float(((given >= 0.5) == labels[held]).mean())
    share = float(labels[held].mean())
    # undefined where all are equal, which is no reason to fail
    rank = float(spearmanr(given, np.asarray(scores)[held]).statistic)
    report = {
        "taught": int((~held).sum()),
        "held_out": int(held.sum()),
        "positive": float(labels.mean()),
        "accuracy": right,
        "baseline": max(share, 1.0 - share),
        "spearman": rank if math.isfinite(rank) else None,
    }
    return classifier, report


def _row(word_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of a document's features: square roots of counts, at unit length."""
    if not len(word_hashes):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    columns, counts = features(word_hashes, WIDTH)
    values = np.sqrt(counts)
    return columns, values / np.linalg.norm(values)
