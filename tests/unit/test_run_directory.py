"""A run directory: made once, resumed by the same recipe only, owned by one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from glmctl import console
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.recipe.load import list_recipes, load
from glmctl.recipe.schema import SftRecipe
from glmctl.run.changes import completed, differences
from glmctl.run.directory import Run, recipe_hash, resolve_model, resolve_tokenizer


def recipe(name: str = "r", steps: int = 3, **changes: object) -> SftRecipe:
    return SftRecipe.model_validate({"name": name, "model": "m", "data": ["d"], "steps": steps, **changes})


def test_a_new_run_writes_what_describes_it(tmp_path: Path) -> None:
    with Run.open(recipe(), tmp_path / "run") as run:
        assert not run.resumed
        assert not run.finished
        assert run.summary == {}
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "running"
    assert status["recipe_hash"] == recipe_hash(recipe())
    assert "steps: 3" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "run" / "env.json").read_text())["packages"]["torch"]


def test_the_same_recipe_resumes_under_any_name_and_adds_up_its_time(tmp_path: Path) -> None:
    with Run.open(recipe("one"), tmp_path / "run") as run:
        run.fail("killed", state="interrupted")
    status = tmp_path / "run" / "status.json"
    body = json.loads(status.read_text())
    assert (body["state"], body["error"]) == ("interrupted", "killed")
    status.write_text(json.dumps({**body, "seconds": 100.0}))
    with Run.open(recipe("two"), tmp_path / "run") as run:
        assert run.resumed
        assert run.state == "running"
        run.finish({"loss": 1.5, "bad": float("nan")})
    with Run.open(recipe("one"), tmp_path / "run") as run:
        assert run.finished
        assert run.summary == {"loss": 1.5, "bad": None}
        assert 100.0 <= run.seconds < 110.0
    assert json.loads(status.read_text())["state"] == "finished"


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    Run.open(recipe(), tmp_path / "run").close()
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(RecipeError) as caught:
        Run.open(recipe(steps=4, batch_tokens=64, schedule={"peak_lr": 1.0}), tmp_path / "run")
    assert caught.value.message.endswith("another recipe: steps: 3 -> 4; batch_tokens: 8192 -> 64")
    assert "--fresh" in (caught.value.hint or "")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_an_unfinished_run_goes_on_under_another_rate_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    Run.open(recipe(), path).close()
    for step in (7, 12):
        (path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    console.configure()
    slower = recipe(grad_clip=0.5, checkpoint={"every_steps": 3})
    with Run.open(slower, path) as run:
        assert run.resumed
    assert f"{path}: goes on after step 12 with grad_clip: 1.0 -> 0.5" in capsys.readouterr().err
    rows = [json.loads(line) for line in (path / "changes.jsonl").read_text().splitlines()]
    assert rows == [
        {"after_step": 12, "key": "grad_clip", "old": 1.0, "new": 0.5},
        {"after_step": 12, "key": "checkpoint.every_steps", "old": 50, "new": 3},
    ]
    assert "grad_clip: 0.5" in (path / "recipe.yaml").read_text()
    with Run.open(slower, path) as run:
        run.finish({})
    with Run.open(slower, path) as run:
        assert run.finished
    assert len((path / "changes.jsonl").read_text().splitlines()) == 2, "the same recipe is no change"
    with pytest.raises(RecipeError, match=r"grad_clip: 0\.5 -> 0\.25"):
        Run.open(recipe(grad_clip=0.25, checkpoint={"every_steps": 3}), path)


def test_a_recipe_from_before_a_field_existed_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "run"
    Run.open(recipe(), path).close()
    file = path / "recipe.yaml"
    body = yaml.safe_load(file.read_text())
    del body["mtp_weight"], body["schedule"]["warmup_fraction"]
    file.write_text(yaml.safe_dump(body))
    with Run.open(recipe(), path) as run:
        assert run.resumed
    with pytest.raises(RecipeError, match=r"mtp_weight: 0\.1 -> 0\.2"):
        Run.open(recipe(mtp_weight=0.2), path)
    file.write_text(yaml.safe_dump({**body, "gone": 1}))
    with pytest.raises(RecipeError, match=r'gone: 1 -> "absent"'):
        Run.open(recipe(), path)
    assert completed(None, SftRecipe) is None


@pytest.mark.parametrize("name", [entry.name for entry in list_recipes()])
def test_a_shipped_recipe_read_back_differs_in_nothing(name: str) -> None:
    made = load(name)
    plain = made.model_dump(mode="json")
    assert completed(yaml.safe_load(yaml.safe_dump(plain)), type(made)) == plain


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    Run.open(recipe(), tmp_path / "run").close()
    for number in (1, 2):
        run = Run.open(recipe(steps=4 + number), tmp_path / "run", fresh=True)
        assert not run.resumed
        run.close()
        assert (tmp_path / f"run.old-{number}" / "recipe.yaml").is_file()


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    with Run.open(recipe(), tmp_path / "run"):
        with pytest.raises(EnvironmentProblem, match="in use"):
            Run.open(recipe(), tmp_path / "run")
        with pytest.raises(EnvironmentProblem, match="in use"):
            Run.open(recipe(), tmp_path / "run", fresh=True)
    Run.open(recipe(), tmp_path / "run").close()


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("dear")
    for fresh in (False, True):
        with pytest.raises(RecipeError, match=r"thesis\.tex"):
            Run.open(recipe(), tmp_path / "thesis", fresh=fresh)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        Run.open(recipe(), tmp_path / "file")


def test_opening_removes_what_a_kill_left(tmp_path: Path) -> None:
    with Run.open(recipe(), tmp_path / "run") as run:
        (run.checkpoints / ".step-00000001.tmp-0123456789ab").mkdir(parents=True)
        (run.path / ".export.tmp-0123456789ab").mkdir()
    Run.open(recipe(), tmp_path / "run").close()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == []
    assert not list((tmp_path / "run").glob(".*tmp-*"))


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.open(recipe(), tmp_path / "run") as first:
        monkeypatch.setenv("RANK", "1")
        before = sorted(p.name for p in first.path.rglob("*"))
        with Run.open(recipe(), tmp_path / "run") as other:
            other.metrics.append({"step": 1})
            other.finish({"x": 1})
        assert sorted(p.name for p in first.path.rglob("*")) == before
        assert json.loads((first.path / "status.json").read_text())["state"] == "running"


def test_differences_name_keys_by_path() -> None:
    old = {"name": "a", "x": 1, "deep": {"list": [1, 2], "gone": 0}}
    new = {"name": "b", "x": 1, "deep": {"list": [1, 3], "new": 0}}
    assert differences(old, old) == []
    assert list(map(str, differences(old, new))) == [
        "deep.list.1: 2 -> 3",
        'deep.gone: 0 -> "absent"',
        'deep.new: "absent" -> 0',
    ]


def test_a_model_is_found_in_a_folder_or_in_a_run(tmp_path: Path) -> None:
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    with pytest.raises(RecipeError, match="no such model"):
        resolve_model(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"config\.json"):
        resolve_model(tmp_path / "run")
    (export / "config.json").write_text("{}")
    assert resolve_model(tmp_path / "run") == export
    assert resolve_model(str(export)) == export
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        resolve_tokenizer(export)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    with Run.open(recipe(), tmp_path / "run") as run:
        run.fail("stopped", state="interrupted")
    with pytest.raises(DataError, match="not finished"):
        resolve_model(tmp_path / "run")
