"""Damaged and hostile model folders: one line that names the file and the tensor, exit code 3, nothing allocated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import INDEX, load_config, load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import TensorFile, write_tensors

GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def healthy(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("healthy")
    model = GlmMoe(tiny_config, seed=0)
    save_model(model, root / "single")
    save_model(model, root / "sharded", shard_bytes=60_000)
    return {"single": root / "single", "sharded": root / "sharded"}


@pytest.fixture
def single(healthy: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy["single"], tmp_path / "model"))


@pytest.fixture
def sharded(healthy: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy["sharded"], tmp_path / "model"))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_model(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message, caught.value.message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a single-file folder."""
    path = folder / "model.safetensors"
    file = TensorFile(path)
    tensors = {name: file.read(name).clone() for name in file.slots}
    change(tensors)
    write_tensors(path, tensors.items())


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a file and keep its bytes."""
    body = path.read_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body[8 + length :])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_healthy_folders_load(healthy: dict[str, Path]) -> None:
    a, b = load_model(healthy["single"]), load_model(healthy["sharded"])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_truncated_at_any_place(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    body = path.read_bytes()
    path.write_bytes(body[:keep])
    refused(single, "model.safetensors", "truncated")


def test_truncated_inside_the_data_names_the_tensor(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(single, "model.safetensors", "lm_head.weight")


def test_bytes_behind_the_end(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"extra")
    refused(single, "model.safetensors", "5 bytes behind")


@pytest.mark.parametrize("name", [GATE, "lm_head.weight", "model.layers.3.eh_proj.weight"])
def test_missing_tensor(single: Path, name: str) -> None:
    rewrite(single, lambda tensors: tensors.pop(name))
    refused(single, str(single), f"'{name}'", "missing")


def test_extra_tensor_with_the_nearest_name(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"model.layers.1.mlp.gates.weight": torch.zeros(2)}))
    with pytest.raises(DataError) as caught:
        load_model(single)
    assert "'model.layers.1.mlp.gates.weight'" in caught.value.message
    assert GATE in str(caught.value.hint)


def test_wrong_shape(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({GATE: torch.zeros(8, 47)}))
    refused(single, "model.safetensors", f"'{GATE}'", "[8, 47]", "[8, 48]")


def test_wrong_kind_of_number(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({GATE: tensors[GATE].long()}))
    refused(single, "model.safetensors", f"'{GATE}'", "int64")


def test_config_of_another_model(single: Path) -> None:
    edit_json(single / "config.json", moe_intermediate_size=32)
    refused(single, "mlp.experts.0.gate_proj.weight", "[24, 48]", "[32, 48]")


def test_differing_mtp_copy_names_both_tensors(single: Path) -> None:
    name = "model.layers.3.shared_head.head.weight"
    rewrite(single, lambda tensors: tensors[name][0].add_(1e-3))
    refused(single, f"'{name}'", "'lm_head.weight'")


def test_absent_mtp_copies_are_accepted(single: Path) -> None:
    names = ["model.layers.3.shared_head.head.weight", "model.layers.3.embed_tokens.weight"]
    rewrite(single, lambda tensors: [tensors.pop(name) for name in names])
    assert load_model(single).mtp is not None


def test_mixed_dtypes_load_in_the_widest(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({GATE: tensors[GATE].bfloat16()}))
    assert load_model(single).layers[1].mlp.gate.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", "model.bin", 7, None],
)
def test_index_that_points_elsewhere_is_refused_before_anything_is_opened(sharded: Path, name: Any) -> None:
    (sharded.parent / "elsewhere.safetensors").write_bytes(b"secret")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][GATE] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, INDEX, f"'{GATE}'")


def test_index_promises_a_tensor_that_is_not_in_its_file(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][GATE] = next(f for f in files if f != index["weight_map"][GATE])
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"'{GATE}'")


def test_the_same_tensor_in_two_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    other = next(f for f in sorted(set(index["weight_map"].values())) if f != index["weight_map"][GATE])
    file = TensorFile(sharded / other)
    tensors = {name: file.read(name).clone() for name in file.slots}
    write_tensors(sharded / other, {**tensors, GATE: torch.zeros(8, 48)}.items())
    refused(sharded, other, f"'{GATE}'", "also in")


def test_shard_missing(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(sharded, gone.name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', "{}", "[" * 100_000])
def test_unreadable_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}', "[" * 100_000, "\x80"])
def test_unreadable_config(single: Path, text: str) -> None:
    (single / "config.json").write_bytes(text.encode("latin-1"))
    refused(single, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"quantization_config": {"quant_method": "awq"}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        {"num_attention_heads": 5},
        {"hidden_size": "many"},
        {"scoring_func": "tanh"},
        {"rope_scaling": "yarn"},
        {"use_moe_router_bias": True},
    ],
)
def test_configs_we_would_compute_wrongly_are_refused(single: Path, changes: dict[str, Any]) -> None:
    edit_json(single / "config.json", **changes)
    with pytest.raises(DataError, match=r"config\.json"):
        load_config(single)


def test_no_folder_no_weights(single: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "config.json")
    (single / "model.safetensors").unlink()
    refused(single, "model.safetensors")


def test_header_too_large_is_refused_before_it_is_read(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    refused(single, "model.safetensors", "header")
    with path.open("r+b") as file:
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(18 << 20)  # sparse: the bytes are there
    refused(single, "model.safetensors", "header", "allowed")


@pytest.mark.parametrize("raw", [b"not json", b"[]", b"{" * 5000, b'{"a":1}', b"\xff\xfe", b'{"a":{}}'])
def test_header_that_is_not_one(single: Path, raw: bytes) -> None:
    (single / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    refused(single, "model.safetensors")


def test_name_twice_in_one_header(single: Path) -> None:
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    raw = ("{" + entry + "," + entry + "}").encode()
    (single / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"x")
    refused(single, "model.safetensors", "'a' appears twice")


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [-8, 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, 1 << 70]},
        {"data_offsets": [0]},
        {"data_offsets": [0.0, 1536.0]},
        {"data_offsets": None},
        {"shape": [8, -48]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": "8"},
        {"shape": [True, 384]},
        {"dtype": "F4"},
        {"dtype": None},
    ],
)
def test_header_entry_that_lies(single: Path, change: dict[str, Any]) -> None:
    rewrite_header(single / "model.safetensors", lambda header: header[GATE].update(change))
    refused(single, "model.safetensors", f"'{GATE}'")


def test_overlapping_tensors(single: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]

    rewrite_header(single / "model.safetensors", overlap)
    refused(single, "model.safetensors", "overlaps")


def test_code_in_a_folder_is_never_run(single: Path, tmp_path: Path) -> None:
    """`auto_map` and a module beside it: not imported."""
    marker = tmp_path / "ran"
    (single / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_json(single / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    load_model(single)
    assert not marker.exists()
