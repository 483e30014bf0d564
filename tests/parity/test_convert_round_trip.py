"""Conversion keeps every tensor bit for bit, the MTP layer included, and exports transformers' own format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import Glm4MoeForCausalLM

from glmctl.convert.run import run as convert
from glmctl.convert.stored import from_tensor
from glmctl.convert.verify import compare, tensor_sha256
from glmctl.errors import DataError, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import write_tensors
from glmctl.recipe.schema import ConvertRecipe, MuonSpec
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.training import checkpoint
from glmctl.training.optim import build_optimizer


@pytest.fixture
def model(tiny_config: ModelConfig) -> GlmMoe:
    model = GlmMoe(tiny_config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for router in model.routers():
            router.e_score_correction_bias.normal_(generator=generator)
    return model


def digests(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Every tensor of a folder as the safetensors library reads it: dtype, shape, SHA-256 of its bytes."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                result[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
    return result


def write_checkpoint(model: GlmMoe, folder: Path) -> Path:
    """As training writes it, without optimizer and random states, which conversion never reads."""
    with atomic.publish(folder) as temporary:
        write_tensors(temporary / "model.safetensors", model.state_dict().items())
        state = {"version": 1, "state": {"step": 7, "model": model.config.model_dump(mode="json")}}
        (temporary / "state.json").write_text(json.dumps(state))
    return folder


def run_recipe(path: Path, **fields: Any) -> tuple[dict[str, Any], Path]:
    recipe = ConvertRecipe(name="convert", **fields)
    run = Run.open(recipe, path)
    try:
        return convert(recipe, run), run.export
    finally:
        run.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
def test_load_then_save_returns_every_byte(
    model: GlmMoe, tmp_path: Path, dtype: torch.dtype, shard_bytes: float
) -> None:
    save_model(model, tmp_path / "a", dtype=dtype, shard_bytes=shard_bytes)
    save_model(load_model(tmp_path / "a"), tmp_path / "b", shard_bytes=shard_bytes)
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert first == second
    assert any(name.startswith("model.layers.3.mlp.experts.7.") for name in first), "the MTP layer is there"
    assert "model.layers.3.shared_head.head.weight" in first
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {p.name for p in (tmp_path / "b").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 5 or shard_bytes == 5e9
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_folder_without_the_mtp_copies_comes_back_without_them(model: GlmMoe, tmp_path: Path) -> None:
    model.stores_mtp_copies = False  # GLM-4.6
    save_model(model, tmp_path / "a")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert "model.layers.3.embed_tokens.weight" not in digests(tmp_path / "a")


def test_index_total_size_is_the_sum_of_the_tensors(model: GlmMoe, tmp_path: Path) -> None:
    save_model(model, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    opened = [safe_open(tmp_path / name, framework="pt") for name in sorted(set(index["weight_map"].values()))]
    assert index["metadata"]["total_size"] == sum(f.get_tensor(n).nbytes for f in opened for n in f.keys())  # noqa: SIM118


def test_checkpoint_to_folder_to_checkpoint(model: GlmMoe, tmp_path: Path) -> None:
    written = write_checkpoint(model, tmp_path / "train" / "checkpoints" / "step-00000007")
    summary, exported = run_recipe(tmp_path / "c1", source=str(written))
    assert summary["identical"] is True
    assert summary["max_logit_difference"] == 0.0
    assert summary["tensors"] == len(digests(exported))
    assert summary["bytes"] == sum(p.stat().st_size for p in exported.glob("*.safetensors")) - _header_bytes(exported)
    _, back = run_recipe(tmp_path / "c2", source=str(exported), to="checkpoint")
    assert digests(back) == digests(written)
    summary, _ = run_recipe(tmp_path / "c3", source=str(back), shard_bytes=20_000)
    assert summary["identical"] is True
    assert compare(written, tmp_path / "c3").identical


def test_every_architecture_of_the_family_converts_both_ways(family_config: ModelConfig, tmp_path: Path) -> None:
    """Step 3's files stack experts with gate and up apart, a checkpoint stacks them together."""
    written = write_checkpoint(GlmMoe(family_config, seed=3), tmp_path / "train" / "checkpoints" / "step-00000007")
    summary, exported = run_recipe(tmp_path / "c1", source=str(written), shard_bytes=50_000)
    assert summary["identical"] is True
    assert summary["max_logit_difference"] == 0.0
    _, back = run_recipe(tmp_path / "c2", source=str(exported), to="checkpoint")
    assert digests(back) == digests(written)


def _header_bytes(folder: Path) -> int:
    return sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in folder.glob("*.safetensors"))


def test_a_run_means_its_newest_checkpoint_and_brings_its_tokenizer(model: GlmMoe, tmp_path: Path) -> None:
    run = tmp_path / "train"
    write_checkpoint(model, run / "checkpoints" / "step-00000007")
    with torch.no_grad():
        model.norm.weight.add_(1)
    newest = write_checkpoint(model, run / "checkpoints" / "step-00000012")
    (run / "export").mkdir()
    (run / "export" / "tokenizer.json").write_text("{}")
    (run / "export" / "chat_template.jinja").write_text("{{ messages }}")
    summary, exported = run_recipe(tmp_path / "c", source=str(run))
    assert summary["source"] == str(newest)
    assert (exported / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (exported / "tokenizer.json").exists()


def test_a_checkpoint_written_by_training_converts(model: GlmMoe, tmp_path: Path) -> None:
    optimizer = build_optimizer(model, MuonSpec())
    state = {"step": 3, "model": model.config.model_dump(mode="json")}
    checkpoint.save(tmp_path / "train" / "checkpoints", model, optimizer, state)
    summary, exported = run_recipe(tmp_path / "c", source=str(tmp_path / "train"))
    assert summary["identical"] is True
    restored = load_model(exported)
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


def test_bfloat16_export_loads_in_transformers_and_keeps_router_biases_fp32(model: GlmMoe, tmp_path: Path) -> None:
    written = write_checkpoint(model, tmp_path / "step-00000001")
    summary, exported = run_recipe(tmp_path / "c", source=str(written), dtype="bfloat16")
    assert summary["identical"] is True
    assert 0 < summary["max_logit_difference"] < 1
    kinds = {name.endswith("e_score_correction_bias"): dtype for name, (dtype, _, _) in digests(exported).items()}
    assert kinds == {True: "torch.float32", False: "torch.bfloat16"}
    theirs, report = Glm4MoeForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert theirs.dtype == torch.bfloat16
    assert not report["missing_keys"]
    assert theirs.generation_config.eos_token_id == list(model.config.eos_token_id) or not model.config.eos_token_id


def test_transformers_own_folder_loads_here(model: GlmMoe, tmp_path: Path) -> None:
    """A folder written by transformers has no MTP layer; with the count set to 0 it is a complete model for us."""
    save_model(model, tmp_path / "ours")
    theirs = Glm4MoeForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs.config.num_mtp_layers = 0
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.mtp is None
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_compare_sees_a_single_changed_bit(model: GlmMoe, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a")
    with torch.no_grad():
        down_EDI = model.layers[1].mlp.experts.down_proj
        down_EDI[2, 3, 4] = torch.nextafter(down_EDI[2, 3, 4], torch.tensor(9.0))
    save_model(model, tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.differences == ["tensor 'model.layers.1.mlp.experts.2.down_proj.weight' has other values"]


def test_the_hash_tells_negative_zero_from_zero() -> None:
    assert tensor_sha256(from_tensor(torch.tensor([0.0]))) != tensor_sha256(from_tensor(torch.tensor([-0.0])))


def test_compare_lists_names_both_ways(model: GlmMoe, tmp_path: Path, tiny_config: ModelConfig) -> None:
    save_model(model, tmp_path / "a")
    save_model(GlmMoe(tiny_config.model_copy(update={"use_qk_norm": False}), seed=0), tmp_path / "b")
    forth, back = compare(tmp_path / "a", tmp_path / "b"), compare(tmp_path / "b", tmp_path / "a")
    assert any("q_norm" in line and line.endswith(f"only in {tmp_path / 'a'}") for line in forth.differences)
    assert any("q_norm" in line and line.endswith(f"only in {tmp_path / 'a'}") for line in back.differences)


def test_a_damaged_checkpoint_is_named_and_nothing_is_exported(model: GlmMoe, tmp_path: Path) -> None:
    written = write_checkpoint(model, tmp_path / "step-00000001")
    body = bytearray((written / "model.safetensors").read_bytes())
    body[-5] ^= 1
    (written / "model.safetensors").write_bytes(body)
    with pytest.raises(DataError, match=r"model\.safetensors"):
        run_recipe(tmp_path / "c", source=str(written))
    assert not (tmp_path / "c" / "export").exists()


def test_sources_that_are_not_models(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere"):
        run_recipe(tmp_path / "c1", source=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        run_recipe(tmp_path / "c2", source=str(tmp_path / "empty"))
