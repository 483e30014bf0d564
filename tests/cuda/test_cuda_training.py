"""The whole model on CUDA: a CPU's losses and gradients, and settings that must not change what is learnt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glmctl.data.batches import Batch
from glmctl.kernels import registry
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training.loss import LossModule
from glmctl.training.optim import build_optimizer
from glmctl.training.step import StepMetrics, Stepper

pytestmark = pytest.mark.cuda

STEPS = 20
Packed = Callable[..., Batch]


def losses_and_gradients(
    config: ModelConfig, batch: Batch, where: torch.device
) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    model = GlmMoe(config, device=where, seed=0)
    mtp = model.mtp is not None
    found = LossModule(model)(batch.to(where), mtp, True, 1e-4)
    (found.main + 0.3 * found.mtp + found.balance).backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return [part.item() for part in found[:3]], found.counts_LE.cpu(), gradients


@pytest.mark.parametrize("whole_rows", [False, True], ids=["packed", "whole rows"])
def test_losses_and_gradients_are_those_of_a_cpu(
    family_config: ModelConfig, whole_rows: bool, packed: Packed, device: torch.device, observe: Callable[..., None]
) -> None:
    """fp32, every architecture of the family. Sums in another order move a gradient by some 1e-6 of the largest."""
    batch = packed(3)
    if whole_rows:
        rows = [torch.zeros_like(batch.documents_BT), torch.arange(96).expand(4, 96)]
        batch = Batch(batch.tokens_BT, rows[1], rows[0], batch.targets_BT, batch.mtp_tokens_BT, batch.mtp_targets_BT)
    right = losses_and_gradients(family_config, batch, torch.device("cpu"))
    found = losses_and_gradients(family_config, batch, device)
    assert found[0] == pytest.approx(right[0], rel=2e-5)
    assert torch.equal(found[1], right[1]), "another expert was chosen"
    assert found[2].keys() == right[2].keys()
    worst = 0.0
    for name, gradient in right[2].items():
        off = float((found[2][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6))
        worst = max(worst, off)
        assert off < 2e-4, f"{name}: {off:.1e}"
    observe(worst=worst)


def train(
    config: ModelConfig,
    packed: Packed,
    device: torch.device,
    *,
    precision: str = "fp32",
    spec: MuonSpec | AdamWSpec | None = None,
    micro_rows: int = 8,
    recompute: bool = False,
    compiled: bool = False,
    steps: int = STEPS,
) -> tuple[list[StepMetrics], GlmMoe]:
    """Steps over four batches again and again, as pretraining makes them."""
    model = GlmMoe(config, device=device, seed=0)
    model.recompute = recompute
    accelerator = make_accelerator(precision)  # type: ignore[arg-type]
    stepper = Stepper(model, build_optimizer(model, spec or MuonSpec()), accelerator, grad_clip=1.0)
    with registry.compiled_small(compiled, device):
        found = [
            stepper.lm_step(
                packed(step % 4, 8).split(micro_rows),
                lr=3e-3,
                mtp_weight=0.3,
                sequence_loss_weight=1e-4,
                bias_update_rate=1e-3,
            )
            for step in range(steps)
        ]
    return found, model


def curve(found: list[StepMetrics]) -> list[float]:
    return [one.loss for one in found]


def furthest(a: list[StepMetrics], b: list[StepMetrics]) -> float:
    return max(abs(x - y) / y for x, y in zip(curve(a), curve(b), strict=True))


def same_bits(a: GlmMoe, b: GlmMoe) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_the_same_twice(
    config: ModelConfig, packed: Packed, device: torch.device, observe: Callable[..., None]
) -> None:
    """Whether two trainings are the same bits is observed; torch's attention may add gradients in any order."""
    for precision in ("fp32", "bf16"):
        (a, one), (b, other) = (train(config, packed, device, precision=precision, steps=8) for _ in range(2))
        observe(precision=precision, same_bits=same_bits(one, other), furthest=furthest(a, b))
        # a changed bit may send a token to another expert, in bf16 sooner
        assert furthest(a, b) < (1e-4 if precision == "fp32" else 2e-2)


def test_deterministic_algorithms_make_training_the_same_bits(
    config: ModelConfig, packed: Packed, device: torch.device, observe: Callable[..., None]
) -> None:
    """With torch.use_deterministic_algorithms nothing that a step does is refused, and two runs are the same."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for precision in ("fp32", "bf16"):
            (a, one), (b, other) = (train(config, packed, device, precision=precision, steps=8) for _ in range(2))
            observe(precision=precision, same_bits=same_bits(one, other), furthest=furthest(a, b))
            assert same_bits(one, other)
    finally:
        torch.use_deterministic_algorithms(False)


def test_bf16_learns_as_fp32_does(
    config: ModelConfig, packed: Packed, device: torch.device, observe: Callable[..., None]
) -> None:
    """Finite, falling, and near fp32: bf16 products under fp32 weights."""
    (exact, _), (rounded, _) = (train(config, packed, device, precision=p) for p in ("fp32", "bf16"))
    assert all(torch.isfinite(torch.tensor([one.loss, one.mtp_loss, one.grad_norm])).all() for one in rounded)
    assert not any(one.skipped for one in rounded)
    observe(fp32=curve(exact), bf16=curve(rounded))
    assert curve(rounded)[-1] < curve(rounded)[0] - 0.5
    assert furthest(rounded, exact) < 0.03


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", [MuonSpec(), AdamWSpec()], ids=["muon", "adamw"])
def test_one_row_at_a_time_or_eight(
    precision: str,
    spec: MuonSpec | AdamWSpec,
    config: ModelConfig,
    packed: Packed,
    device: torch.device,
    observe: Callable[..., None],
) -> None:
    (whole, _), (cut, _) = (
        train(config, packed, device, precision=precision, spec=spec, micro_rows=n, steps=8) for n in (8, 1)
    )
    observe(furthest=furthest(cut, whole), first=[cut[0].grad_norm, whole[0].grad_norm])
    exact = precision == "fp32"
    assert cut[0].loss == pytest.approx(whole[0].loss, rel=1e-5 if exact else 2e-3)
    assert cut[0].grad_norm == pytest.approx(whole[0].grad_norm, rel=1e-4 if exact else 3e-2)
    assert furthest(cut, whole) < (1e-3 if exact else 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_or_kept(
    precision: str, config: ModelConfig, packed: Packed, device: torch.device, observe: Callable[..., None]
) -> None:
    (kept, one), (again, other) = (
        train(config, packed, device, precision=precision, recompute=r, steps=8) for r in (False, True)
    )
    observe(same_bits=same_bits(one, other), furthest=furthest(again, kept))
    assert again[0].loss == kept[0].loss
    assert torch.equal(again[0].counts_LE, kept[0].counts_LE)
    assert again[0].grad_norm == pytest.approx(kept[0].grad_norm, rel=1e-5 if precision == "fp32" else 1e-2)
    assert furthest(again, kept) < (1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_or_not(
    precision: str,
    recompute: bool,
    config: ModelConfig,
    packed: Packed,
    device: torch.device,
    observe: Callable[..., None],
) -> None:
    (plain, _), (compiled, _) = (
        train(config, packed, device, precision=precision, recompute=recompute, compiled=c, steps=8)
        for c in (False, True)
    )
    observe(furthest=furthest(compiled, plain))
    assert compiled[0].loss == pytest.approx(plain[0].loss, rel=1e-5 if precision == "fp32" else 5e-3)
    assert furthest(compiled, plain) < (1e-3 if precision == "fp32" else 3e-2)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_the_largest_model_that_ships_for_a_laptop_trains(device: torch.device, observe: Callable[..., None]) -> None:
    """Rows of 2,048 tokens through heads of 64: the kernels that short rows do not reach."""
    if device.type == "cpu":
        pytest.skip("too much for a CPU")
    config = ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        max_position_embeddings=4096,
    )
    tokens = torch.randint(3, 8192, (4, 2049), generator=torch.Generator().manual_seed(0))
    tokens[:, 1::2] = (tokens[:, :-1:2] + 1) % 8192
    zeros, places = torch.zeros(4, 2048, dtype=torch.long), torch.arange(2048).expand(4, 2048)
    last = torch.cat([tokens[:, 2:], torch.full((4, 1), -100)], 1)
    batch = Batch(tokens[:, :-1], places, zeros, tokens[:, 1:], tokens[:, 1:], last)
    model = GlmMoe(config, device=device, seed=0)
    stepper = Stepper(model, build_optimizer(model, MuonSpec()), make_accelerator("bf16"), grad_clip=1.0)
    found = [stepper.lm_step([batch], lr=2e-3, mtp_weight=0.3, bias_update_rate=1e-3) for _ in range(6)]
    observe(losses=curve(found), peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    assert curve(found)[-1] < curve(found)[0] - 0.5
    assert not any(one.skipped for one in found)
