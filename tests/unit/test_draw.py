"""The compiled draw and its definition choose the same tokens; what it chooses depends on nothing but its own row."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from glmctl.errors import EnvironmentProblem
from glmctl.kernels import all_finite as finite_module
from glmctl.kernels import draw as draw_module
from glmctl.kernels.all_finite import all_finite
from glmctl.kernels.cpu import library as native_library
from glmctl.kernels.draw import Drawing, draw
from glmctl.kernels.registry import forced, variants

LARGEST = 1 - 2.0**-52
"""of the numbers that `engine.sampler.uniforms` gives"""


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        native_library.find_compiler()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))


def drawing(rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Drawing:
    """The same for all rows, each with a uniform number of its own."""
    return Drawing(
        np.full(rows, temperature, np.float32),
        np.full(rows, top_k, np.int64),
        np.full(rows, top_p, np.float32),
        np.full(rows, min_p, np.float32),
        np.random.default_rng(rows).random(rows),
    )


def logits(rows: int, vocab: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def both(logits_NV: Tensor, how: Drawing) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    found = variants("draw")
    return found["native"](logits_NV, how, True), found["reference"](logits_NV, how, True)


def mixed(rows: int, seed: int) -> Drawing:
    """Every kind of row in one batch."""
    rng = np.random.default_rng(seed)
    return Drawing(
        rng.choice([0.0, 0.6, 1.0, 1.7], rows).astype(np.float32),
        rng.choice([0, 0, 1, 7, 10_000], rows).astype(np.int64),
        rng.choice([1.0, 1.0, 0.3, 0.9], rows).astype(np.float32),
        rng.choice([0.0, 0.0, 0.02, 0.5], rows).astype(np.float32),
        rng.random(rows),
    )


@pytest.mark.parametrize("vocab", [1, 3, 16, 40, 127, 129, 1000, 8192])
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0], ids=["flat", "usual", "peaked"])
def test_the_compiled_draw_is_its_definition(vocab: int, spread: float) -> None:
    rows = 64
    (ours, ours_logprob), (theirs, logprob) = both(logits(rows, vocab, spread), mixed(rows, vocab))
    # a uniform number within rounding of the border of two tokens may go either way: one in ten thousand at 8192 tokens
    assert (ours != theirs).sum() <= 1
    same = ours == theirs
    # fp32 of numbers up to 200
    torch.testing.assert_close(ours_logprob[same], logprob[same], atol=3e-5, rtol=1e-6)


@pytest.mark.parametrize("what", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_ends_of_the_uniform_numbers_stay_inside_what_is_allowed(what: dict[str, float]) -> None:
    logits_NV = logits(2, 333)
    logits_NV[:, :7] = float("-inf")
    logits_NV[:, -9:] = float("-inf")
    how = drawing(2, **what)._replace(uniform=np.array([0.0, LARGEST]))  # type: ignore[arg-type]
    (ours, _), (theirs, _) = both(logits_NV, how)
    assert torch.equal(ours, theirs)
    assert torch.isfinite(logits_NV.gather(1, ours[:, None])).all()


def test_a_single_allowed_token_is_drawn_wherever_it_is() -> None:
    vocab = 300
    logits_NV = torch.full((vocab, vocab), float("-inf"))
    logits_NV.fill_diagonal_(-3.0)
    for what in ({}, {"top_p": 0.5}, {"top_k": 9, "min_p": 0.3}, {"temperature": 0.0}):
        tokens, logprobs = draw(logits_NV, drawing(vocab, **what), logprobs=True)  # type: ignore[arg-type]
        assert tokens.tolist() == list(range(vocab))
        assert logprobs is not None
        assert not logprobs.any()


def test_equal_logits_are_ranked_by_id_and_drawn_alike() -> None:
    rows = 4000
    for top_k, allowed in ((0, 50), (7, 7)):
        tokens, _ = draw(torch.zeros(1, 50).expand(rows, 50), drawing(rows, top_k=top_k), logprobs=False)
        assert set(tokens.tolist()) == set(range(allowed))
    tied = torch.tensor([[1.0, 4.0, 4.0, -0.0, 0.0]])
    assert draw(tied, drawing(1, temperature=0.0), logprobs=False)[0].tolist() == [1]


def test_a_row_is_drawn_the_same_alone_and_among_many_by_several_threads() -> None:
    rows, vocab = 96, 3000
    logits_NV, how = logits(rows, vocab), mixed(rows, 1)
    assert rows * vocab > 1 << 17, "fewer are drawn by one thread"
    together, logprobs = draw(logits_NV, how, logprobs=True)
    assert logprobs is not None
    for row in range(rows):
        token, logprob = draw(logits_NV[row : row + 1], how.select(np.array([row])), logprobs=True)
        assert logprob is not None
        assert (token.item(), logprob.item()) == (together[row].item(), logprobs[row].item())


def test_rows_may_lie_apart_and_columns_too() -> None:
    wide = logits(6, 2 * 90)
    for logits_NV in (wide[:, :90], wide[:, ::2], wide[::2, 3:93]):
        how = drawing(len(logits_NV))
        assert torch.equal(draw(logits_NV, how, logprobs=False)[0], draw(logits_NV.clone(), how, logprobs=False)[0])


def test_a_forked_child_draws_with_threads_of_its_own() -> None:
    logits_NV, how = logits(96, 3000), drawing(96)
    before, _ = draw(logits_NV, how, logprobs=False)
    child = os.fork()
    if child == 0:
        same = torch.equal(variants("draw")["native"](logits_NV, how, False)[0], before)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("size", [1, 15, 32, 100, 4096])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(size: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assert all_finite(x)
    assert all_finite(torch.full((size,), 3e38)), "the sum is not what matters"
    for place in {0, size // 2, size - 1}:
        for damage in (float("nan"), float("inf"), float("-inf")):
            damaged = x.clone()
            damaged[place] = damage
            assert not all_finite(damaged)
            assert not variants("all_finite")["reference"](damaged)
    assert all_finite(torch.empty(0, 8))


def test_without_compiled_code_both_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (draw_module, finite_module):
        monkeypatch.setattr(module, "compiled", lambda: None)
    logits_NV, how = logits(5, 70), mixed(5, 2)
    ours = draw(logits_NV, how, logprobs=True)
    with forced("draw", "reference"):
        theirs = draw(logits_NV, how, logprobs=True)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] is not None
    assert theirs[1] is not None
    assert torch.equal(ours[1], theirs[1])
    assert not all_finite(torch.tensor([1.0, float("nan")]))
