"""Adapters: the start is the base, only they are trained, merged and unmerged are one model, the files say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmctl.convert.lora import merge_lora
from glmctl.convert.source import open_model
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe
from glmctl.recipe.lora import LoraSpec
from glmctl.recipe.schema import AdamWSpec
from glmctl.training.lora import adapter_tensors, add_lora, merge_adapters, save_adapter
from glmctl.training.optim import build_optimizer

SPEC = LoraSpec(rank=3, alpha=6)
TOKENS = torch.arange(24).view(2, 12) * 7 % 500


def trained(config: ModelConfig, spec: LoraSpec = SPEC) -> GlmMoe:
    """A model whose adapters are no longer zero."""
    model = GlmMoe(config, seed=0)
    add_lora(model, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def logits(model: GlmMoe) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS))


def test_a_fresh_adapter_changes_nothing(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    before = logits(model)
    add_lora(model, SPEC, seed=1)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("targets", [("attention",), ("experts",), ("attention", "experts")])
def test_only_adapters_of_the_named_parts_learn(tiny_config: ModelConfig, targets: tuple) -> None:
    model = trained(tiny_config, SPEC.model_copy(update={"targets": targets}))
    optimizer = build_optimizer(model, AdamWSpec())
    assert optimizer.named
    assert all("lora_" in name for name in optimizer.named)
    places = {"attention" if ".self_attn." in name else "experts" for name in optimizer.named}
    assert places == set(targets)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in optimizer.named}
    model.logits(model(TOKENS)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in optimizer.named.values())
    optimizer.set_lr(0.1)
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_merged_equals_unmerged(family_config: ModelConfig) -> None:
    model = trained(family_config)
    names = set(GlmMoe(model.config).state_dict())
    before, said = logits(model), generate(model, [1, 2, 3], 8, stop_ids=())
    merge_adapters(model)
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    assert (logits(GlmMoe(model.config, seed=0)) - before).abs().max() > 1e-4, "the adapters do something"
    # with a cache too: MLA continues one by another path than it trains on
    assert generate(model, [1, 2, 3], 8, stop_ids=()) == said


def test_a_kept_adapter_merged_by_convert_is_the_merged_model(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(GlmMoe(tiny_config, seed=0), base)
    tiny_tokenizer.save(base)
    adapter.mkdir()
    model = trained(tiny_config)
    save_adapter(model, SPEC, adapter, base)
    assert (adapter / "tokenizer.json").is_file()
    merge_adapters(model)
    save_model(model, tmp_path / "merged")
    ours, theirs = open_model(tmp_path / "merged"), merge_lora(open_model(base), adapter)
    for name, stored in ours.tensors.items():
        torch.testing.assert_close(
            theirs.tensors[name].whole(), stored.whole(), msg=lambda text, of=name: f"{of}: {text}"
        )
    assert load_model(tmp_path / "merged").config == model.config


def test_the_mtp_layer_has_no_adapter(tiny_config: ModelConfig) -> None:
    model = trained(tiny_config)
    assert model.mtp is not None
    assert not any("lora_" in name for name, _ in model.mtp.named_parameters())
    layers = {name.split(".")[4] for name in adapter_tensors(model)}
    assert layers == {str(at) for at in range(tiny_config.num_hidden_layers)}


def test_an_adapter_that_no_file_can_hold_is_refused(family_config: ModelConfig) -> None:
    if family_config.attention != "mfa":
        pytest.skip("its files have a name for every expert")
    with pytest.raises(RecipeError, match=r"lora\.export"):
        add_lora(GlmMoe(family_config, seed=0), SPEC.model_copy(update={"export": "adapter"}), seed=0)
