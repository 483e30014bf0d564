"""The router's rules (spec section 1.3), loads, and the sequence-level balance loss (section 2)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.kernels import registry
from glmctl.kernels.router_topk import router_topk
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.model.router import Router, RouterStats, _loads, _loads_unseen


def scores(n: int, n_experts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, n_experts, generator=torch.Generator().manual_seed(seed))


def plain_route(
    s: list[float], bias: list[float], *, k: int, groups: int, kept: int, normalise: bool, scale: float
) -> dict[int, float]:
    """The rules for one token in plain Python."""
    choice = [a + b for a, b in zip(s, bias, strict=True)]
    size = len(s) // groups
    rank = sorted(range(groups), key=lambda g: -sum(sorted(choice[g * size : (g + 1) * size])[-2:]))
    allowed = [e for e in range(len(s)) if e // size in rank[:kept]]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:k]
    total = sum(s[e] for e in chosen) + 1e-20 if normalise else 1.0
    return {e: s[e] / total * scale for e in chosen}


@pytest.mark.parametrize("variant", ["reference", "argmax"])
@pytest.mark.parametrize(
    ("n_experts", "k", "groups", "kept"), [(8, 2, 1, 1), (8, 1, 1, 1), (16, 4, 4, 2), (12, 3, 3, 1), (8, 2, 8, 3)]
)
@pytest.mark.parametrize("normalise", [True, False])
def test_choice_and_weights_follow_the_rules(
    variant: str, n_experts: int, k: int, groups: int, kept: int, normalise: bool
) -> None:
    s, bias = scores(300, n_experts), torch.randn(n_experts, generator=torch.Generator().manual_seed(1)) * 0.3
    with registry.forced("router_topk", variant):
        index, weight = router_topk(s, bias, top_k=k, groups=groups, groups_kept=kept, normalize=normalise, scale=2.5)
    for row in range(300):
        expected = plain_route(
            s[row].tolist(), bias.tolist(), k=k, groups=groups, kept=kept, normalise=normalise, scale=2.5
        )
        found = dict(zip(index[row].tolist(), weight[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_loads_are_counted_alike_on_every_device(padded: bool) -> None:
    index = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(n))[:3] for n in range(40)])
    valid = torch.arange(40) % 5 > 0 if padded else None
    found, right = _loads_unseen(index, valid, 8), _loads(index, valid, 8)
    assert found.dtype == right.dtype
    assert torch.equal(found, right)


def test_bias_changes_the_choice_but_never_the_weights() -> None:
    s = scores(200, 8)
    options = {"top_k": 3, "groups": 1, "groups_kept": 1, "normalize": False, "scale": 1.0}
    plain, _ = router_topk(s, torch.zeros(8), **options)
    bias = torch.tensor([5.0, -5.0, 0, 0, 0, 0, 0, 0])
    index, weight = router_topk(s, bias, **options)
    assert (index == 0).any(1).all()
    assert not (index == 1).any()
    assert not torch.equal(index.sort(1).values, plain.sort(1).values)
    assert torch.equal(weight, s.gather(1, index))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
def test_normalised_weights_sum_to_the_scale(seed: int, k: int) -> None:
    index, weight = router_topk(
        scores(20, 8, seed), torch.zeros(8), top_k=k, groups=1, groups_kept=1, normalize=True, scale=2.5
    )
    torch.testing.assert_close(weight.sum(1), torch.full((20,), 2.5))
    assert all(len(set(row)) == k for row in index.tolist())


def test_a_uniform_bias_changes_nothing() -> None:
    s = scores(50, 8)
    options = {"top_k": 2, "groups": 4, "groups_kept": 2, "normalize": True, "scale": 1.0}
    a, b = router_topk(s, torch.zeros(8), **options), router_topk(s, torch.full((8,), 0.5), **options)
    assert torch.equal(a[0], b[0])


def test_gradient_reaches_the_router_matrix_and_never_the_bias(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    model(torch.arange(20)[None]).sum().backward()
    for router in model.routers()[:-1]:
        assert router.weight.grad is not None
        assert router.weight.grad.abs().sum() > 0
        assert not router.e_score_correction_bias.requires_grad
    assert not any("e_score_correction_bias" in name for name, _ in model.named_parameters())
    assert any("e_score_correction_bias" in name for name in model.state_dict())


def test_scores_are_fp32_for_a_bf16_model(tiny_config: ModelConfig) -> None:
    router = Router(tiny_config, dtype=torch.bfloat16)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, tiny_config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, weight = router(x, rows=1, stats=None)
    assert weight.dtype == torch.float32
    exact = (x.float() @ router.weight.float().t()).sigmoid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index, mixed = router(x.float(), rows=1, stats=None)
    chosen = exact.gather(1, index)
    torch.testing.assert_close(mixed, chosen / chosen.sum(1, keepdim=True) * 2.5)


def plain_sequence_loss(s: torch.Tensor, valid: torch.Tensor, k: int) -> float:
    """DeepSeek-V3 eq. 17 to 20, one sequence after another."""
    total, n_experts = 0.0, s.shape[-1]
    for row in range(s.shape[0]):
        tokens = s[row][valid[row]]
        best = [set(t.topk(k).indices.tolist()) for t in tokens]
        for i in range(n_experts):
            f = n_experts / (k * len(tokens)) * sum(i in chosen for chosen in best)
            p = sum(float(t[i] / t.sum()) for t in tokens) / len(tokens)
            total += f * p
    return total / s.shape[0]


@pytest.mark.parametrize("padded", [False, True])
def test_sequence_loss_equals_the_formula_and_leaves_padding_out(padded: bool) -> None:
    s = scores(3 * 7, 6)
    valid = torch.ones(3, 7, dtype=torch.bool)
    stats = RouterStats()
    if padded:
        valid[1, 4:] = False
        valid[2, 1:] = False
        stats.valid_BT = valid
    index = (s + torch.randn(6, generator=torch.Generator().manual_seed(2))).topk(2).indices  # chosen with a bias
    stats.add(s, index, rows=3)
    assert float(stats.sequence_loss) == pytest.approx(plain_sequence_loss(s.view(3, 7, 6), valid, 2), rel=1e-5)
    counts = torch.bincount(index.view(3, 7, 2)[valid].flatten(), minlength=6)
    assert torch.equal(stats.counts_LE, counts[None])


def test_sequence_loss_of_an_even_load_is_one_per_layer() -> None:
    s = torch.full((4, 4), 0.1) + torch.eye(4) * 0.5
    stats = RouterStats()
    for _ in range(3):
        stats.add(s, s.topk(1).indices, rows=1)
    assert float(stats.sequence_loss) == pytest.approx(3.0)


def test_sequence_loss_pulls_scores_towards_balance(tiny_config: ModelConfig) -> None:
    s = (scores(16, 4) * torch.tensor([1.0, 0.2, 0.2, 0.2])).requires_grad_()
    stats = RouterStats()
    stats.add(s, s.topk(1).indices, rows=2)
    stats.sequence_loss.backward()
    assert s.grad is not None
    assert (s.grad[:, 0] > 0).all(), "the overloaded expert's score is pushed down"


def test_counts_cover_every_layer_and_every_valid_token(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    documents_BT = torch.tensor([[0] * 10, [1] * 6 + [-1] * 4])
    stats = RouterStats(sequence_balance=False)
    tokens_BT = torch.arange(20).view(2, 10)
    hidden = model(tokens_BT, documents_BT=documents_BT, stats=stats)
    assert model.mtp is not None
    model.mtp(hidden, tokens_BT, documents_BT=documents_BT, stats=stats)
    assert stats.counts_LE.shape == (len(model.routers()), tiny_config.n_routed_experts)
    assert (stats.counts_LE.sum(1) == 16 * tiny_config.num_experts_per_tok).all()
    assert stats.counts_LE.dtype == torch.int64
    assert not stats.counts_LE.requires_grad


def test_a_row_of_padding_only_does_not_spoil_the_mean() -> None:
    s = scores(2 * 5, 6)
    alone, both = RouterStats(), RouterStats()
    alone.add(s[:5], s[:5].topk(2).indices, rows=1)
    both.valid_BT = torch.tensor([[True] * 5, [False] * 5])
    both.add(s, s.topk(2).indices, rows=2)
    torch.testing.assert_close(both.sequence_loss, alone.sequence_loss)
