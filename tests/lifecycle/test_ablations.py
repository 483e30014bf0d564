"""The shipped ablations at their smallest: their own stages and arms, untrained models, the table they promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glmctl.commands._stage import execute
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.load import load
from glmctl.recipe.schema import PipelineStage, StudyRecipe
from glmctl.run.study import run_study
from glmctl.training import session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> str:
    folder: Path = tmp_path_factory.mktemp("ablation") / "base"
    save_model(GlmMoe(tiny_config, seed=0), folder)
    tiny_tokenizer.save(folder)
    return str(folder)


def shrunk(name: str, before: dict[str, dict[str, Any]], stages: dict[str, dict[str, Any]], arms: Any) -> StudyRecipe:
    """The shipped study with small settings, one seed, and models that need no training."""
    recipe = load(name)
    assert isinstance(recipe, StudyRecipe)
    known = {stage.name: stage for stage in recipe.before}

    def small(stage: PipelineStage, settings: dict[str, Any]) -> PipelineStage:
        return stage.model_copy(update={"set": {**stage.set, **settings}})

    return recipe.model_copy(
        update={
            "seeds": [0],
            "before": [small(known[key], settings) for key, settings in before.items()],
            "stages": [small(stage, stages[stage.name]) for stage in recipe.stages],
            "arms": {key: {**own, **arms.get(key, {})} for key, own in recipe.arms.items()},
        }
    )


PROBLEMS = {"train": 24, "heldout": 4, "cold_start": 8}
TEACH = {
    "teachers.0.model": "",
    "steps": 2,
    "heldout_limit": 4,
    "checkpoint.every_steps": 2,
}


def test_tags_against_json(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAMPLE_TOKENS", 2)
    sft = {"model": base, "steps": 2, "batch_tokens": 512, "sequence_length": 512}
    scored = {"limit": 2, "sampling.max_tokens": 8, "speculative_limit": 0}
    made = shrunk("ablations/tool-calls", {"calls": PROBLEMS}, {"sft": sft, "eval": scored}, {})
    body = run_study(made, tmp_path, load, execute)
    assert set(body["metrics"]) == {"calls that are right", "calls that parse"}
    assert all(set(arms) == {"tags", "json"} for arms in body["metrics"].values())
    templates = [(tmp_path / f"sft-{arm}-0/export/chat_template.jinja").read_text() for arm in ("tags", "json")]
    assert "<arg_key>" in templates[0]
    assert "<arg_key>" not in templates[1]


def test_off_policy_against_on_policy(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an untrained expert off-policy finds nothing to teach; the on-policy arm needs no right answer."""
    settings = {**TEACH, "teachers.0.model": base, "student": base}
    made = shrunk("ablations/on-policy", {"math": PROBLEMS}, {"teach": settings}, {})
    on = {**made.arms["on-policy"], "teach.prompts_per_step": 2, "teach.samples_per_prompt": 2, "teach.max_tokens": 6}
    made = made.model_copy(update={"arms": {"on-policy": on}})
    body = run_study(made, tmp_path, load, execute)
    assert 0.0 <= body["metrics"]["held-out accuracy"]["on-policy"]["mean"] <= 1.0
