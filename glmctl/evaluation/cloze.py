"""The generator of `data/cloze.jsonl`: continuations that knowing Python's grammar, or plain English, decides.

Deterministic and without random numbers: every template meets every filling, and the place of the right choice
goes round. A test holds the shipped file equal to what this writes.
"""

from __future__ import annotations

from typing import Any

_NAMES = ("items", "values", "lines", "names")

# Every context ends in a letter or digit and every choice starts with something else: there the tokeniser cuts, so the
# tokens of context plus choice are those of the context and then those of the choice.
_PYTHON: tuple[tuple[str, tuple[str, str, str, str]], ...] = (
    ("for item in {name}", (":\n", ")\n", "=\n", ",\n")),
    ("if not {name}", (":\n", "]\n", "=\n", "->\n")),
    ("def count({name}", ("):\n", "]:\n", "}}:\n", "=:\n")),
    ("import os\nimport", (" sys\n", " 1\n", " ()\n", " :\n")),
    ("class Reader(object", ("):\n", "]:\n", ",:\n", "=:\n")),
    ("    return len({name}", (")\n", "]\n", ":\n", "}}\n")),
    ("try:\n    value = {name}[0]\nexcept", (" IndexError:\n", " return:\n", " def:\n", " 0:\n")),
    ("while True:\n    {name}.pop()\n    if done", (":\n", "):\n", "]\n", "=\n")),
    ("x = {name}[0", ("]\n", ")\n", "}}\n", ":\n")),
    ("with open(path) as", (" f:\n", " 1:\n", " ):\n", " in:\n")),
    ("if value is not", (" None:\n", " def:\n", " ):\n", " import:\n")),
    ("    raise ValueError", ('("no {name}")\n', "]\n", ":\n", " def\n")),
    ("from collections import", (" namedtuple\n", " (:\n", " 1\n", " return\n")),
    ("{name} = sorted({name}", (")\n", "]\n", ":\n", "}}\n")),
    ("print(len({name}", ("))\n", ")]\n", "])\n", ":)\n")),
)

_WHO = ("they", "we", "you", "people")

_ENGLISH: tuple[tuple[str, tuple[str, str, str, str]], ...] = (
    ("One of the most", (" common", " of", " the", " and")),
    ("It is a kind", (" of", " is", " the", " was")),
    ("As {who} said, this is the same", (" as", " is", " of", " was")),
    ("{Who} do not", (" know", " the", " of", " was")),
    ("{Who} have", (" been", " is", " was", " were")),
    ("In order", (" to", " of", " the", " is")),
    ("At the end of", (" the", " is", " was", " and")),
    ("There is no", (" way", " the", " of", " is")),
    ("If {who} want to", (" use", " of", " the", " is")),
    ("The first of these", (" is", " am", " of", " me")),
)


def build() -> list[dict[str, Any]]:
    """Rows {"context", "choices" (4 texts), "answer" (index of the right one), "language"}, without repetition."""
    rows: dict[str, dict[str, Any]] = {}
    for language, templates, fillings in (("python", _PYTHON, _NAMES), ("english", _ENGLISH, _WHO)):
        for filling in fillings:
            for context, choices in templates:
                filled = [_fill(text, filling) for text in (context, *choices)]
                if filled[0] not in rows:
                    rows[filled[0]] = _row(language, filled[0], filled[1:], len(rows))
    return list(rows.values())


def _fill(text: str, filling: str) -> str:
    return text.format(name=filling, who=filling, Who=filling.capitalize())


def _row(language: str, context: str, choices: list[str], turn: int) -> dict[str, Any]:
    place = turn % len(choices)
    # the right one comes first above; the wrong ones keep their order around it
    wrong = choices[1:]
    return {
        "context": context,
        "choices": [*wrong[:place], choices[0], *wrong[place:]],
        "answer": place,
        "language": language,
    }
