"""Truncation and penalties against transformers' own logits processors."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.generation import logits_process as theirs  # noqa: E402

from glmctl.engine.logits import Edit, edited  # noqa: E402
from glmctl.engine.request import SamplingParams  # noqa: E402
from glmctl.engine.sampler import Rows, pick  # noqa: E402

V = 40


@pytest.fixture
def logits_NV() -> torch.Tensor:
    return torch.randn(12, V, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        (SamplingParams(top_k=5), theirs.TopKLogitsWarper(5)),
        (SamplingParams(top_p=0.8), theirs.TopPLogitsWarper(0.8)),
        (SamplingParams(min_p=0.1), theirs.MinPLogitsWarper(0.1)),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_the_same_tokens_survive(params: SamplingParams, processor: object, logits_NV: torch.Tensor) -> None:
    allowed_NV = processor(None, logits_NV.clone()).isfinite()  # type: ignore[operator]
    draws = 3000
    for logits_V, allowed_V in zip(logits_NV, allowed_NV, strict=True):
        rows = Rows.empty(draws)
        for row in range(draws):
            rows.put(row, params)
        rows.drawn[:] = range(draws)
        drawn = pick(logits_V.expand(draws, V), rows).tokens.unique()
        assert allowed_V[drawn].all()
        # all that are not rare were seen: a token of 1 % is missed 3000 times with probability 1e-13
        likely = logits_V.masked_fill(~allowed_V, float("-inf")).softmax(-1) > 0.01
        assert torch.isin(likely.nonzero()[:, 0], drawn).all()


def test_the_repetition_penalty(logits_NV: torch.Tensor) -> None:
    ids = torch.randint(0, V, (12, 9), generator=torch.Generator().manual_seed(4))
    wanted = theirs.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits_NV.clone())
    params = SamplingParams(repetition_penalty=1.4)
    edits = [Edit(row, params, ids[row, :5].tolist(), ids[row, 5:].tolist(), None, frozenset()) for row in range(12)]
    assert torch.equal(edited(logits_NV, edits), wanted)


def test_the_bias(logits_NV: torch.Tensor) -> None:
    wanted = theirs.SequenceBiasLogitsProcessor([[[3], 2.5], [[7], -4.0]])(torch.zeros(12, 1).long(), logits_NV.clone())
    params = SamplingParams(logit_bias={3: 2.5, 7: -4.0})
    edits = [Edit(row, params, [0], [], None, frozenset()) for row in range(12)]
    assert torch.allclose(edited(logits_NV, edits), wanted)


def test_min_tokens(logits_NV: torch.Tensor) -> None:
    processor = theirs.MinNewTokensLengthLogitsProcessor(4, 3, [1, 2])
    for made in range(6):
        wanted = processor(torch.zeros(12, 4 + made).long(), logits_NV.clone()).argmax(-1)
        params = SamplingParams(temperature=0.0, min_tokens=3)
        edits = [Edit(row, params, [0] * 4, [0] * made, None, frozenset([1, 2])) for row in range(12)]
        assert torch.equal(pick(logits_NV, Rows.empty(12), edits).tokens, wanted)
