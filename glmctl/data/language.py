"""Which language a document is in: programming languages by file name, natural ones by script and common words.

No model and no download: scripts settle the languages that have one of their own; the others are told apart by how
many of their most common words occur. Meant for documents of a paragraph or more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_SUFFIXES = {
    "python": (".py", ".pyi"),
    "c": (".c", ".h"),
    "c++": (".cc", ".cpp", ".cxx", ".hpp", ".cu"),
    "java": (".java",),
    "javascript": (".js", ".mjs", ".jsx"),
    "typescript": (".ts", ".tsx"),
    "go": (".go",),
    "rust": (".rs",),
    "ruby": (".rb",),
    "php": (".php",),
    "shell": (".sh", ".bash"),
    "sql": (".sql",),
    "html": (".html", ".htm"),
    "css": (".css",),
    "markdown": (".md",),
    "rst": (".rst",),
}
_LANGUAGE_OF = {suffix: language for language, suffixes in _SUFFIXES.items() for suffix in suffixes}

_COMMON = {
    "en": "the of and to in is that for it was with as be by on are this have from not at you which or an they but",
    "de": "der die und das ist nicht ein eine zu den mit von dem sich auf für auch werden wird im es sie ich wie oder",
    "fr": "le la les et des est une dans pour que qui du pas au sur par avec il ne ce sont plus ou nous vous cette",
    "es": "el la los de que y en las un una es por con para se del no su como más al lo este pero son sus está",
    "it": "il di che la e un una per è non con sono del della si le dei gli da anche nel come più questo alla ma",
    "pt": "o a os de que e do da em um uma para com não por mais dos das no na se ao como foi são pelo mas seu",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er ook als die bij of door naar wordt maar",
    "sv": "och att det som en på är av för den med till inte har de om ett men var jag sig från kan vi så",
    "da": "og at det er en til af på den for ikke med som der de et har i var fra men om kan vi blev",
    "pl": "w i na się z do nie jest to że o jak za od po przez dla co ale są być może tak jego oraz",
    "cs": "a v se na je že s z do o i to jako za by ale jsou pro tak po které nebo být byl má",
    "fi": "ja on ei että se oli hän mutta joka ovat tai kun myös niin kuin sen voi olla mukaan ole jos",
    "tr": "ve bir bu için ile da de olarak daha çok en olan gibi kadar sonra ama var ne o her ya değil",
    "id": "yang dan di untuk dengan dari pada ini adalah dalam tidak itu akan oleh ke juga atau sebagai karena",
    "vi": "và của là có trong được cho không các một với người những đã để khi này từ cũng như đến",
    "ru": "и в не на что я с он как это по но к из у за от так же то бы для мы его при был или",
    "uk": "і в не на що з та це як до за від але у його для або був також він про які так є між",
    "bg": "и на да се в за от не е че с по са като до но това при или ще от бъде може те съм",
    "ar": "في من على أن إلى عن هذا التي مع كان هذه الذي ما لا أو كما بين ذلك قد كل",
    "fa": "و در به از که این را با است برای آن یک می تا بر خود هم شود شده بود",
}
_WORD_SETS = {language: frozenset(found.split()) for language, found in _COMMON.items()}

_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("zh", re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")),
    ("ko", re.compile("[\uac00-\ud7af]")),
    ("el", re.compile("[\u0370-\u03ff]")),
    ("he", re.compile("[\u0590-\u05ff]")),
    ("hi", re.compile("[\u0900-\u097f]")),
    ("th", re.compile("[\u0e00-\u0e7f]")),
)
_KANA_SHARE = 0.1
"""of the East Asian characters: enough to tell Japanese from Chinese"""
_SAMPLE_CHARS = 20_000
_FULL_SHARE = 0.25
"""share of common words at which a language is certain; running prose has 0.3 to 0.5"""


def programming_language(path: str) -> str:
    """The language that a file's name says, or `?`."""
    return _LANGUAGE_OF.get(PurePosixPath(path).suffix.lower(), "?")


def identify(text: str, words: Sequence[str]) -> tuple[str, float]:
    """(ISO 639-1 code or `?`, confidence in [0, 1]) of a text and its lower-case words."""
    sample = text[:_SAMPLE_CHARS]
    letters = sum(map(str.isalpha, sample))
    if not letters:
        return "?", 0.0
    if not sample.isascii():
        counts = {language: len(pattern.findall(sample)) for language, pattern in _SCRIPTS}
        east = counts["ja"] + counts["zh"]
        kana = counts["ja"]
        counts["ja"], counts["zh"] = (east, 0) if kana > _KANA_SHARE * east else (0, counts["zh"])
        language = max(counts, key=counts.__getitem__)
        if counts[language] > 0.3 * letters:
            return language, min(1.0, counts[language] / letters)
    head = words[:2000]
    if not head:
        return "?", 0.0
    shares = {language: sum(word in known for word in head) / len(head) for language, known in _WORD_SETS.items()}
    first, second = sorted(shares, key=lambda language: -shares[language])[:2]
    if shares[first] == 0.0:
        return "?", 0.0
    # how clearly the language is there, times how clearly it is not the next one
    certain = min(1.0, shares[first] / _FULL_SHARE)
    return first, certain * (1.0 - 0.5 * shares[second] / shares[first])
