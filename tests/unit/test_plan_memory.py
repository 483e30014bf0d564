"""The plan's memory against torch: what autograd keeps, every live tensor of a training step, and exact counts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from glmctl.data.batches import Batch
from glmctl.kernels import registry
from glmctl.kernels.fused.library import library
from glmctl.model.attention import WholeRows
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe, RouterStats
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.derive import memory as model_bytes
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.run.plan import activations
from glmctl.run.plan.memory import Layout, Work, moments, peak
from glmctl.run.plan.shape import layer_runs, muon_shapes
from glmctl.run.plan.step_time import trained_flops
from glmctl.training.loss import LossModule
from glmctl.training.optim import BATCH_ELEMENTS, build_optimizer, logical_matrices
from glmctl.training.step import Stepper

# attention that is not compiled keeps other things; so do machines without a compiler
compiled = pytest.mark.skipif(library() is None, reason="the compiled passes cannot be built on this machine")


def kept(model: GlmMoe, run: Callable[[], Any], *without: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd saves while `run` runs, weights and `without` left out."""
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *without]}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@compiled
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_a_layer_keeps_what_the_plan_says(family_config: ModelConfig, layer: int) -> None:
    """To the byte a token, but for a few numbers a sequence."""
    c, rows, length = family_config, 2, 64
    model = GlmMoe(c, seed=0)
    x_BTD = torch.randn(rows, length, c.hidden_size, requires_grad=True)
    shared = model._share(torch.arange(length).expand(rows, length), WholeRows(), None, RouterStats())
    tables = (shared.turn.cos_BT1d, shared.turn.sin_BT1d, shared.turn.swap_dd)
    seen = kept(model, lambda: model.layers[layer](x_BTD, shared), *tables)
    if c.is_moe(layer):
        # the sorted order of assignments is no tensor of the graph's, but lives as long
        seen += rows * length * 3 * c.num_experts_per_tok * 8
    scores = activations.whole_scores(c, "cpu", length)
    planned = rows * length * activations.layer_kept(c, c.is_moe(layer), 4, scores=scores)
    assert planned <= seen <= planned + rows * length


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages made while it is active that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._add(leaf.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self.now += size
        self._known[key] = weakref.ref(storage, gone)


STEP: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "muon": ({}, {}),
    "adamw": ({}, {"optimizer": AdamWSpec()}),
    "micro-batches": ({}, {"rows": 1, "micro_batches": 4}),
    "recompute": ({}, {"recompute": True}),
    "without mtp": ({}, {"mtp": False}),
    "vocabulary": ({"vocab_size": 16384}, {"rows": 1}),
    "tied": ({"vocab_size": 16384, "tie_word_embeddings": True}, {"rows": 1}),
    "experts": ({"n_routed_experts": 48}, {"rows": 1, "optimizer": AdamWSpec()}),
}


@compiled
@pytest.mark.parametrize("name", STEPS)
def test_the_largest_moment_of_a_step(name: str) -> None:
    """Every tensor that the real stepper makes is watched. 4%: gradients of a layer come one after the other, where
    the plan has them at once."""
    fields, settings = STEPS[name]
    work = Work(ModelConfig(**{**STEP, **fields}), **{"optimizer": MuonSpec(), "rows": 4, "length": 128, **settings})
    rows = work.rows * work.micro_batches
    tokens = torch.randint(0, 2048, (rows, work.length), generator=torch.Generator().manual_seed(0))
    accelerator = make_accelerator()
    with LiveTensors() as live:
        model = GlmMoe(work.config, seed=0)
        model.recompute = work.recompute
        stepper = Stepper(model, build_optimizer(model, work.optimizer), accelerator, grad_clip=1.0)
        places = torch.arange(work.length).expand(rows, work.length).contiguous()
        batch = Batch(tokens, places, torch.zeros_like(tokens), tokens.clone(), tokens.clone(), tokens.clone())
        for _ in range(2):
            # optimizer state is there from the second step on
            live.most = live.now
            stepper.lm_step(batch.split(work.rows), lr=1e-3, mtp_weight=0.3 * work.mtp, sequence_loss_weight=1e-4)
    planned = peak([moment for moment in moments(work) if moment.name != "save"])
    assert planned.total == pytest.approx(live.most, rel=0.04)


def check_counts(config: ModelConfig) -> None:
    """Layers add up to the config's counts; Muon's matrices are those of the optimizer on the real network."""
    counts, spec = config.parameter_counts(), MuonSpec()
    runs = layer_runs(config, mtp=True)
    assert sum(run.layers * run.part.total for run in runs if not run.mtp) + config.hidden_size == counts.main
    assert sum(run.layers * run.part.total for run in runs if run.mtp) == counts.mtp
    shapes: Counter[tuple[int, int]] = Counter()
    muon = build_optimizer(GlmMoe(config, device="meta"), spec).muon
    assert muon is not None
    for name, parameter in muon.named.items():
        for part in logical_matrices(name, parameter, muon.rows.get(name)):
            n, a, b = part.flatten(1, -2).shape
            shapes[min(a, b), max(a, b)] += n
    assert muon_shapes(config, spec) == shapes
    elements = sum(a * b * n for (a, b), n in shapes.items())
    assert model_bytes(config, spec)["bytes_optimizer"] == 4 * (2 * counts.total - elements)


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_are_exact_at_real_size(preset: str) -> None:
    check_counts(ModelConfig.model_validate(PRESETS[preset]))


def test_counts_are_exact(family_config: ModelConfig) -> None:
    check_counts(family_config)


def test_flops_of_a_trained_token_are_those_torch_counts(family_config: ModelConfig) -> None:
    """Forward and backward of the loss module. torch's counter knows no causality: each token sees the whole row."""
    c, rows, length = family_config, 2, 16
    model = GlmMoe(c, seed=0)
    tokens = torch.randint(0, c.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    places = torch.arange(length).expand(rows, length)
    batch = Batch(tokens, places, torch.zeros_like(tokens), tokens, tokens, tokens)
    as_defined = (registry.forced("rope", "reference"), registry.forced("linear_cross_entropy", "reference"))
    in_torch = patch("glmctl.kernels.fused.attention.usable", return_value=False)
    with (
        in_torch,
        as_defined[0],
        as_defined[1],
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        losses = LossModule(model)(batch, True, True)
        (losses.main + losses.mtp + losses.balance).backward()
    # trained_flops counts (T + 1) / 2 positions a token, as causality has it
    work = Work(c, MuonSpec(), rows=rows, length=2 * length - 1)
    assert counter.get_total_flops() == rows * length * trained_flops(work)


def test_constants_are_the_trainers() -> None:
    from glmctl.engine.engine import CACHE_BYTES
    from glmctl.kernels.linear_cross_entropy import _CHUNK
    from glmctl.rl.rollout import MAX_SLOTS
    from glmctl.run.plan import memory, training

    assert memory.NEWTON_SCHULZ_ELEMENTS == BATCH_ELEMENTS
    assert memory.CACHE_BYTES == CACHE_BYTES
    assert training.ROLLOUTS_AT_ONCE == MAX_SLOTS
    assert {"cpu": memory.LOGITS_ROWS["cpu"], "cuda": memory.LOGITS_ROWS_ELSEWHERE} == _CHUNK


def test_parts_divide_and_add_up() -> None:
    config = ModelConfig.model_validate(PRESETS["glm-4.5"])
    work = Work(config, MuonSpec(), rows=1, length=4096, recompute=True, precision="bf16", device="h100")
    alone, divided = (peak(moments(work, Layout(shard=n, expert=min(n, 8)), runtime=2e9)) for n in (1, 256))
    for part in ("weights", "optimizer"):
        assert divided.parts[part] == alone.parts[part] / 256
    assert divided.total == sum(divided.parts.values())
    halved = peak(moments(work, Layout(shard=256, expert=8, context=2), runtime=2e9))
    assert halved.parts["activations"] < 0.6 * divided.parts["activations"]
