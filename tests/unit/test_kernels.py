"""Every variant of an operation equals its reference in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.errors import DivergedError, EnvironmentProblem
from glmctl.kernels import attention, registry
from glmctl.kernels.rms_norm import rms_norm
from glmctl.kernels.rope import rope, rotation
from glmctl.kernels.swiglu import swiglu


def draw(*shape: int, seed: int = 0, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def same_with_gradients(
    function: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-10
) -> None:
    """Values and the gradients of a random projection of the result, in every input that wants one."""
    ours, theirs = function(*inputs), expected(*inputs)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    weights = draw(*theirs.shape, seed=99, grad=False, dtype=theirs.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    got = torch.autograd.grad((ours * weights).sum(), wanted)
    right = torch.autograd.grad((theirs * weights).sum(), wanted)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(function(*inputs), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["torch", "function"])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 16)])
def test_rms_norm(name: str, shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape), draw(shape[-1], seed=1)
    found = registry.variants("rms_norm")
    same_with_gradients(lambda x, w: found[name](x, w, 1e-5), lambda x, w: found["reference"](x, w, 1e-5), [x, weight])


def test_rms_norm_is_taken_in_fp32_whatever_the_dtype() -> None:
    """Squares of 300 overflow fp16; squares of bf16 lose most of their digits."""
    x = draw(4, 64, grad=False) * 300
    weight = draw(64, seed=1, grad=False)
    exact = registry.variants("rms_norm")["reference"](x, weight, 1e-5)
    for dtype, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        low = rms_norm(x.to(dtype), weight.to(dtype), 1e-5)
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), exact, atol=tolerance, rtol=tolerance)


def test_swiglu() -> None:
    gate, up = draw(6, 10), draw(6, 10, seed=1)
    same_with_gradients(registry.variants("swiglu")["function"], registry.variants("swiglu")["reference"], [gate, up])
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize(("rotary", "width"), [(16, 16), (8, 16), (4, 24)])
def test_rope_function_equals_reference(rotary: int, width: int) -> None:
    x = draw(2, 5, 3, width)
    turn = rotation(torch.arange(5).expand(2, 5), rotary, width, 1e4, torch.float64)
    found = registry.variants("rope")
    same_with_gradients(lambda x: found["function"](x, turn), lambda x: found["reference"](x, turn), [x])


@pytest.mark.parametrize(("rotary", "width"), [(16, 16), (8, 16), (4, 24)])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_rope_by_exchange_equals_reference(rotary: int, width: int, scale: float) -> None:
    """A GPU's variant; in fp32, whose tables it takes. Scale: YaRN's."""
    turn = rotation(torch.arange(5).expand(2, 5), rotary, width, 1e4, scale=scale)
    found = registry.variants("rope")
    mine = draw(2, 5, 3, width).detach().float().requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    a, b = found["exchange"](mine, turn), found["reference"](theirs, turn)
    torch.testing.assert_close(a, b)
    projection = draw(2, 5, 3, width, seed=9).detach().float()
    (got,), (right,) = (torch.autograd.grad((y * projection).sum(), x) for y, x in ((a, mine), (b, theirs)))
    torch.testing.assert_close(got, right)
    half = mine.detach().bfloat16()
    torch.testing.assert_close(found["exchange"](half, turn), found["reference"](half, turn))


def test_a_mask_that_is_added_shows_what_a_boolean_one_shows() -> None:
    q, k, v = draw(3, 2, 4, 8, grad=False), draw(3, 2, 21, 8, grad=False), draw(3, 2, 21, 8, seed=1, grad=False)
    visible = torch.arange(21) < torch.tensor([[5, 6], [20, 21], [1, 2]])[..., None]
    mask = attention.additive_mask(visible, q.dtype)
    assert mask.stride(-2) % 16 == 0
    right = attention.cached_attention(q, k, v, visible)
    torch.testing.assert_close(attention.cached_attention(q, k, v, mask), right)
    one = attention.additive_mask(visible[:, :1], q.dtype)
    torch.testing.assert_close(attention.cached_attention(q[:, :1], k, v, one), right[:, :1])


def test_the_registry_prefers_the_last_suiting_variant_and_can_be_forced() -> None:
    assert registry.op("rms_norm", "cpu", torch.float32) is registry.variants("rms_norm")["function"]
    assert registry.op("rms_norm", "cuda", torch.bfloat16) is registry.variants("rms_norm")["torch"]
    assert registry.op("rms_norm", "meta", torch.float32) is registry.variants("rms_norm")["reference"]
    with registry.forced("rms_norm", "reference"):
        assert registry.op("rms_norm", "cpu", torch.float32) is registry.variants("rms_norm")["reference"]
    assert registry.op("rms_norm", "cpu", torch.float32) is registry.variants("rms_norm")["function"]


@pytest.mark.parametrize(
    "name", ["rms_norm", "rope", "swiglu", "attention", "experts", "linear_cross_entropy", "draw", "all_finite"]
)
def test_every_operation_has_a_reference_first(name: str) -> None:
    found = list(registry.variants(name))
    assert found[0] == "reference"
    assert len(found) > 1


def test_rope_entry_point_keeps_the_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        turn = rotation(torch.arange(4)[None], 8, 16, 1e4)
        assert rope(draw(1, 4, 2, 16, grad=False).to(dtype), turn).dtype == dtype


def test_compile_names_what_is_missing_and_leaves_the_choice_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no working C++ compiler was found\nand a long story")

    registry._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with (
        pytest.raises(EnvironmentProblem, match=r"kernels for cpu here: no working C\+\+ compiler was found$") as found,
        registry.compiled_small(True, torch.device("cpu")),
    ):
        pass
    assert found.value.hint == "set compile: false"
    assert registry.op("swiglu") is registry.variants("swiglu")["function"]


def test_compile_ends_with_its_stage_however_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stage of a pipeline runs in the same process and has not asked for it."""
    monkeypatch.setattr(registry, "_compiled", lambda name: registry.variants(name)["reference"])
    plain = registry.op("swiglu")

    def stage() -> None:
        with registry.compiled_small(True, torch.device("cpu")):
            assert registry.compiling_small()
            assert registry.op("swiglu") is not plain
            raise DivergedError("three steps in a row were left out")

    with pytest.raises(DivergedError):
        stage()
    assert not registry.compiling_small()
    assert registry.op("swiglu") is plain
