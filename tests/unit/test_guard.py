"""Bad steps, background checkpoints and recomputation: what they must never change, and what they must always say."""

from __future__ import annotations

import json
import math
import random
import threading
from pathlib import Path

import pytest
import torch

from glmctl.data.batches import pad_batch
from glmctl.errors import DivergedError, EnvironmentProblem
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.run.metrics import MetricsLog
from glmctl.training import checkpoint
from glmctl.training.ceiling import flops_per_token, matmul_ceiling
from glmctl.training.guard import SETTLED, WINDOW, StepGuard
from glmctl.training.loss import LossModule
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper


def settled(factor: float | None = 10.0, log: MetricsLog | None = None) -> StepGuard:
    guard = StepGuard(factor, log)
    for i in range(SETTLED):
        guard.applied(2.0 + 0.01 * i, 1.0 + 0.1 * (i % 3))
    return guard


def test_a_spike_needs_both_a_large_gradient_and_a_jump_in_loss() -> None:
    guard = settled()
    assert guard.verdict(2000.0, 1000.0) == "spike"
    assert guard.verdict(4.0, 2.0) is None, "harder data"
    assert guard.verdict(2.0, 1000.0) is None, "clipping bounds it"
    assert settled(None).verdict(2000.0, 1000.0) is None
    assert StepGuard(10.0).verdict(2000.0, 1000.0) is None, "the first gradients are the largest"
    for loss, norm in ((math.nan, 1.0), (2.0, math.inf), (None, math.nan)):
        assert settled(None).verdict(loss, norm) == "not finite"


def at_a_border(guard: StepGuard, losses: int = WINDOW) -> StepGuard:
    """`losses` steps at the end of a long stage, as many in the guard as it keeps."""
    guard.enter(0)
    for _ in range(losses):
        assert guard.verdict(1.6, 0.08) is None
        guard.applied(1.6, 0.08)
    return guard


def resumed(guard: StepGuard) -> StepGuard:
    other = StepGuard(guard.spike_factor)
    other.load_state(json.loads(json.dumps(guard.state())))
    return other


def test_the_first_steps_of_a_new_stage_are_no_spikes_also_after_a_resume() -> None:
    """Longer rows and another RoPE base: more loss and more gradient, for as long as the model needs."""
    for guard in (at_a_border(StepGuard(10.0)), resumed(at_a_border(StepGuard(10.0)))):
        assert guard.verdict(2.7, 0.9) == "spike", "in the same stage it would be one"
        guard.enter(1)
        assert guard.verdict(2.7, 0.9) is None
        assert guard.verdict(math.nan, 0.9) == "not finite"
        guard.applied(2.7, 0.9)
        again = resumed(guard)
        again.enter(1)
        assert again.state() == guard.state(), "a resume inside the stage forgets nothing"
        for _ in range(SETTLED):
            again.enter(1)
            again.applied(2.6, 0.8)
        assert again.verdict(2000.0, 100.0) == "spike"


def test_skipped_steps_in_a_row_are_counted_across_a_border() -> None:
    guard = at_a_border(StepGuard(10.0))
    guard.skip("not finite", math.nan, 1.0, {})
    guard.enter(1)
    guard.skip("not finite", math.nan, 1.0, {})
    with pytest.raises(DivergedError, match="3 steps in a row"):
        guard.skip("not finite", math.nan, 1.0, {})


def test_a_loss_a_thousand_times_larger_never_reaches_the_weights(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """The batch is written down, the medians are not moved by it, and the third in a row stops with exit code 5."""
    model = GlmMoe(tiny_config, seed=0)
    log = MetricsLog(tmp_path / "skipped.jsonl")
    one = Stepper(
        model, build_optimizer(model, AdamWSpec()), make_accelerator(), grad_clip=1.0, guard=StepGuard(10.0, log)
    )
    batch = pad_batch([(list(range(3, 15)), [1] * 12)], pad_id=0)
    for _ in range(SETTLED):
        assert not one.lm_step([batch], lr=1e-3).skipped
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = one.guard.state()
    handle = model.norm.register_forward_hook(lambda _m, _i, out: -300 * out)
    for number in range(2):
        assert one.lm_step([batch], lr=1e-3, source={"step": number, "first_sequence": 7}).skipped
    with pytest.raises(DivergedError, match=r"skipped\.jsonl") as caught:
        one.lm_step([batch], lr=1e-3, source={"step": 2, "first_sequence": 8})
    handle.remove()
    assert caught.value.exit_code == 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    rows = log.rows()
    assert [row["first_sequence"] for row in rows] == [7, 7, 8]
    assert {row["reason"] for row in rows} == {"spike"}
    assert one.guard.state() == {**state, "skipped": 3, "skipped_in_row": 3}


def test_the_guards_state_survives_json_bit_for_bit() -> None:
    guard = settled()
    guard.applied(1 / 3, math.pi)
    other = StepGuard(10.0)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()


def test_recomputation_changes_no_bit_and_counts_no_load_twice(tiny_config: ModelConfig) -> None:
    rng = random.Random(0)
    rows = [([rng.randrange(512) for _ in range(n)], [1] * n) for n in (30, 17, 24)]
    batch = pad_batch(rows, pad_id=0)

    def run(recompute: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        model = GlmMoe(tiny_config, seed=0)
        model.recompute = recompute
        found = LossModule(model)(batch, True, True)
        (found.main + 0.3 * found.mtp + found.balance).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [found.main.detach(), found.mtp.detach(), found.balance.detach(), *grads], found.counts_LE

    plain, again = run(False), run(True)
    assert torch.equal(plain[1], again[1])
    assert len(plain[0]) == len(again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[0], again[0], strict=True))


def test_twenty_steps_with_recomputation_end_in_the_same_bits(tiny_config: ModelConfig) -> None:
    """Weights, router biases and optimizer state, through the compiled passes and packed rows."""

    def run(recompute: bool) -> dict[str, torch.Tensor]:
        rng = random.Random(1)
        model = GlmMoe(tiny_config, seed=0)
        model.recompute = recompute
        one = Stepper(model, build_optimizer(model, MuonSpec()), make_accelerator(), grad_clip=1.0)
        for _ in range(20):
            rows = [([rng.randrange(512) for _ in range(n)], [1] * n) for n in (20, 13, 24)]
            one.lm_step([pad_batch(rows, pad_id=0)], lr=5e-3, mtp_weight=0.3, bias_update_rate=1e-3)
        return {**checkpoint.model_tensors(model), **one.optimizer.state_tensors()}

    plain, again = run(False), run(True)
    assert plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


def test_z_loss_equals_its_definition(tiny_config: ModelConfig) -> None:
    from glmctl.kernels.linear_cross_entropy import linear_cross_entropy, reference

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (300,), generator=generator)
    ours, _ = linear_cross_entropy(hidden, weight, target, z_weight=0.01)
    exact = reference(hidden.double(), weight.double(), target, 0, 0.01)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    for a, b in zip(
        torch.autograd.grad(ours, [hidden, weight]), torch.autograd.grad(exact, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_snapshot_is_of_its_moment_whatever_training_does_meanwhile(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = GlmMoe(tiny_config, seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    value = model.norm.weight.detach().clone()
    go = threading.Event()
    writer = checkpoint.BackgroundWriter()
    taken = checkpoint.snapshot(model, optimizer, {"step": 3})

    def work() -> None:
        go.wait()
        checkpoint.write(tmp_path, taken)

    writer.submit(work)
    with torch.no_grad():
        model.norm.weight.fill_(9.0)
    assert not checkpoint.list_checkpoints(tmp_path), "the step does not wait for the disk"
    go.set()
    writer.wait()
    checkpoint.load_latest(tmp_path, model, optimizer)
    assert torch.equal(model.norm.weight, value)


def test_a_write_that_fails_is_raised_where_training_looks_next() -> None:
    def fail() -> None:
        raise EnvironmentProblem("disk full")

    for look in ("check", "wait", "submit"):
        writer = checkpoint.BackgroundWriter()
        writer.submit(fail)
        thread = writer._thread
        assert thread is not None
        thread.join()
        with pytest.raises(EnvironmentProblem, match="disk full"):
            getattr(writer, look)(*([lambda: None] if look == "submit" else []))
        writer.wait()


def test_retention_keeps_the_newest_and_every_nth_for_good(tiny_config: ModelConfig, tmp_path: Path) -> None:
    model = GlmMoe(tiny_config.model_copy(update={"hidden_size": 16, "vocab_size": 32}), seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    for step in range(1, 10):
        checkpoint.write(tmp_path, checkpoint.snapshot(model, optimizer, {"step": step}), keep=2, keep_every=4)
    assert sorted(checkpoint.list_checkpoints(tmp_path)) == [4, 8, 9]


def test_flops_are_those_of_the_counted_matrices() -> None:
    """6 for each element a token passes; tiny's value is the one of the design's table, 30.9 MFLOP at 512 tokens."""
    from glmctl.recipe.presets import PRESETS

    config = ModelConfig(**{**PRESETS["tiny"], "num_nextn_predict_layers": 0})
    assert flops_per_token(config, 512, mtp=False) == pytest.approx(30.9e6, rel=0.005)
    assert matmul_ceiling(repeats=1) > 1e8
