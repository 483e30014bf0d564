"""Documents with facts to be found again at their end: what the long rows of mid-training are to teach.

A document is prose with a few facts between its sentences ("Remember lemon tiger.") and a last part that states each of
them again, in another order. A fact's second word can only be known from where it was said before, however far back.
The same words make the probe that measures it: one fact at a chosen depth of a context of a chosen length.

A model learns to look back (induction: find the last place of this word, and copy what came after) only from text where
that pays often. A few facts among prose pay too seldom: a rehearsal, random words in an order that is then said again,
pays at every second word, and is what the first stage mixes in.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from glmctl.recipe.data import RetrievalSource

RECALL = "\nTo recall:"
AGAIN = "\nAgain:"
MAX_FACTS = 8

_WORDS = (
    "almond anchor apple arrow autumn badger bamboo banjo barrel basil beacon beaver birch bottle bramble bridge "
    "candle canyon carpet castle cedar cherry circle cliff clover cobalt comet copper coral cotton cradle crystal "
    "dagger daisy desert diamond dolphin dragon eagle ember falcon feather fern fiddle flint forest fossil fountain "
    "fox garden garnet ginger glacier granite hammer harbor hazel heron hollow honey indigo iris island ivory jasmine "
    "jungle kettle kite ladder lagoon lantern lark laurel lemon lily linen lizard lotus magnet mango maple marble "
    "meadow meteor mint mirror moss needle nickel nutmeg oasis olive onyx orchid otter oyster paddle pepper petal "
    "pigeon pillow plum pocket poppy prairie puzzle quartz quill rabbit raven reef ribbon river rocket rose saddle "
    "saffron sandal scarf seal shadow silver sparrow spruce stone summit swan tablet thistle thunder tiger timber "
    "topaz trumpet tulip tunnel turtle umbrella valley velvet violet walnut whale willow winter wolf zebra"
)
_ALL = _WORDS.split()
_NAMES, _VALUES = _ALL[::2], _ALL[1::2]


class Fact(NamedTuple):
    """One thing to remember."""

    name: str
    value: str

    @property
    def asked(self) -> str:
        """The statement up to what has to be recalled."""
        return f" Remember {self.name}"

    @property
    def stated(self) -> str:
        """The whole sentence."""
        return f"{self.asked} {self.value}."


class Probe(NamedTuple):
    """A context that ends where a fact has to be recalled."""

    text: str
    answer: str


def documents(source: RetrievalSource, first: int, last: int) -> Iterator[str]:
    """Documents number `first` ... `last` (exclusive) of the source: each by its number and the source's seed alone."""
    for number in range(first, last):
        rng = random.Random(f"retrieval:{source.seed}:{number}")
        characters = rng.randint(*source.characters)
        if rng.random() < source.rehearsals:
            yield rehearsal(rng, characters)
        else:
            yield document(rng, characters, rng.randint(1, source.facts))


def document(rng: random.Random, characters: int, count: int) -> str:
    """Prose of about `characters` with `count` facts anywhere in it, and all of them again at the end."""
    facts = draw(rng, count)
    tail = RECALL + "".join(fact.stated for fact in rng.sample(facts, len(facts)))
    sentences = _prose(rng, characters - 2 * len(tail))
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact.stated)
    return "".join(sentences).strip() + tail + "\n"


def rehearsal(rng: random.Random, characters: int) -> str:
    """Random words, half of `characters` of them, and the same words in the same order again."""
    words, size = list[str](), 0
    while 2 * size < characters:
        words.append(rng.choice(_ALL))
        size += len(words[-1]) + 1
    said = " ".join(words)
    return f"{said}{AGAIN} {said}\n"


def probe(rng: random.Random, characters: int, depth: float) -> Probe:
    """Prose of about `characters` with one fact at `depth` (0 beginning, 1 end), up to the fact's recall."""
    (fact,) = draw(rng, 1)
    sentences = _prose(rng, characters - 2 * len(fact.stated) - len(RECALL))
    sentences.insert(round(depth * len(sentences)), fact.stated)
    return Probe("".join(sentences).strip() + RECALL + fact.asked, f" {fact.value}.")


def probe_of_tokens(
    rng: random.Random, encode: Callable[[str], list[int]], tokens: int, depth: float
) -> tuple[list[int], str]:
    """Token ids of the longest probe of at most `tokens` that halving an interval finds, and its answer."""
    seed, low, high = rng.random(), 0, 8 * tokens
    while high - low > tokens // 16:
        middle = (low + high) // 2
        fits = len(encode(probe(random.Random(seed), middle, depth).text)) <= tokens
        low, high = (middle, high) if fits else (low, middle)
    found = probe(random.Random(seed), low, depth)
    return encode(found.text), found.answer


def draw(rng: random.Random, count: int) -> list[Fact]:
    """Facts of different names and different values."""
    pairs = zip(rng.sample(_NAMES, count), rng.sample(_VALUES, count), strict=True)
    return [Fact(name, value) for name, value in pairs]


def _prose(rng: random.Random, characters: int) -> list[str]:
    """Sentences from a random place of the Jargon File on, about `characters` in all."""
    pool = _sentences()
    at, size, found = rng.randrange(len(pool)), 0, list[str]()
    while size < characters:
        sentence = pool[at % len(pool)]
        found.append(f" {sentence}")
        size, at = size + len(sentence) + 1, at + 1
    return found


@lru_cache(maxsize=1)
def _sentences() -> list[str]:
    """Sentences of the bundled Jargon File in their order, without those that could be taken for a fact."""
    packed = resources.files("glmctl.data").joinpath("corpora", "jargon-4.4.7.jsonl.gz").read_bytes()
    texts = [json.loads(line)["text"] for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    split = (sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())))
    return [sentence for sentence in split if 20 <= len(sentence) <= 200 and "Remember" not in sentence]
