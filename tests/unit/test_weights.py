"""The table of names between disk and memory, and our safetensors reader and writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import TensorFile, write_tensors
from glmctl.model.weights import entries, from_hf_names, memory_shapes, to_hf_names
from glmctl.recipe.presets import PRESETS

VARIANTS = [{}, {"tie_word_embeddings": True}, {"use_qk_norm": False, "attention_bias": False}, {"n_shared_experts": 0}]


@pytest.mark.parametrize("extra", [*VARIANTS, {"num_nextn_predict_layers": 0}, {"first_k_dense_replace": 3}])
def test_the_table_covers_exactly_the_networks_state(tiny_config: ModelConfig, extra: dict[str, object]) -> None:
    config = tiny_config.model_copy(update=extra)
    state = {name: tuple(t.shape) for name, t in GlmMoe(config, device="meta").state_dict().items()}
    assert memory_shapes(config) == state
    listed = list(entries(config))
    assert len({e.disk for e in listed}) == len(listed)
    covered = sum(torch.Size(e.shape).numel() for e in listed if not e.copy)
    assert covered == sum(torch.Size(shape).numel() for shape in state.values())


@pytest.mark.parametrize("extra", VARIANTS)
def test_names_there_and_back_keep_every_value(tiny_config: ModelConfig, extra: dict[str, object]) -> None:
    config = tiny_config.model_copy(update=extra)
    state = GlmMoe(config, seed=0).state_dict()
    disk = to_hf_names(config, state)
    assert all(tuple(disk[e.disk].shape) == e.shape for e in entries(config))
    back = from_hf_names(config, disk)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_released_names(tiny_config: ModelConfig) -> None:
    """Spec sections 1.4 and 1.5; layer 3 is the MTP layer of a three-layer model."""
    names = {e.disk for e in entries(tiny_config)}
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.7.down_proj.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        "model.layers.2.self_attn.k_proj.bias",
        "model.layers.2.self_attn.q_norm.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "model.layers.3.shared_head.norm.weight",
        "model.layers.3.shared_head.head.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names
    assert "model.layers.2.self_attn.o_proj.bias" not in names
    without = to_hf_names(tiny_config, GlmMoe(tiny_config, device="meta").state_dict(), copies=False)
    assert "model.layers.3.embed_tokens.weight" not in without


def test_size_of_the_released_checkpoint() -> None:
    """With the four vocabulary matrices, GLM-4.5 stores 358.3B parameters and Air 110.5B (spec section 1.1)."""
    for preset, billions in (("glm-4.5", 358.3), ("glm-4.5-air", 110.5)):
        config = ModelConfig(**PRESETS[preset])
        assert round(sum(torch.Size(e.shape).numel() for e in entries(config)) / 1e9, 1) == billions


TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "strided": torch.arange(12.0).view(3, 4).t(),
    "flags": torch.tensor([True, False, True]),
}


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    size = write_tensors(tmp_path / "x.safetensors", TENSORS.items())
    assert size == (tmp_path / "x.safetensors").stat().st_size
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor), name
            assert file.get_tensor(name).dtype == tensor.dtype


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in TENSORS.items()}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.slots.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor), name


def test_writing_to_a_read_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS.items())
    before = (tmp_path / "x.safetensors").read_bytes()
    TensorFile(tmp_path / "x.safetensors").read("b").zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before
