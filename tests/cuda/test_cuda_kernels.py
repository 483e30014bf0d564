"""Every operation on CUDA equals its definition in float64 on the CPU: values and gradients, fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from glmctl.engine.request import SamplingParams
from glmctl.engine.sampler import Rows, pick
from glmctl.kernels import attention, registry
from glmctl.kernels.experts import experts
from glmctl.kernels.linear_cross_entropy import linear_cross_entropy, token_log_probs
from glmctl.kernels.linear_kl import linear_kl
from glmctl.kernels.newton_schulz import newton_schulz
from glmctl.kernels.rms_norm import rms_norm
from glmctl.kernels.rope import norm_rope, rope, rotation
from glmctl.kernels.router_topk import router_topk
from glmctl.kernels.swiglu import swiglu
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training.optim import build_optimizer

pytestmark = pytest.mark.cuda

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""share of the largest number: fp32 sums in another order, bf16's eight bits through a few products"""


class Case(NamedTuple):
    inputs: list[Tensor]
    """float64 on the CPU"""
    ours: Callable[..., Tensor]
    """of the inputs on the device, in the dtype that is tested"""
    definition: Callable[..., Tensor]
    """of the inputs on the CPU in float64"""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(name: str) -> Callable[..., Tensor]:
    return registry.variants(name)["reference"]


def norm_case(device: torch.device) -> Case:
    definition = reference("rms_norm")
    return Case(
        [draw(9, 7, 96), draw(96, seed=1)], lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: definition(x, w, 1e-5)
    )


def swiglu_case(device: torch.device) -> Case:
    return Case([draw(50, 40), draw(50, 40, seed=1)], swiglu, reference("swiglu"))


def rope_case(device: torch.device) -> Case:
    places = torch.arange(31).expand(2, 31) * 3
    there = rotation(places.to(device), 16, 32, 1e4)
    here = rotation(places, 16, 32, 1e4, torch.float64)
    definition = reference("rope")
    return Case([draw(2, 31, 4, 32)], lambda x: rope(x, there), lambda x: definition(x, here))


def norm_rope_case(device: torch.device) -> Case:
    places = torch.arange(31).expand(2, 31)
    there = rotation(places.to(device), 16, 32, 1e4)
    here = rotation(places, 16, 32, 1e4, torch.float64)
    definition = reference("norm_rope")
    return Case(
        [draw(2, 31, 4, 32), draw(32, seed=1)],
        lambda x, w: norm_rope(x, w, 1e-5, there),
        lambda x, w: definition(x, w, 1e-5, here),
    )


def experts_case(device: torch.device, *, tokens: int = 300, used: int = 13) -> Case:
    """Sixteen experts of which three get nothing."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(used, generator=generator)[:4] for _ in range(tokens)])
    there, definition = index.to(device), reference("experts")
    inputs = [draw(tokens, 64), draw(tokens, 4, seed=1).sigmoid()]
    inputs += [draw(16, 2 * 40, 64, seed=2) / 8, draw(16, 64, 40, seed=3) / 6]
    return Case(
        inputs,
        lambda x, w, up, down: experts(x, there, w, up, down),
        lambda x, w, up, down: definition(x, index, w, up, down),
    )


def few_experts_case(device: torch.device) -> Case:
    """Small enough to go through all experts where no gradient is wanted."""
    return experts_case(device, tokens=5)


def narrow_experts_case(device: torch.device) -> Case:
    """Widths whose rows a grouped product in bf16 would refuse."""
    index = torch.arange(60).view(30, 2) % 5
    there, definition = index.to(device), reference("experts")
    inputs = [draw(30, 20), draw(30, 2, seed=1).sigmoid(), draw(6, 2 * 12, 20, seed=2) / 4, draw(6, 20, 12, seed=3) / 3]
    return Case(
        inputs,
        lambda x, w, up, down: experts(x, there, w, up, down),
        lambda x, w, up, down: definition(x, index, w, up, down),
    )


def one_expert_case(device: torch.device) -> Case:
    """All tokens to one of them; the other seven must get a gradient of zero."""
    index = torch.full((130, 1), 3)
    there, definition = index.to(device), reference("experts")
    inputs = [draw(130, 64), draw(130, 1, seed=1).sigmoid()]
    inputs += [draw(8, 2 * 40, 64, seed=2) / 8, draw(8, 64, 40, seed=3) / 6]
    return Case(
        inputs,
        lambda x, w, up, down: experts(x, there, w, up, down),
        lambda x, w, up, down: definition(x, index, w, up, down),
    )


def attention_case(device: torch.device) -> Case:
    documents = torch.full((3, 120), -1)
    for row, lengths in enumerate(((50, 1, 60), (120,), (17, 33, 9, 40))):
        at = 0
        for number, length in enumerate(lengths):
            documents[row, at : at + length] = number
            at += length
    here, there = attention.find_segments(documents), attention.find_segments(documents.to(device))
    return Case(
        [draw(3, 120, 8, 64), draw(3, 120, 2, 64, seed=1), draw(3, 120, 2, 64, seed=2)],
        lambda q, k, v: attention.document_attention(q, k, v, there),
        lambda q, k, v: attention.masked(q, k, v, here),
    )


def causal_case(tokens: int, heads: int, kv_heads: int, width: int, value_width: int) -> Case:
    here = attention.find_segments(torch.zeros(2, tokens, dtype=torch.long))
    return Case(
        [
            draw(2, tokens, heads, width),
            draw(2, tokens, kv_heads, width, seed=1),
            draw(2, tokens, kv_heads, value_width, seed=2),
        ],
        attention.causal_attention,
        lambda q, k, v: attention.masked(q, k, v, here),
    )


def targets(rows: int, vocabulary: int) -> Tensor:
    found = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(5))
    found[::7] = -100
    return found


def loss_case(device: torch.device) -> Case:
    here = targets(100, 700)
    there, kept = here.to(device), here != -100
    definition = reference("linear_cross_entropy")
    return Case(
        [draw(100, 64), draw(700, 64, seed=1) / 4],
        lambda h, w: linear_cross_entropy(h, w, there, chunk=32, z_weight=1e-3)[0],
        lambda h, w: definition(h[kept], w, here[kept], 1000, 1e-3),
    )


def log_probs_case(device: torch.device) -> Case:
    here = targets(100, 700).clamp(min=0)
    there = here.to(device)
    return Case(
        [draw(100, 64), draw(700, 64, seed=1) / 4],
        lambda h, w: token_log_probs(h, w, there, temperature=0.8, chunk=32),
        lambda h, w: ((h @ w.t()) / 0.8).log_softmax(1).gather(1, here[:, None])[:, 0],
    )


def kl_case(device: torch.device) -> Case:
    hidden, weight = draw(90, 48, seed=2), draw(300, 48, seed=3) / 4
    definition = reference("linear_kl")
    return Case(
        [draw(90, 64), draw(300, 64, seed=1) / 4],
        lambda h, w: linear_kl(h, w, hidden.to(h), weight.to(h), temperature=1.5, chunk=32),
        lambda h, w: definition(h, w, hidden, weight, 1.5, 1000),
    )


CASES = {
    "rms_norm": norm_case,
    "swiglu": swiglu_case,
    "rope": rope_case,
    "norm_rope": norm_rope_case,
    "experts": experts_case,
    "few_experts": few_experts_case,
    "narrow_experts": narrow_experts_case,
    "one_expert": one_expert_case,
    "document_attention": attention_case,
    "causal_attention": lambda device: causal_case(70, 8, 2, 128, 128),
    "attention_of_two_widths": lambda device: causal_case(33, 4, 4, 48, 32),  # MLA's
    "linear_cross_entropy": loss_case,
    "token_log_probs": log_probs_case,
    "linear_kl": kl_case,
}


def near(found: Tensor, right: Tensor, share: float) -> float:
    """The largest difference as a share of the largest number; fails above `share`."""
    found, right = found.detach().double().cpu(), right.detach()
    assert found.shape == right.shape
    off = float((found - right).abs().max() / right.abs().max().clamp(min=1e-12))
    assert off <= share, f"off by {off:.2e} of the largest, allowed {share:.0e}"
    return off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_operation(name: str, dtype: torch.dtype, device: torch.device, observe: Callable[..., None]) -> None:
    case = CASES[name](device)
    # both sides see the same numbers: those that the tested dtype can hold
    exact = [x.to(dtype).double().requires_grad_() for x in case.inputs]
    mine = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    right, found = case.definition(*exact), case.ours(*mine)
    assert found.device.type == device.type
    offs = [near(found, right, TOLERANCE[dtype])]
    weights = draw(*right.shape, seed=99)
    expected = torch.autograd.grad((right * weights).sum(), exact)
    got = torch.autograd.grad((found * weights.to(found)).sum(), mine)
    # a gradient is a product more than the value
    offs += [near(a, b, 2 * TOLERANCE[dtype]) for a, b in zip(got, expected, strict=True)]
    with torch.no_grad():
        offs.append(near(case.ours(*mine), right, TOLERANCE[dtype]))
    observe(off=[f"{x:.1e}" for x in offs])


def test_grouped_heads_in_fp32_never_make_all_scores(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("memory of a CUDA device")
    T, H, K, d = 4096, 8, 2, 64
    q, k, v = (torch.randn(1, T, heads, d, device=device, requires_grad=True) for heads in (H, K, K))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    attention.causal_attention(q, k, v).sum().backward()
    assert torch.cuda.max_memory_allocated(device) - before < H * T * T * 4 // 4


@pytest.mark.parametrize("name", ["experts", "document_attention", "linear_cross_entropy", "causal_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_twice(name: str, dtype: torch.dtype, device: torch.device, observe: Callable[..., None]) -> None:
    """Values are the same bits each time; whether gradients are is observed: torch's attention adds in any order."""
    case = CASES[name](device)
    mine = [x.to(device, dtype).requires_grad_() for x in case.inputs]
    runs = []
    for _ in range(3):
        found = case.ours(*mine)
        runs.append((found.detach(), torch.autograd.grad(found.double().square().sum(), mine)))
    assert all(torch.equal(runs[0][0], value) for value, _ in runs)
    same = all(torch.equal(a, b) for _, grads in runs for a, b in zip(runs[0][1], grads, strict=True))
    observe(gradients_are_the_same_bits=same)
    if name != "causal_attention" and name != "document_attention":
        assert same


def test_experts_in_bf16_never_make_the_host_wait(device: torch.device) -> None:
    case = experts_case(device)
    mine = [x.to(device, torch.bfloat16).requires_grad_() for x in case.inputs]
    assert registry.op("experts", "cuda", torch.bfloat16) is registry.variants("experts")["grouped"]
    weights = draw(300, 64, seed=9).to(device, torch.bfloat16)
    index = torch.rand(300, 16, device=device, generator=torch.Generator(device).manual_seed(0)).topk(4).indices
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = experts(mine[0], index, *mine[1:])
        torch.autograd.grad((found * weights).sum(), mine)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_routing(device: torch.device) -> None:
    scores, bias = draw(200, 32).sigmoid().float(), draw(32, seed=1).float() / 10
    rules = {"top_k": 4, "groups": 4, "groups_kept": 2, "normalize": True, "scale": 2.5}
    index, weight = router_topk(scores, bias, **rules)
    there, weight_there = router_topk(scores.to(device), bias.to(device), **rules)
    order, order_there = index.argsort(1), there.cpu().argsort(1)
    assert torch.equal(index.gather(1, order), there.cpu().gather(1, order_there))
    torch.testing.assert_close(weight_there.cpu().gather(1, order_there), weight.gather(1, order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cached_attention(dtype: torch.dtype, device: torch.device) -> None:
    """One token a row over caches of several lengths, and pieces of several tokens (drafts)."""
    for pieces in (1, 3):
        q, k, v = draw(4, pieces, 8, 64), draw(4, 2, 50, 64, seed=1), draw(4, 2, 50, 64, seed=2)
        ends = torch.tensor([50, 9, 33, 20])[:, None] - torch.arange(pieces).flip(0)
        visible = torch.arange(50) < ends[..., None]
        q, k, v = (x.to(dtype).double() for x in (q, k, v))
        right = attention.cached_attention(q, k, v, visible)
        there = (x.to(device, dtype) for x in (q, k, v))
        near(attention.cached_attention(*there, visible.to(device)), right, TOLERANCE[dtype])
        there = (x.to(device, dtype) for x in (q, k, v))
        near(attention.cached_attention(*there, None), attention.cached_attention(q, k, v, None), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(6, 64, 96), (3, 96, 64), (128, 128)])
def test_newton_schulz(shape: tuple[int, ...], device: torch.device, observe: Callable[..., None]) -> None:
    """bf16 on CUDA, fp32 on a CPU: singular values in the band that the coefficients give, directions alike."""
    g = draw(*shape).float()
    right, found = newton_schulz(g), newton_schulz(g.to(device))
    values = torch.linalg.svdvals(found.cpu().double())
    # the smallest of a square Gaussian matrix need more than five steps
    assert values.max() < 1.3
    assert values.median() > 0.6
    off = float((found.cpu() - right).norm() / right.norm())
    observe(off=off, singular=[float(values.min()), float(values.max())])
    assert off < 0.05
    assert not newton_schulz(torch.zeros(2, 16, 24, device=device)).any()


@pytest.mark.parametrize("spec", [MuonSpec(), AdamWSpec()], ids=["muon", "adamw"])
def test_an_optimizer_step(spec: MuonSpec | AdamWSpec, device: torch.device, observe: Callable[..., None]) -> None:
    """Three steps from the same gradients: AdamW's to fp32 rounding, Muon's to that of bf16 Newton-Schulz."""
    shapes = {
        "q_proj.weight": (64, 96),
        "experts.gate_up_proj": (4, 80, 64),
        "norm.weight": (64,),
        "a.weight": (96, 64),
    }

    def train(where: torch.device) -> dict[str, Tensor]:
        model = torch.nn.Module()
        for number, (name, shape) in enumerate(shapes.items()):
            start = draw(*shape, seed=number).float() / 10
            model.register_parameter(name.replace(".", "_"), torch.nn.Parameter(start.to(where)))
        named = dict(zip(shapes, model.parameters(), strict=True))
        # the optimizer goes by names that a module may not have
        holder = type("Holder", (), {"named_parameters": lambda self: iter(named.items())})()
        optimizer = build_optimizer(holder, spec, lr=0.02)
        before = {name: p.detach().clone() for name, p in named.items()}
        for step in range(3):
            for number, p in enumerate(named.values()):
                p.grad = draw(*p.shape, seed=10 * step + number).float().to(where)
            optimizer.step()
        return {name: (p.detach() - before[name]).cpu() for name, p in named.items()}

    right, found = train(torch.device("cpu")), train(device)
    offs = {name: float((found[name] - right[name]).norm() / right[name].norm()) for name in shapes}
    observe(off=offs)
    matrices = 0.05 if isinstance(spec, MuonSpec) else 1e-5
    assert all(off < (matrices if len(shapes[name]) > 1 else 1e-5) for name, off in offs.items()), offs


def test_sampling_draws_the_tokens_that_a_cpu_draws(device: torch.device) -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2),
        SamplingParams(temperature=1.3, top_k=20, seed=3, logprobs=True, top_logprobs=3),
        SamplingParams(temperature=1.0, min_p=0.05, seed=4, logprobs=True),
        SamplingParams(temperature=0.9, top_k=50, top_p=0.8, min_p=0.01, seed=5),
    ]
    for turn in range(8):
        rows = Rows.empty(len(params))
        for row, one in enumerate(params):
            rows.put(row, one)
        rows.drawn[:] = turn
        logits = draw(len(params), 2000, seed=turn).float() * 3
        here, there = pick(logits, rows), pick(logits.to(device), rows)
        assert there.tokens.tolist() == here.tokens.tolist()
        assert here.logprobs is not None
        assert there.logprobs is not None
        assert here.top is not None
        assert there.top is not None
        torch.testing.assert_close(there.logprobs.cpu(), here.logprobs, atol=1e-5, rtol=1e-5)
        assert torch.equal(there.top[0].cpu()[3], here.top[0][3])
        torch.testing.assert_close(there.top[1].cpu(), here.top[1], atol=1e-5, rtol=1e-5)
