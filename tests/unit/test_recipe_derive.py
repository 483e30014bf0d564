"""Derived values are what the run will do: the plan's steps, the network's parameters, the optimizers' elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.derive import derived, memory, parameters, rope_thetas, stage_steps
from glmctl.recipe.load import list_recipes, load
from glmctl.recipe.schema import AdamWSpec, BatchRamp, MuonSpec, PretrainRecipe, TrainStage
from glmctl.training.optim import build_optimizer
from glmctl.training.plan import plan_steps


@pytest.mark.parametrize("entry", list_recipes(), ids=lambda entry: entry.name)
def test_every_shipped_recipe_has_its_derived_values(entry) -> None:
    assert isinstance(derived(load(entry.name)), dict)


@pytest.mark.parametrize(
    ("name", "named", "mtp", "active"),
    [("glm-4.5", 355.2e9, 3.99e9, 32.1e9), ("glm-4.5-air", 108.0e9, 2.38e9, 12.2e9)],
)
def test_released_models_have_their_published_sizes(name: str, named: float, mtp: float, active: float) -> None:
    counts = derived(load(name, expect="pretrain"))
    assert counts["parameters_named"] == pytest.approx(named, rel=5e-4)
    assert counts["parameters_mtp"] == pytest.approx(mtp, rel=5e-3)
    assert counts["parameters_active"] == pytest.approx(active, rel=5e-3)
    assert counts["tokens"] == 23_100_000_000_000


@given(
    lengths=st.lists(st.sampled_from([16, 32, 128]), min_size=1, max_size=3),
    tokens=st.lists(st.integers(1, 20_000), min_size=3, max_size=3),
    start=st.integers(1, 400),
    end=st.integers(1, 900),
    ramp=st.integers(0, 5_000),
)
@settings(max_examples=60, deadline=None)
def test_steps_are_those_of_the_training_plan(lengths, tokens, start: int, end: int, ramp: int) -> None:
    stages = [
        TrainStage(name=f"s{i}", data="d", tokens=count, sequence_length=length)
        for i, (length, count) in enumerate(zip(lengths, tokens, strict=False))
    ]
    batch = BatchRamp(start_tokens=start, tokens=end, ramp_tokens=ramp)
    recipe = PretrainRecipe(name="x", model=ModelConfig(), tokenizer="t", stages=stages, batch=batch)
    planned = plan_steps(recipe)
    assert stage_steps(recipe) == [sum(step.stage == i for step in planned) for i in range(len(stages))]


@pytest.mark.parametrize("spec", [MuonSpec(), MuonSpec(head="muon"), AdamWSpec()], ids=["muon", "muon-head", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_what_the_optimizer_keeps(tiny_config: ModelConfig, spec: MuonSpec | AdamWSpec, tied: bool) -> None:
    config = tiny_config.model_copy(update={"tie_word_embeddings": tied})
    model = GlmMoe(config, seed=0)
    optimizer = build_optimizer(model, spec, lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # AdamW's step counters are scalars
    state = [value for value in optimizer.state_tensors().values() if value.dim() > 0]
    found = memory(config, spec)
    assert found["bytes_weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert found["bytes_weights"] == parameters(config)["parameters"] * 4
    assert found["bytes_optimizer"] == sum(value.numel() * 4 for value in state)
    assert found["bytes_training"] == 2 * found["bytes_weights"] + found["bytes_optimizer"]


def test_rope_base_stays_until_a_stage_changes_it() -> None:
    recipe = load("glm-4.5", expect="pretrain")
    assert isinstance(recipe, PretrainRecipe)
    assert rope_thetas(recipe) == [1e4, 1e4, 1e6, 1e6, 1e6]


def test_other_types_say_what_they_will_do() -> None:
    rl = derived(load("demo/rl-reasoning", ["steps=10", "prompts_per_step=4", "group_size=8"]))
    assert (rl["rollouts_per_step"], rl["rollouts"]) == (32, 320)
    sft = derived(load("demo/sft-agent", ["steps=10", "batch_tokens=1024", "sequence_length=256"]))
    assert (sft["tokens"], sft["sequences_per_step"]) == (10_240, 4)
