"""Fill-in-the-middle for source code (Bavarian et al. 2022; spec section 2: applied to all source code).

A document is cut at two random places and rewritten so that the model sees what is before and after a gap and then
writes the gap. Each sentinel names the part that follows it, so reading the parts back is lossless:

  PSM  <|code_prefix|> prefix <|code_suffix|> suffix <|code_middle|> middle
  SPM  <|code_suffix|> suffix <|code_prefix|> prefix <|code_middle|> middle

The report gives neither the rate nor the order; both are recipe fields. Cuts are at characters, not tokens, so that
the model also meets gaps inside a word.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from glmctl.recipe.schema import FillInTheMiddle

PREFIX, MIDDLE, SUFFIX = "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"


class Part(NamedTuple):
    """A stretch of text, and the sentinel in front of it (None for a document left as it is)."""

    sentinel: str | None
    text: str


def rearrange(text: str, spec: FillInTheMiddle, rng: random.Random) -> list[Part]:
    """The document as parts: rearranged with probability `spec.rate`, else whole."""
    if len(text) < 2 or rng.random() >= spec.rate:
        return [Part(None, text)]
    one, two = sorted(rng.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = Part(PREFIX, text[:one]), Part(MIDDLE, text[one:two]), Part(SUFFIX, text[two:])
    if rng.random() < spec.spm_rate:
        return [suffix, prefix, middle]
    return [prefix, suffix, middle]


def reassemble(parts: Sequence[Part]) -> str:
    """The document that `parts` came from."""
    if len(parts) == 1 and parts[0].sentinel is None:
        return parts[0].text
    texts = {part.sentinel: part.text for part in parts}
    assert texts.keys() == {PREFIX, MIDDLE, SUFFIX}, "a rearranged document has a prefix, a middle and a suffix"
    return texts[PREFIX] + texts[MIDDLE] + texts[SUFFIX]
