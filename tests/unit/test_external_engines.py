"""The command lines of other engines say what the recipe says, and never the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmctl.data.template_source import without_marks
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import styled
from glmctl.errors import RecipeError
from glmctl.recipe.schema import ServeRecipe
from glmctl.serving.external import command, environment


@pytest.fixture
def recipe(tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> ServeRecipe:
    monkeypatch.delenv("GLMCTL_API_KEY", raising=False)
    tiny_tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_nextn_predict_layers": 1}))
    return ServeRecipe(name="serve", model=str(tmp_path), port=8001, max_slots=4, max_length=4096, speculative=2)


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_vllm(recipe: ServeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMCTL_API_KEY", "canary")
    words = command("vllm", recipe)
    assert words[:3] == ["vllm", "serve", recipe.model]
    assert after(words, "--max-model-len") == "4096"
    assert after(words, "--port") == "8001"
    assert json.loads(after(words, "--speculative-config")) == {"method": "mtp", "num_speculative_tokens": 2}
    assert "canary" not in " ".join(words)
    assert environment("vllm", recipe)["VLLM_API_KEY"] == "canary"


def test_sglang(recipe: ServeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command("sglang", recipe)
    assert after(words, "--speculative-num-draft-tokens") == "3"
    assert after(words, "--context-length") == "4096"
    monkeypatch.setenv("GLMCTL_API_KEY", "canary")
    with pytest.raises(RecipeError, match="command line"):
        command("sglang", recipe)


def test_a_model_without_mtp_is_not_asked_to_draft(recipe: ServeRecipe) -> None:
    (Path(recipe.model) / "config.json").write_text("{}")
    assert "--speculative-config" not in command("vllm", recipe)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_calls_are_parsed_in_the_style_of_the_folder(engine: str, recipe: ServeRecipe) -> None:
    assert after(command(engine, recipe), "--tool-call-parser") == "glm45"
    (Path(recipe.model) / "chat_template.jinja").write_text(without_marks(styled("json")))
    words = command(engine, recipe)
    assert after(words, "--tool-call-parser") == "hermes"
    assert after(words, "--reasoning-parser") == "glm45"


def test_what_cannot_be_said_is_refused(recipe: ServeRecipe) -> None:
    with pytest.raises(RecipeError, match="did you mean 'vllm'"):
        command("vlm", recipe)
    with pytest.raises(RecipeError, match="strict"):
        command("vllm", recipe.model_copy(update={"strict": True}))
    with pytest.raises(RecipeError, match="no API key"):
        command("vllm", recipe.model_copy(update={"host": "0.0.0.0"}))
