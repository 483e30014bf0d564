"""`weights` of an evaluation: what a packed format loses stands beside the exact model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from glmctl import console
from glmctl.data.tokenizer import Tokenizer
from glmctl.evaluation.run import run
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import EvalRecipe
from glmctl.run.directory import Run


def test_rounded_weights_are_another_model_by_a_little(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    console.configure(quiet=True)
    folder = tmp_path / "model"
    model = GlmMoe(tiny_config, seed=1).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    save_model(model, folder)
    tiny_tokenizer.save(folder)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps over the lazy dog."}))
    recipe = EvalRecipe(
        name="loss",
        models={"exact": str(folder), "int8": str(folder), "fp8": str(folder)},
        weights={"int8": "int8", "fp8": "fp8-block"},
        tasks=["glmctl_perplexity"],
        perplexity_texts=[str(tmp_path / "texts.jsonl")],
    )
    with Run.open(recipe, tmp_path / "run") as opened:
        summary = run(recipe, opened)
        told = json.loads((opened.export / "fp8/results.json").read_text())["config"]["model_dtype"]
    exact, int8, fp8 = (summary[f"{name}/glmctl_perplexity"] for name in recipe.models)
    # steps of 1/127 of a group's largest, and of 1/16 of the number itself: an order of magnitude apart
    assert 0 < abs(int8 / exact - 1) < 0.01
    assert abs(int8 / exact - 1) < abs(fp8 / exact - 1) < 0.1
    assert told == "fp8-block"


def test_weights_of_no_model_are_refused() -> None:
    with pytest.raises(ValidationError, match="'b' is none of the models: a"):
        EvalRecipe(name="x", models={"a": "m"}, weights={"b": "int8"}, tasks=["glmctl_cloze"])
