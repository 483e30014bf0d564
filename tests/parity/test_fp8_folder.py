"""FP8 folders in both layouts are models: exactly what they hold, in torch and packed, and again after an update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glmctl.convert.run import run as convert
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.rounding import round_weights
from glmctl.engine.runners import runner_named
from glmctl.errors import DataError, EnvironmentProblem
from glmctl.kernels.cpu.library import find_compiler
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run.directory import Run

LAYOUTS = ("fp8-channel", "fp8-block")
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=True)


@pytest.fixture(scope="module", params=LAYOUTS)
def folders(request: pytest.FixtureRequest, tiny_config: ModelConfig, tmp_path_factory: Any) -> tuple[str, Path, Path]:
    """The layout, an FP8 folder, and the same as the converter unpacks it to fp32; several blocks, some cut off."""
    config = tiny_config.model_copy(update={"hidden_size": 144, "moe_intermediate_size": 136, "intermediate_size": 260})
    work: Path = tmp_path_factory.mktemp("fp8")
    save_model(GlmMoe(config, seed=0), work / "model")
    return request.param, to(work / "model", work / "q", request.param), to(work / "q/export", work / "p", "float32")


def to(source: Path, target: Path, dtype: str) -> Path:
    run = Run.open(ConvertRecipe(name="c", source=str(source), dtype=dtype), target)
    try:
        convert(run.recipe, run)
        return run.export
    finally:
        run.close()


def answers(model: GlmMoe, runner: Any) -> list[tuple[list[int], list[float]]]:
    engine = Engine(model, max_length=64, runner=runner_named(runner))
    requests = [Request(str(n), [(31 * n + i) % 500 for i in range(5 + 3 * n)], PARAMS) for n in range(6)]
    return [(made.tokens, made.logprobs) for made in engine.generate(requests)]


def test_an_fp8_folder_is_the_model_it_unpacks_to(folders: tuple[str, Path, Path]) -> None:
    _, packed, plain = folders
    ours, theirs = load_model(packed), load_model(plain)
    assert ours.dtype == torch.float32
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert load_model(packed, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_packed_runner_holds_exactly_what_the_folder_holds(folders: tuple[str, Path, Path]) -> None:
    """Whatever the layout: the folder's own scales are used, so nothing is rounded twice."""
    require_compiler()
    _, packed, plain = folders
    assert answers(load_model(packed), "native-fp8") == answers(load_model(plain), "native")


def test_rounding_in_memory_is_what_the_converter_writes(folders: tuple[str, Path, Path]) -> None:
    layout, packed, _ = folders
    exact, stored = load_model(packed.parent.parent / "model"), load_model(packed)
    round_weights(exact, layout)  # type: ignore[arg-type]
    assert {name.split(".")[-2] for name in stored.fp8_scales} > {"q_proj", "o_proj", "experts", "up_proj"}
    for name in stored.fp8_scales:
        assert torch.equal(exact.get_parameter(name), stored.get_parameter(name)), name


def test_changed_weights_are_quantised_anew(folders: tuple[str, Path, Path]) -> None:
    """In the folder's layout. Its scales no longer give the weights: larger ones would be cut off."""
    require_compiler()
    layout, packed, _ = folders
    model = load_model(packed).requires_grad_(False)
    engine = Engine(model, max_length=64, runner=runner_named("native-fp8"))
    for parameter in model.parameters():
        parameter.mul_(1.37)
    engine.load_weights(1)
    made = engine.generate([Request("a", [1, 2, 3], PARAMS)])[0]
    round_weights(model, layout)  # type: ignore[arg-type]
    again = Engine(model, max_length=64, runner=runner_named("native")).generate([Request("a", [1, 2, 3], PARAMS)])[0]
    assert made.tokens == again.tokens


def test_another_quantisation_is_refused_by_name(folders: tuple[str, Path, Path], tmp_path: Path) -> None:
    packed = folders[1]
    body = json.loads((packed / "config.json").read_text())
    body["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(body))
    (tmp_path / "model.safetensors").symlink_to(packed / "model.safetensors")
    with pytest.raises(DataError, match="'awq' is not supported; compressed-tensors and fp8 are"):
        load_model(tmp_path)


def require_compiler() -> None:
    try:
        find_compiler()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
