"""`glmctl info`: the figures of spec section 1, computed; every kind of thing that has a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmctl.model.config import ModelConfig
from glmctl.recipe.comparison import describe, find_config
from glmctl.recipe.presets import PRESETS


def figures(name: str, context: int = 4096) -> dict[str, object]:
    return describe(find_config(name), context)


def billions(value: object) -> float:
    assert isinstance(value, int)
    return round(value / 1e9, 1)


def test_sizes_are_the_published_ones() -> None:
    """Spec sections 1.1, 1.8, 1.9: GLM and Air without embedding and head, Step 3's language model, Kimi's config."""
    glm, air, step, kimi = (figures(name) for name in ("glm-4.5", "glm-4.5-air", "step-3", "kimi-k2"))
    assert billions(glm["parameters_named"]) == 355.2
    assert billions(glm["parameters_active"]) == 32.1
    assert billions(air["parameters_named"]) == 108.0
    assert billions(air["parameters_active"]) == 12.2
    assert billions(step["parameters"]) == 316.3
    assert billions(step["parameters_active_with_head"]) == 37.9
    assert billions(kimi["parameters"]) == 1026.4
    assert billions(kimi["parameters_active_with_vocabulary"]) == 32.9
    deepseek = figures("deepseek-v3")
    assert billions(deepseek["parameters_without_mtp"]) == 671.0


def test_caches_are_the_published_ones() -> None:
    """MLA keeps 512 + 64 numbers, MFA one key and one value of 256, GLM 8 of each of 128."""
    kept = {name: figures(name)["kv_numbers_per_token_and_layer"] for name in PRESETS}
    assert kept["kimi-k2"] == kept["deepseek-v3"] == 576
    assert kept["step-3"] == 512
    assert kept["glm-4.5"] == kept["glm-4.6"] == 2048
    assert figures("glm-4.5", 100)["kv_bytes"] == 100 * 92 * 2048 * 2


def test_table_and_json(cli: Callable[..., Any]) -> None:
    shown = cli("info", "glm-4.5", "glm-4.5-air", "step-3", "kimi-k2")
    assert shown.returncode == 0, shown.stderr
    for words in ("355.2B", "3 dense + 89 MoE + 1 MTP", "softmax, not renormalised", "sigmoid, not softmax", "5 dense"):
        assert words in shown.stdout
    body = json.loads(cli("info", "kimi-k2", "demo/pretrain", "--json", "--context", "8192").stdout)
    assert body["models"]["kimi-k2"]["kv_bytes"] == 8192 * 61 * 576 * 2
    assert body["models"]["demo/pretrain"]["n_routed_experts"] == find_config("demo/pretrain").n_routed_experts
    lines = cli("info", "glm-4.7", "--markdown").stdout.splitlines()
    assert lines[0].startswith("| ")
    assert all(line.count("|") == 3 for line in lines if line)


def test_a_folder_and_a_run_directory_are_models_too(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(PRESETS["nano"])
    for folder in (tmp_path / "folder", tmp_path / "run" / "export"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config.to_hf()))
    assert find_config(str(tmp_path / "folder")) == config
    assert find_config(str(tmp_path / "run")) == config


@pytest.mark.parametrize(("name", "word"), [("kimi-k3", "'kimi-k2'"), ("demo/sft-reasoning", "names no model")])
def test_what_is_no_model_is_said_in_one_line(cli: Callable[..., Any], name: str, word: str) -> None:
    failed = cli("info", name)
    assert failed.returncode == 2
    assert word in failed.stderr
    assert "Traceback" not in failed.stderr
