"""Which optimizer owns what, and a state that is plain tensors and continues exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training import optim
from glmctl.training.optim import MixedOptimizer, build_optimizer

MLA = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "attention": "mla",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def steps(model: nn.Module, optimizer: MixedOptimizer, seeds: range, lr: float = 0.02) -> None:
    for seed in seeds:
        fill_gradients(model, seed)
        optimizer.set_lr(lr)
        optimizer.step()
        optimizer.zero_grad()


def test_muon_takes_every_matrix_but_embedding_and_head(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    assert optimizer.muon is not None
    rest = set(optimizer.named) - set(optimizer.muon.named)
    assert {name for name in rest if model.get_parameter(name).dim() >= 2} == {"embed_tokens.weight", "lm_head.weight"}
    assert any(name.endswith("mlp.gate.weight") for name in optimizer.muon.named), "routers get Muon by implication"
    assert any("experts.gate_up_proj" in name for name in optimizer.muon.named)
    assert all(model.get_parameter(name).dim() >= 2 for name in optimizer.muon.named)
    with_head = build_optimizer(model, MuonSpec(head="muon"))
    assert with_head.muon is not None
    assert "lm_head.weight" in with_head.muon.named
    assert len(optimizer.parameters()) == len(list(model.parameters()))


@pytest.mark.parametrize("spec", [MuonSpec(), AdamWSpec()])
def test_a_restored_state_continues_bit_for_bit(tiny_config: ModelConfig, spec: MuonSpec | AdamWSpec) -> None:
    straight = GlmMoe(tiny_config, seed=0)
    optimizer = build_optimizer(straight, spec)
    steps(straight, optimizer, range(3))
    saved, state = weights(straight), {k: v.clone() for k, v in optimizer.state_tensors().items()}
    steps(straight, optimizer, range(3, 6))

    resumed = GlmMoe(tiny_config, seed=9)
    resumed.load_state_dict(saved, strict=False)
    again = build_optimizer(resumed, spec)
    again.load_state_tensors(state)
    steps(resumed, again, range(3, 6))
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name
    for name, value in optimizer.state_tensors().items():
        assert torch.equal(value, again.state_tensors()[name]), name


def test_state_is_flat_and_named_by_parameter(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    assert optimizer.state_tensors() == {}
    steps(model, optimizer, range(1))
    state = optimizer.state_tensors()
    assert "muon.momentum.layers.1.mlp.experts.down_proj" in state
    assert {f"adamw.{key}.norm.weight" for key in ("step", "exp_avg", "exp_avg_sq")} <= set(state)
    assert len(state) == len(optimizer.muon.named) + 3 * (len(optimizer.named) - len(optimizer.muon.named))  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["unknown", "shape", "missing", "kind"])
def test_a_state_that_does_not_fit_is_refused_by_name(tiny_config: ModelConfig, what: str) -> None:
    model = GlmMoe(tiny_config, seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    steps(model, optimizer, range(1))
    state = optimizer.state_tensors()
    if what == "unknown":
        name = "muon.momentum.layers.99.q"
        state[name] = torch.zeros(2, 2)
    elif what == "shape":
        name = "adamw.exp_avg.norm.weight"
        state[name] = torch.zeros(3)
    elif what == "missing":
        name = "exp_avg_sq"
        del state["adamw.exp_avg_sq.norm.weight"]
    else:
        name = "sgd.momentum.norm.weight"
        state[name] = torch.zeros(3)
    with pytest.raises(DataError) as caught:
        build_optimizer(model, MuonSpec()).load_state_tensors(state)
    assert name in caught.value.message


def test_a_parameter_without_gradient_keeps_its_value(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    before = weights(model)
    optimizer = build_optimizer(model, MuonSpec())
    fill_gradients(model, 0)
    assert model.mtp is not None
    for parameter in model.mtp.parameters():
        parameter.grad = None
    optimizer.set_lr(0.1)
    optimizer.step()
    after = weights(model)
    assert all(torch.equal(after[n], before[n]) == n.startswith("mtp.") for n in before)


def test_cutting_the_batch_of_matrices_changes_nothing(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for elements in (optim.BATCH_ELEMENTS, 5000, 1):
        monkeypatch.setattr(optim, "BATCH_ELEMENTS", elements)
        model = GlmMoe(tiny_config, seed=0)
        steps(model, build_optimizer(model, MuonSpec()), range(2))
        results.append(weights(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6, msg=name)


def test_each_logical_matrix_of_mla_moves_as_it_would_alone() -> None:
    """Keys and values of all heads share a parameter, row by row in turn, and the latent one with the rotated key."""
    config = ModelConfig.model_validate(MLA)
    model = GlmMoe(config, seed=0)
    H, n, v, rank = 4, 12, 16, 32
    rows = torch.arange(H * (n + v)).view(H, n + v)
    parts = {
        "kv_b_proj": [rows[:, :n].flatten(), rows[:, n:].flatten()],
        "kv_a_proj_with_mqa": [torch.arange(rank), torch.arange(rank, rank + 8)],
    }
    before = weights(model)
    fill_gradients(model, 5)
    spec = MuonSpec(weight_decay=0.0)
    optimizer = build_optimizer(model, spec)
    optimizer.set_lr(0.02)
    optimizer.step()
    for name, pieces in parts.items():
        full = f"layers.1.self_attn.{name}.weight"
        parameter = model.get_parameter(full)
        assert parameter.grad is not None
        assert sorted(torch.cat(pieces).tolist()) == list(range(len(parameter)))
        for piece in pieces:
            alone = nn.Module()
            alone.register_parameter("weight", nn.Parameter(before[full][piece].clone()))
            alone.weight.grad = parameter.grad[piece].clone()
            own = build_optimizer(alone, spec)
            own.set_lr(0.02)
            own.step()
            # in one batch with others of its shape, whose sums may be taken in another order
            torch.testing.assert_close(parameter[piece], alone.weight, rtol=0, atol=1e-6)
            moved = parameter[piece].detach() - before[full][piece]
            assert float(moved.square().mean().sqrt() / 0.02) == pytest.approx(0.2, rel=0.25), "RMS of each part"
