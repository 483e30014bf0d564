"""PEFT loads the adapters that we save onto transformers' model, and computes what we compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.lora import LoraSpec
from glmctl.training.lora import add_lora, save_adapter


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("attention",), ("attention", "experts")])
def test_peft_computes_the_logits_of_our_adapter(
    targets: tuple, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = GlmMoe(tiny_config, seed=0)
    save_model(model, base)
    tiny_tokenizer.save(base)
    spec = LoraSpec(rank=4, alpha=12, targets=targets, export="adapter")
    add_lora(model, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapter.mkdir()
    save_adapter(model, spec, adapter, base)

    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(40).view(2, 20) * 11 % 500
    with torch.no_grad():
        plain = theirs(tokens).logits
        adapted = PeftModel.from_pretrained(theirs, adapter)(tokens).logits
        ours = model.logits(model(tokens))
    assert (adapted - plain).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(ours, adapted, rtol=0, atol=1e-5)
