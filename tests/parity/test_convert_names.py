"""Other layouts of the same weights: PEFT's LoRA adapters merged, Megatron's fused matrices there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4MoeForCausalLM

from glmctl.convert.megatron import from_megatron, table, to_megatron
from glmctl.convert.run import run as convert
from glmctl.convert.source import open_model
from glmctl.convert.stored import equal
from glmctl.convert.verify import compare
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run.directory import Run


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "model"
    model = GlmMoe(tiny_config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_model(model, path)
    return path


def to(source: Path, target: Path, **fields: Any) -> tuple[dict[str, Any], Path]:
    run = Run.open(ConvertRecipe(name="c", source=str(source), **fields), target)
    try:
        return convert(run.recipe, run), run.export
    finally:
        run.close()


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": False, "use_qk_norm": False}, {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}],
)
def test_megatron_there_and_back_is_every_tensor(
    tiny_config: ModelConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_model(GlmMoe(tiny_config.model_copy(update=changes), seed=0), tmp_path / "m")
    model = open_model(tmp_path / "m")
    there = to_megatron(model.config, model.tensors)
    back = from_megatron(model.config, there)
    copies = {
        name for name in model.tensors if name.endswith(("layers.3.embed_tokens.weight", "shared_head.head.weight"))
    }
    assert back.keys() == model.tensors.keys() - copies
    for name, tensor in back.items():
        assert tensor.shape == model.tensors[name].shape, name
        assert equal(tensor, model.tensors[name]), name
    assert sum(tensor.nbytes for tensor in there.values()) == sum(tensor.nbytes for tensor in back.values())
    assert len({row.megatron for row in table(model.config)}) == len(there)


def test_a_megatron_folder_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    summary, megatron = to(folder, tmp_path / "a", to="megatron", shard_bytes=20_000)
    assert summary["identical"] is True
    summary, _ = to(megatron, tmp_path / "b")
    assert summary["identical"] is True
    assert compare(folder, tmp_path / "b").identical


def test_megatron_stacks_each_kv_group(folder: Path) -> None:
    """[2 query heads, k, v] for each of 2 groups: Megatron-Bridge's order."""
    model = open_model(folder)
    q, k, v = (model.tensors[f"model.layers.1.self_attn.{x}_proj.weight"].whole() for x in "qkv")
    expected = torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]])
    there = to_megatron(model.config, model.tensors)
    assert torch.equal(there["decoder.layers.1.self_attention.linear_qkv.weight"].whole(), expected)
    assert there["decoder.layers.1.self_attention.linear_qkv.bias"].shape == (128,)
    gate, up = (model.tensors[f"model.layers.3.mlp.experts.5.{x}_proj.weight"].whole() for x in ("gate", "up"))
    name = "mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight5"
    assert torch.equal(there[name].whole(), torch.cat([gate, up]))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merged_adapter_is_what_peft_merges(folder: Path, tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    base = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "o_proj"])
    adapted = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens_BT = torch.arange(40)[None]
    with torch.inference_mode():
        expected = adapted(tokens_BT).logits
    _, merged = to(folder, tmp_path / "c", adapter=str(tmp_path / "adapter"))
    model = load_model(merged)
    with torch.inference_mode():
        found = model.logits(model(tokens_BT))
        plain = load_model(folder)
        assert not torch.allclose(plain.logits(plain(tokens_BT)), expected, atol=0.1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_adapters_that_cannot_be_merged(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    body = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for number, (key, value) in enumerate({"use_dora": True, "r": 3, "bias": "all", "lora_alpha": None}.items()):
        adapter = Path(shutil.copytree(tmp_path / "a", tmp_path / f"a{number}"))
        (adapter / "adapter_config.json").write_text(json.dumps({**body, key: value}))
        with pytest.raises(DataError):
            to(folder, tmp_path / f"c{number}", adapter=str(adapter))
