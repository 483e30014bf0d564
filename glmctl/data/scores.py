"""Scores in [0, 1] from counts of words and signs: teachers of classifiers, and usable alone.

They are cheap and explainable, and no match for a model that has read the text: a `taught` scorer with an LLM as its
teacher is the way of the GLM-4.5 report (spec section 2, Data).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

_STOP_WORDS = frozenset(
    [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "for",
        "it",
        "was",
        "with",
        "as",
        "be",
        "by",
        "on",
        "are",
        "this",
        "have",
        "from",
        "not",
        "at",
        "which",
        "or",
        "an",
        "but",
        "were",
        "has",
        "had",
        "的",
        "了",
        "是",
        "在",
        "和",
        "有",
        "不",
        "这",
        "为",
        "以",
    ]
)
_EXPLAINS = frozenset(
    [
        "because",
        "therefore",
        "thus",
        "hence",
        "example",
        "means",
        "defined",
        "definition",
        "called",
        "consider",
        "suppose",
        "explains",
        "explain",
        "described",
        "theory",
        "principle",
        "method",
        "result",
        "results",
        "experiment",
        "observed",
        "evidence",
        "cause",
        "causes",
        "effect",
        "effects",
        "process",
        "structure",
        "function",
        "property",
        "properties",
        "concept",
        "history",
        "century",
        "developed",
        "known",
        "studied",
        "research",
        "因为",
        "所以",
        "例如",
        "定义",
        "方法",
        "原理",
        "研究",
        "结果",
    ]
)
_SELLS = frozenset(
    [
        "click",
        "buy",
        "cart",
        "sale",
        "price",
        "shipping",
        "subscribe",
        "login",
        "password",
        "cookie",
        "cookies",
        "newsletter",
        "signup",
        "discount",
        "deal",
        "deals",
        "checkout",
        "coupon",
        "advertisement",
        "sponsored",
        "follow",
        "share",
        "tweet",
        "facebook",
        "instagram",
        "affiliate",
        "casino",
        "购买",
        "点击",
        "登录",
        "优惠",
        "广告",
    ]
)
_MATHEMATICS = frozenset(
    [
        "theorem",
        "proof",
        "lemma",
        "equation",
        "equations",
        "integral",
        "derivative",
        "matrix",
        "matrices",
        "vector",
        "polynomial",
        "algebra",
        "calculus",
        "probability",
        "function",
        "functions",
        "continuous",
        "finite",
        "infinite",
        "prime",
        "integer",
        "integers",
        "topology",
        "geometry",
        "variable",
        "physics",
        "chemistry",
        "biology",
        "molecule",
        "atom",
        "energy",
        "momentum",
        "velocity",
        "electron",
        "protein",
        "reaction",
        "hypothesis",
        "定理",
        "证明",
        "方程",
        "函数",
        "积分",
        "矩阵",
        "概率",
        "物理",
        "化学",
        "能量",
    ]
)
_FORMULA = re.compile(r"\\[a-zA-Z]{2,}|\$[^$\n]{1,200}\$|[=<>≤≥∑∫√π∞∈∀∃±×÷^]|\b\d+(?:\.\d+)?\s*[+\-*/=]\s*\d")
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", '."', ".)")
_DOCUMENTED = re.compile(r'"""|\'\'\'|/\*\*|^\s*(?:#|//|--|\*) \w', re.MULTILINE)
_DEFINES = re.compile(
    r"^\s*(?:async def|def|class|func|fn|pub fn|public|private|static|function|struct|impl|interface)\b", re.MULTILINE
)
_TYPED = {
    "python": re.compile(r"def \w+\([^)]*:[^)]*\)|\) *->"),
    "typescript": re.compile(r"\w+\??: *\w+"),
    "javascript": re.compile(r"@param|const |let "),
}


def _rising(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high`, linear between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _density(text: str, words: Sequence[str], wanted: frozenset[str]) -> float:
    """Share of words that are wanted. Chinese ones come as single characters, so pairs of them are looked up too."""
    found = sum(map(wanted.__contains__, words))
    if not text.isascii():
        found += sum(one + two in wanted for one, two in pairwise(words))
    return found / max(1, len(words))


def web(text: str, words: Sequence[str], language: str) -> float:
    """How much a page reads like written prose: stop words, whole sentences, variety, little selling and noise."""
    if not words:
        return 0.0
    lines = [line for line in text.splitlines() if line.strip()]
    ended = sum(len(line) for line in lines if line.rstrip().endswith(_SENTENCE_ENDS)) / sum(map(len, lines))
    letters = sum(map(str.isalpha, text[:20_000])) / len(text[:20_000])
    head = words[:1000]
    variety = len(set(head)) / len(head) ** 0.9
    parts = (
        _rising(_density(text, head, _STOP_WORDS), 0.05, 0.3),
        _rising(ended, 0.2, 0.9),
        _rising(letters, 0.55, 0.78),
        _rising(variety, 0.15, 0.7),
        _rising(math.log10(len(words)), 1.5, 2.7),
    )
    return sum(parts) / len(parts) * (1.0 - 0.7 * _rising(_density(text, words, _SELLS), 0.0, 0.05))


def educational(text: str, words: Sequence[str], language: str) -> float:
    """How much of a page explains something, by the words that explanations and shop pages use."""
    if not words:
        return 0.0
    explains, sells = _density(text, words, _EXPLAINS), _density(text, words, _SELLS)
    return _rising(explains, 0.0, 0.03) * (1.0 - _rising(sells, 0.0, 0.03)) * _rising(len(words), 20, 100)


def mathematics(text: str, words: Sequence[str], language: str) -> float:
    """How much of a page is mathematics or science: formulas and the words around them."""
    if not words:
        return 0.0
    formulas = len(_FORMULA.findall(text)) / len(words)
    return max(_rising(_density(text, words, _MATHEMATICS), 0.0, 0.05), 0.9 * _rising(formulas, 0.0, 0.15))


def code(text: str, words: Sequence[str], language: str) -> float:
    """How well a source file is written: documented, in named pieces, in lines one can read, typed where one can."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return 0.0
    documented = len(_DOCUMENTED.findall(text)) / len(lines)
    pieces = len(_DEFINES.findall(text)) / len(lines)
    readable = sum(len(line) <= 100 for line in lines) / len(lines)
    variety = len(set(lines)) / len(lines)
    names = [word for word in words[:2000] if word.isalpha()]
    named = sum(map(len, names)) / max(1, len(names))
    parts = [
        _rising(documented, 0.0, 0.1),
        _rising(pieces, 0.0, 0.04),
        _rising(readable, 0.7, 1.0),
        _rising(variety, 0.5, 0.9),
        _rising(named, 2.0, 5.0),
        _rising(len(lines), 3, 30),
    ]
    typed = _TYPED.get(language)
    if typed is not None:
        parts.append(_rising(len(typed.findall(text)) / len(lines), 0.0, 0.03))
    return sum(parts) / len(parts)


def length(text: str, words: Sequence[str], language: str) -> float:
    """Characters; the one score that is no share."""
    return float(len(text))


_TELLING = frozenset(["the", "and", "that", "with", "this", "are", "from", "which", "的", "了", "这"])
"""stop words that no other widely written language has (Dutch has `of`, `is` and `in` too)"""
_OWN_WORDS = {"web": _TELLING, "educational": _TELLING | _EXPLAINS, "math": _TELLING | _MATHEMATICS}
_MIN_OWN = 0.02
"""share of a text's words; English and Chinese have several times as many"""


def reads(what: str, text: str, words: Sequence[str]) -> bool:
    """Whether a text is in a language of which the heuristic `what` has words; those without words read all."""
    if what not in _OWN_WORDS or not words or _density(text, words, _OWN_WORDS[what]) >= _MIN_OWN:
        return True
    return what == "math" and _FORMULA.search(text) is not None


HEURISTICS: dict[str, Callable[[str, Sequence[str], str], float]] = {
    "web": web,
    "educational": educational,
    "math": mathematics,
    "code": code,
    "length": length,
}
"""name in a recipe -> score(text, its words, its language)"""
