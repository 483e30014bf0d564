"""Laws of fill-in-the-middle: lossless, at the given rates, and only by the generator's choice."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.fim import MIDDLE, PREFIX, SUFFIX, Part, rearrange, reassemble
from glmctl.recipe.schema import FillInTheMiddle

TEXT = "".join(chr(97 + i % 26) for i in range(200))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.text(max_size=60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32))
def test_rearranging_loses_nothing(text: str, rate: float, spm: float, seed: int) -> None:
    parts = rearrange(text, FillInTheMiddle(rate=rate, spm_rate=spm), random.Random(seed))
    assert reassemble(parts) == text
    assert len(parts) in (1, 3)


def test_orders_are_as_documented() -> None:
    spm = rearrange(TEXT, FillInTheMiddle(rate=1, spm_rate=1), random.Random(0))
    psm = rearrange(TEXT, FillInTheMiddle(rate=1, spm_rate=0), random.Random(0))
    assert [part.sentinel for part in spm] == [SUFFIX, PREFIX, MIDDLE]
    assert [part.sentinel for part in psm] == [PREFIX, SUFFIX, MIDDLE]
    assert sorted(spm) == sorted(psm)


def test_rates_are_kept() -> None:
    spec = FillInTheMiddle(rate=0.4, spm_rate=0.25)
    parts = [rearrange(TEXT, spec, random.Random(seed)) for seed in range(2000)]
    changed = [p for p in parts if len(p) == 3]
    # three standard deviations of a binomial with these rates
    assert abs(len(changed) / 2000 - 0.4) < 3 * (0.24 / 2000) ** 0.5
    assert abs(sum(p[0].sentinel == SUFFIX for p in changed) / len(changed) - 0.25) < 3 * (0.1875 / 800) ** 0.5


def test_rate_zero_and_tiny_texts_stay_whole() -> None:
    assert rearrange(TEXT, FillInTheMiddle(rate=0), random.Random(0)) == [Part(None, TEXT)]
    assert rearrange("x", FillInTheMiddle(rate=1), random.Random(0)) == [Part(None, "x")]
