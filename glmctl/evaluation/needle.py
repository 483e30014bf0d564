"""`glmctl_needle`: one sentence at a chosen depth of a haystack of a chosen length, then asked for (Kamradt 2023).

Found means that every token of the answer is the likeliest one, which is what greedy decoding would have written; so
one forward pass a question decides, and base models take part. A haystack is measured in the model's own tokens,
question and answer included. A random model finds nothing.
"""

from __future__ import annotations

import functools
import random
import re
import textwrap
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from glmctl.data import sources
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import RecipeError
from glmctl.evaluation.documents import Row, as_dataset, means, read_rows
from glmctl.recipe.schema import BundledText, Needle
from glmctl.rl.seeds import derive_seed

KEYS = (
    *("harbour", "meadow", "lantern", "copper", "orchard", "thunder", "velvet", "canyon", "pepper", "marble"),
    *("falcon", "saddle", "ribbon", "walnut", "glacier", "whistle", "basket", "temple", "violin", "pebble"),
)
LINE_CHARS = 160
"""most characters in a line of the haystack"""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
JARGON_FILE = BundledText(domain="haystack", text="jargon-file")


def needle(spec: Needle, tokenizer: Tokenizer, context: int) -> Row:
    """The config of the task for a model with `context` tokens. RecipeError for a length beyond it or too short."""
    lengths = sorted(set(spec.lengths)) or default_lengths(context)
    if lengths[-1] > context:
        raise RecipeError(
            f"needle.lengths: {lengths[-1]} tokens exceed the model's context of {context}",
            hint="shorten the list, or leave it empty for lengths up to the context",
        )
    cells = [cell_name(length, depth) for length in lengths for depth in depths(spec.depths)]
    longest = [cell_name(lengths[-1], depth) for depth in depths(spec.depths)]

    def process_results(doc: Row, results: list[tuple[float, bool]]) -> dict[str, Any]:
        ((_, greedy),) = results
        found = float(greedy)
        cell = cell_name(doc["length"], doc["depth"])
        at_most = {"longest": found, "longest_worst": (cell, found)} if cell in longest else {}
        return {
            "found": found,
            "found_worst": (cell, found),
            f"found_{doc['length']}": found,
            cell: found,
            **at_most,
        }

    worst = [
        {"metric": name, "aggregation": worst_cell, "higher_is_better": True}
        for name in ("found_worst", "longest_worst")
    ]
    return {
        **as_dataset(list(documents(spec, tokenizer, lengths))),
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        # lm-eval's delimiter is not for log-likelihood tasks: they score the target as it is
        "doc_to_target": lambda doc: f" {doc['answer']}",
        "process_results": process_results,
        "metric_list": means("found", "longest", *(f"found_{length}" for length in lengths), *cells) + worst,
    }


def default_lengths(context: int) -> list[int]:
    """An eighth, a quarter, half and all of the context; of a short one those that hold more than the question."""
    return [context // part for part in (8, 4, 2) if context // part >= 128] + [context]


def depths(count: int) -> list[int]:
    """`count` depths in percent, 0 the beginning and 100 the end."""
    return [round(100 * step / (count - 1)) for step in range(count)]


def cell_name(length: int, depth: int) -> str:
    """The metric of one length and depth, `found_4096@25`."""
    return f"found_{length}@{depth}"


def worst_cell(items: Sequence[tuple[str, float]]) -> float:
    """The lowest mean of any cell, of (cell, found) pairs: 'at any depth' is a claim about this one."""
    by_cell: dict[str, list[float]] = {}
    for cell, found in items:
        by_cell.setdefault(cell, []).append(found)
    return min(sum(found) / len(found) for found in by_cell.values())


def documents(spec: Needle, tokenizer: Tokenizer, lengths: Sequence[int]) -> Iterator[Row]:
    """Sample by sample through the whole grid, so that a limit keeps all of it; a cell's draws do not depend on it."""
    filler = _Filler(spec, tokenizer)
    for sample in range(spec.samples):
        for length in lengths:
            for depth in depths(spec.depths):
                rng = random.Random(derive_seed("glmctl needle", length, depth, sample))
                yield _document(spec, filler, tokenizer, rng, length, depth)


def _document(spec: Needle, filler: _Filler, tokenizer: Tokenizer, rng: random.Random, length: int, depth: int) -> Row:
    keys = rng.sample(spec.keys or KEYS, spec.needles)
    values = ["".join(rng.choice("0123456789") for _ in range(spec.digits)) for _ in keys]
    hidden = [spec.statement.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    places = [depth / 100, *(rng.random() for _ in keys[1:])]
    question = spec.question.format(key=keys[0])
    lines = filler.lines_from(rng)

    def context(room: int) -> str:
        return spec.between.join(_hide(lines(room), hidden, places)) + question

    room = length - len(tokenizer.encode(f"{spec.between.join(hidden)}{question} {values[0]}"))
    # a tokenizer may merge over the border of two lines: what was counted in pieces is checked as a whole
    while room > 0 and (over := len(tokenizer.encode(f"{context(room)} {values[0]}")) - length) > 0:
        room -= over
    if room <= 0:
        raise RecipeError(
            f"needle.lengths: {length} tokens are no haystack, needles and question alone take {length - room}"
        )
    return {"context": context(room), "answer": values[0], "length": length, "depth": depth}


def _hide(haystack: list[str], hidden: list[str], places: Sequence[float]) -> list[str]:
    """The lines with the sentences of `hidden` between them, each where its share (0 to 1) of the text is past."""
    ends = [0, *accumulate(len(line) for line in haystack)]
    at: dict[int, list[str]] = {}
    for text, share in zip(hidden, places, strict=True):
        nearest = min(range(len(ends)), key=lambda n: abs(ends[n] - share * ends[-1]))
        at.setdefault(nearest, []).append(text)
    lines: list[str] = []
    for number in range(len(ends)):
        lines += at.get(number, [])
        lines += haystack[number : number + 1]
    return lines


def _short_lines(text: str) -> Iterator[str]:
    """Sentences, a long one in pieces: the shorter a line, the closer a depth is met. In any script."""
    for sentence in _SENTENCE_END.split(text):
        yield from textwrap.wrap(sentence, LINE_CHARS, break_on_hyphens=False)


@functools.cache
def _jargon_file() -> list[str]:
    return [line for one in sources.documents([JARGON_FILE], seed=0) for line in _short_lines(one.text)]


class _Filler:
    """Lines of text to hide something in, with their lengths in tokens."""

    def __init__(self, spec: Needle, tokenizer: Tokenizer) -> None:
        texts = [row["text"] for path in spec.texts for row in read_rows(Path(path), "text")]
        self.lines = [line for text in texts for line in _short_lines(text)] if texts else _jargon_file()
        if not self.lines:
            raise RecipeError("needle.texts: nothing but white space in them")
        self._size = functools.cache(lambda text: len(tokenizer.encode_plain(text + spec.between)))

    def lines_from(self, rng: random.Random) -> Callable[[int], list[str]]:
        """room -> lines from one random place on, round and round, of at most that many tokens; the last is cut."""
        start = rng.randrange(len(self.lines))

        def lines(room: int) -> list[str]:
            found: list[str] = []
            at = start
            while self._size(self.lines[at]) <= room:
                found.append(self.lines[at])
                room -= self._size(self.lines[at])
                at = (at + 1) % len(self.lines)
            beginnings = [self.lines[at][:length] for length in range(1, len(self.lines[at]))]
            fitting = bisect_right(beginnings, room, key=self._size)
            return [*found, *beginnings[fitting - 1 : fitting]]

        return lines
