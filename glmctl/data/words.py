"""Words and their hashes: what duplicates, classifiers and embeddings are computed from.

A word's 64-bit hash is rensa's, which is fast and the same in every process; `probe` tells whether another version of
it hashes differently.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "–—“”‘’„«»…·。，、！？；：（）《》「」『』", " "))
_WITHOUT_SPACES = re.compile("([\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
"""scripts that put no spaces between words: each character counts as one"""
_MIX = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each character is one in Chinese, Japanese, Thai and Lao."""
    text = text.lower()
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")
        text = _WITHOUT_SPACES.sub(r" \1 ", text)
    return text.translate(_PUNCTUATION).split()


def hashes(word_lists: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """uint64 [words] of each list."""
    from rensa import RMinHash

    return [np.array(row, np.uint64) for row in RMinHash.hash_token_sets(word_lists)]


def ngrams(hashes_W: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(1, W - n + 1)]: a hash of every `n` neighbouring words; of all words when there are fewer."""
    n = min(n, len(hashes_W))
    count = len(hashes_W) - n + 1
    mixed = np.zeros(count, np.uint64)
    for offset in range(n):
        mixed = mixed * _MIX + hashes_W[offset : offset + count]
        mixed ^= mixed >> np.uint64(29)
    return mixed


def features(hashes_W: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(column int64, count float32) of the hashed bag of words and word pairs.

    Columns rise and lie below `width`, a power of two.
    """
    assert width & (width - 1) == 0, "the width is a power of two"
    found = hashes_W if len(hashes_W) < 2 else np.concatenate([hashes_W, ngrams(hashes_W, 2)])
    # the low bits of a multiplicative hash are its weakest
    columns, counts = np.unique((found * _MIX) >> np.uint64(64 - (width.bit_length() - 1)), return_counts=True)
    return columns.astype(np.int64), counts.astype(np.float32)


def probe() -> int:
    """One number that changes when the hash does."""
    (found,) = hashes([["the", "probe", "wörter", "字"]])
    return int(ngrams(found, 4)[0])
