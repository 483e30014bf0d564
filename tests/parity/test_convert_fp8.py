"""FP8 layouts: what is written dequantises to what a plain reading of the format says, and back without drift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Glm4MoeForCausalLM

from glmctl.convert.run import run as convert
from glmctl.convert.source import open_model
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import write_tensors
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run.directory import Run

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that a matrix has several scale blocks, some of them cut off at the edge."""
    config = tiny_config.model_copy(update={"hidden_size": 144, "moe_intermediate_size": 136, "intermediate_size": 260})
    folder = tmp_path_factory.mktemp("fp8") / "model"
    save_model(GlmMoe(config, seed=0), folder)
    return folder


def to(source: Path, target: Path, **fields: Any) -> tuple[dict[str, Any], Path]:
    run = Run.open(ConvertRecipe(name="c", source=str(source), **fields), target)
    try:
        return convert(run.recipe, run), run.export
    finally:
        run.close()


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    if scale.shape == (weight.shape[0], 1):
        return scale
    return scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]


@pytest.mark.parametrize(("layout", "ending"), [("fp8-channel", "_scale"), ("fp8-block", "_scale_inv")])
def test_layout_error_and_way_back(source: Path, tmp_path: Path, layout: str, ending: str) -> None:
    exact = load_file(source / "model.safetensors")
    summary, folder = to(source, tmp_path / "q", dtype=layout)
    stored = load_file(folder / "model.safetensors")
    packed = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name + ending for name in packed} == stored.keys() - exact.keys()
    assert {Q, GATE, "model.layers.3.mlp.shared_experts.up_proj.weight"} <= packed
    kept = exact.keys() - packed
    assert {"lm_head.weight", "model.layers.1.mlp.gate.weight", "model.layers.3.eh_proj.weight"} <= kept
    for name in packed:
        weight, scale = exact[name], stored[name + ending]
        found = stored[name].float() * spread(scale, weight)
        # E4M3 has 3 bits of mantissa; below its smallest normal number, 2^-6, it has steps of 2^-9
        allowed = torch.maximum(weight.abs() * 2**-4, spread(scale, weight) * 2**-10)
        assert ((found - weight).abs() <= allowed * 1.001).all(), name
        assert scale.dtype == torch.float32
    report = summary["quantisation_error"]
    assert set(report) >= {"q_proj", "o_proj", "experts.gate_proj", "experts.down_proj", "down_proj"}
    found = stored[Q].float() * spread(stored[Q + ending], exact[Q])
    assert 0.01 < report["q_proj"]["relative_rms"] < 0.04
    # one rerouted token moves logits by this much in a random model; rounding alone is far below
    assert 0 < summary["max_logit_difference"] < 1
    # reading: exactly fp8 * scale, by our own folder reader
    _, plain = to(folder, tmp_path / "p", dtype="float32")
    assert torch.equal(load_file(plain / "model.safetensors")[Q], found)
    assert load_model(plain).dtype == torch.float32
    # and again: the same bytes, since the largest of every row or block is representable
    _, again = to(plain, tmp_path / "r", dtype=layout)
    repeated = load_file(again / "model.safetensors")
    for name in packed:
        assert torch.equal(repeated[name].view(torch.uint8), stored[name].view(torch.uint8)), name
        torch.testing.assert_close(repeated[name + ending], stored[name + ending], rtol=2e-7, atol=0)


def test_transformers_reads_the_block_layout_as_we_do(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Without an accelerator it unpacks to bf16, experts stacked: the same numbers. It takes whole blocks only."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 384, "head_dim": 64}
    save_model(GlmMoe(tiny_config.model_copy(update=sizes), seed=0), tmp_path / "m")
    _, folder = to(tmp_path / "m", tmp_path / "q", dtype="fp8-block")
    _, plain = to(folder, tmp_path / "p", dtype="bfloat16")
    theirs = Glm4MoeForCausalLM.from_pretrained(folder).state_dict()
    ours = load_file(plain / "model.safetensors")
    assert torch.equal(theirs[Q], ours[Q])
    up = ours[GATE.replace("gate_proj", "up_proj")]
    assert torch.equal(theirs["model.layers.1.mlp.experts.gate_up_proj"][3], torch.cat([ours[GATE], up]))


def test_keep_unpacks_to_the_dtype_that_the_config_names(source: Path, tmp_path: Path) -> None:
    _, folder = to(source, tmp_path / "q", dtype="fp8-block")
    summary, plain = to(folder, tmp_path / "p")
    assert summary["identical"] is True
    assert load_model(plain).dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())


def test_released_description(source: Path, tmp_path: Path) -> None:
    """Keys that vLLM and transformers read in a released config."""
    _, folder = to(source, tmp_path / "q", dtype="fp8-channel")
    body = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (body["quant_method"], body["format"]) == ("compressed-tensors", "float-quantized")
    weights = body["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["type"], weights["strategy"]) == (8, "float", "channel")
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(body["ignore"])
    _, folder = to(source, tmp_path / "b", dtype="fp8-block")
    body = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (body["quant_method"], body["weight_block_size"]) == ("fp8", [128, 128])


def test_folders_that_do_not_hold_together(source: Path, tmp_path: Path) -> None:
    _, folder = to(source, tmp_path / "q", dtype="fp8-channel")
    path = folder / "model.safetensors"
    # in memory of their own: the file is written over
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}

    def refused(changed: dict[str, Tensor], word: str) -> None:
        write_tensors(path, changed.items())
        with pytest.raises(DataError, match=word):
            open_model(folder)

    refused({n: t for n, t in tensors.items() if n != Q + "_scale"}, "has no scale")
    refused({**tensors, Q: tensors[Q].bfloat16()}, "scales nothing")
    refused({**tensors, Q + "_scale": tensors[Q + "_scale"][:-1].clone()}, "expected float")
    write_tensors(path, tensors.items())
    body = json.loads((folder / "config.json").read_text())
    body["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="gptq"):
        open_model(folder)
