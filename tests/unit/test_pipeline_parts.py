"""What the pipeline decides by: digests of inputs and outputs, and the figures that it shows of a stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmctl.recipe.schema import EvalRecipe, SftRecipe
from glmctl.run import atomic
from glmctl.run.fingerprint import digest, input_files, outputs
from glmctl.run.headline import figure, headline, sentence


def test_a_digest_sees_values_and_not_their_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert digest([1, 2]) != digest([2, 1])


def test_inputs_are_the_files_that_path_fields_name(tmp_path: Path) -> None:
    """Content decides for files, listing for folders; other strings that happen to be names of files do not count."""
    text, model = tmp_path / "text.jsonl", tmp_path / "model"
    text.write_text("one")
    model.mkdir()
    (model / "config.json").write_text("{}")
    recipe = SftRecipe(
        name="x", model=str(model), data=["${problems}/export/x.jsonl", str(text), "missing.jsonl"], steps=1
    )
    body = recipe.model_dump(mode="json")
    before = input_files(body)
    assert set(before) == {str(model), str(text)}
    text.touch()
    assert input_files(body) == before
    text.write_text("two")
    assert input_files(body)[str(text)] != before[str(text)]
    (model / "new").write_text("")
    assert input_files(body)[str(model)] != before[str(model)]
    named = EvalRecipe(name="e", models={"a": "${sft}"}, tasks=[str(text)]).model_dump(mode="json")
    assert input_files(named) == {}


def test_nested_inputs_are_found(tmp_path: Path) -> None:
    text = tmp_path / "held.jsonl"
    text.write_text("x")
    nested = {"sources": [{"paths": [str(text)]}], "teachers": [{"heldout": [str(text)], "name": str(text)}]}
    assert set(input_files(nested)) == {str(text)}
    assert input_files({"teachers": [{"name": str(text)}]}) == {}


def test_outputs_are_known_by_their_manifests(tmp_path: Path) -> None:
    """Equal files give equal digests wherever and whenever they were made; a lost or cut file gives None."""

    def made(root: Path, text: str) -> str | None:
        with atomic.publish(root / "export") as folder:
            (folder / "a.txt").write_text(text)
        return outputs(root)

    first, second = tmp_path / "one", tmp_path / "two"
    assert made(first, "x") == made(second, "x") is not None
    assert made(second, "y") != outputs(first)
    (first / "export" / "a.txt").write_text("longer than before")
    assert outputs(first) is None
    (second / "export" / "a.txt").unlink()
    assert outputs(second) is None


def test_a_run_without_files_is_known_by_its_summary(tmp_path: Path) -> None:
    assert outputs(tmp_path) is None
    atomic.write_json(tmp_path / "status.json", {"state": "finished", "summary": {"a": 1}, "seconds": 3})
    before = outputs(tmp_path)
    atomic.write_json(tmp_path / "status.json", {"state": "finished", "summary": {"a": 1}, "seconds": 4})
    assert outputs(tmp_path) == before is not None
    atomic.write_json(tmp_path / "status.json", {"state": "finished", "summary": {"a": 2}, "seconds": 3})
    assert outputs(tmp_path) != before


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("heldout_end", 0.8312, "83.1%"),
        ("reasoning_ratio", 1.02, "102.0%"),
        ("hybrid/mtp_acceptance", 0.5, "50.0%"),
        ("validation_loss", 3.09412, "3.094"),
        ("tokens", 1234567, "1,234,567"),
        ("mtp_identical", True, "yes"),
        ("loss", float("nan"), "nan"),
        ("reply", "a\n b " + "c" * 80, "a b " + "c" * 55 + "…"),
    ],
)
def test_figures_are_written_for_people(key: str, value: object, text: str) -> None:
    assert figure(key, value) == text


def test_headlines_are_what_a_stage_is_about() -> None:
    summary = {"steps": 3, "heldout_end": 0.5, "heldout_start": 0.25, "other": 1, "by_task": {"a": 1}}
    assert list(headline("rl", summary)) == ["heldout_start", "heldout_end"]
    assert sentence("rl", summary) == "heldout start 25.0%, heldout end 50.0%"
    assert headline("unheard-of", summary, 2) == {"steps": 3, "heldout_end": 0.5}
    assert headline("rl", {}) == {}
    models = {"base/a": 0.1, "base/b": 0.2, "hybrid/a": 0.3, "hybrid/b": 0.4}
    assert headline("eval", models) == {"hybrid/a": 0.3, "hybrid/b": 0.4}
