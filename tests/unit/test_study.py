"""A study runs every arm and seed once, hands arms and seeds to the right stages, and compares what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from glmctl.errors import DataError, DivergedError, Interrupted
from glmctl.recipe.load import list_recipes, load
from glmctl.recipe.schema import EvalRecipe, ProblemsRecipe, SftRecipe, StudyRecipe
from glmctl.run.directory import Run
from glmctl.run.pipeline import resolve
from glmctl.run.study import pipeline_of, run_study

BEFORE = [{"name": "problems", "recipe": "p"}]
STAGES = [{"name": "sft", "recipe": "s"}, {"name": "eval", "recipe": "e", "set": {"models.m": "${sft}"}}]


def study(**changes: Any) -> StudyRecipe:
    return StudyRecipe.model_validate(
        {
            "name": "study",
            "before": BEFORE,
            "stages": STAGES,
            "arms": {"few": {"sft.steps": 1}, "many": {"sft.steps": 3}},
            "seeds": [0, 5],
            "metrics": {"accuracy": ["eval.right", "eval.other"], "loss": ["sft.loss"]},
            **changes,
        }
    )


def loaded(name: str, overrides: Any) -> Any:
    known: dict[str, Any] = {
        "p": ProblemsRecipe(name="p", task={"type": "arithmetic"}),  # type: ignore[arg-type]
        "s": SftRecipe(name="s", model="base", data=["${problems}/export/cold_start.jsonl"], steps=9),
        "e": EvalRecipe(name="e", models={"m": "-"}),
    }
    body = known[name].model_dump(mode="json")
    for key, value in dict(overrides).items():
        *path, last = key.split(".")
        place = body
        for part in path:
            place = place[part]
        place[last] = value
    return type(known[name]).model_validate(body)


def test_every_arm_and_seed_is_run_and_compared(tmp_path: Path) -> None:
    ran: list[tuple[str, Any]] = []

    def execute(recipe: Any, path: Path, *, fresh: bool = False) -> dict[str, Any]:
        with Run.open(recipe, path, fresh=fresh) as run:
            ran.append((path.name, recipe))
            summary: dict[str, Any] = {"train": 1}
            if recipe.type == "sft":
                summary = {"loss": recipe.steps + 0.1 * recipe.seed}
            elif recipe.type == "eval":
                steps = next(one.steps for name, one in ran if name == Path(recipe.models["m"]).name)
                # the two arms call it by different names
                summary = {"right" if steps == 1 else "other": steps / 4}
            run.finish(summary)
            return summary

    body = run_study(study(), tmp_path, loaded, execute)
    assert [name for name, _ in ran] == [
        "problems",
        *(f"{stage}-{arm}-{seed}" for arm in ("few", "many") for seed in (0, 5) for stage in ("sft", "eval")),
    ]
    assert {(one.seed, one.steps) for name, one in ran if name.startswith("sft")} == {(0, 1), (5, 1), (0, 3), (5, 3)}
    assert body["metrics"]["accuracy"]["many"] == {"values": [0.75, 0.75], "mean": 0.75, "std": 0.0}
    few = body["metrics"]["loss"]["few"]
    assert few["values"] == [1.0, 1.5]
    assert few["std"] == pytest.approx(0.35355, abs=1e-4)
    assert json.loads((tmp_path / "study.json").read_text()) == body
    page = (tmp_path / "study.html").read_text()
    assert page.count("<svg") == 2
    assert "75.0% ± 0.0%" in page
    pictures = {path.name: ElementTree.fromstring(path.read_text()) for path in (tmp_path / "plots").iterdir()}
    assert sorted(pictures) == ["accuracy.svg", "loss.svg"]
    assert all("font-family" in "".join(picture.itertext()) for picture in pictures.values()), "each has its style"
    run_study(study(), tmp_path, loaded, execute)
    assert len(ran) == 9, "nothing is run twice"


def test_a_metric_that_no_stage_has_is_named(tmp_path: Path) -> None:
    def execute(recipe: Any, path: Path, *, fresh: bool = False) -> dict[str, Any]:
        with Run.open(recipe, path, fresh=fresh) as run:
            run.finish({"x": 1})
        return {"x": 1}

    with pytest.raises(DataError, match=r"arm 'few' has no eval\.right or eval\.other"):
        run_study(study(), tmp_path, loaded, execute)


def test_an_arm_whose_rate_was_edited_half_way_starts_again(tmp_path: Path) -> None:
    """Half a run of each rate would be a figure of neither, though a run by itself may be continued so."""
    resumed: list[bool] = []

    def execute(recipe: Any, path: Path, *, fresh: bool = False) -> dict[str, Any]:
        with Run.open(recipe, path, fresh=fresh) as run:
            if recipe.type == "sft":
                resumed.append(run.resumed)
                if len(resumed) < 3:
                    run.fail("stopped", "interrupted")
                    raise Interrupted("stopped", exit_code=143)
            run.finish({"loss": 1.0})
        return {"loss": 1.0}

    def arm(clip: float) -> StudyRecipe:
        only = {"few": {"sft.grad_clip": clip}}
        return study(stages=STAGES[:1], arms=only, seeds=[0], metrics={"loss": ["sft.loss"]})

    for clip in (1.0, 1.0, 0.5):
        try:
            run_study(arm(clip), tmp_path, loaded, execute)
        except Interrupted:
            continue
    assert resumed == [False, True, False]


def searched(**changes: Any) -> StudyRecipe:
    """Two arms over one `sft` stage; `tried` looks for the number of steps with the smallest loss."""
    body = {
        "stages": STAGES[:1],
        "arms": {"fixed": {"sft.steps": 2}, "tried": {}},
        "search": {"tried": [{"sft.steps": steps} for steps in (8, 4, 5)]},
        "choose": {"metric": "loss"},
        "metrics": {"loss": ["sft.loss"]},
        "curves": {"loss": "sft.loss"},
    }
    return study(**{**body, **changes})


class Trainer:
    """Stands in for SFT: the loss is smallest at four steps, eight diverge."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int]] = []

    def __call__(self, recipe: Any, path: Path, *, fresh: bool = False) -> dict[str, Any]:
        with Run.open(recipe, path, fresh=fresh) as run:
            if recipe.type != "sft":
                run.finish({"x": 1})
                return {"x": 1}
            self.ran.append((recipe.steps, recipe.seed))
            if recipe.steps == 8:
                run.fail("three steps in a row")
                raise DivergedError("three steps in a row")
            loss = 2.0 + abs(recipe.steps - 4) + 0.25 * recipe.seed
            for step in (1, 2):
                run.metrics.append({"step": step, "tokens": 100 * step, "loss": loss + 2 - step})
            run.finish({"loss": loss})
            return {"loss": loss}


def test_an_arm_searches_on_the_first_seed_and_takes_its_best_to_all(tmp_path: Path) -> None:
    trainer = Trainer()
    body = run_study(searched(), tmp_path, loaded, trainer)
    assert trainer.ran == [(8, 0), (4, 0), (5, 0), (2, 0), (2, 5), (4, 5)], "the best is not trained twice"
    assert body["metrics"]["loss"]["tried"]["values"] == [2.0, 3.25]
    values = [trial["value"] for trial in body["search"]["tried"]["trials"]]
    assert (values, body["search"]["tried"]["best"]) == ([None, 2.0, 3.0], 1)
    page = (tmp_path / "study.html").read_text()
    assert "-2 (-2 to -2)" in page, "paired with the first arm, seed by seed"
    assert page.count('class="line c') == 2
    assert "diverged" in page
    assert "2 (best)" in page
    run_study(searched(), tmp_path, loaded, trainer)
    assert trainer.ran[6:] == [(8, 0)], "only what diverged is tried again"
    highest = {"metric": "loss", "best": "highest"}
    assert run_study(searched(choose=highest), tmp_path, loaded, trainer)["search"]["tried"]["best"] == 2


def test_an_arm_of_which_every_setting_diverges_is_named(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="every setting of arm 'tried' diverged"):
        run_study(searched(search={"tried": [{"sft.steps": 8}]}), tmp_path, loaded, Trainer())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arms": {"a": {"stf.steps": 1}}}, "did you mean 'sft'"),
        ({"metrics": {"x": ["nowhere.loss"]}}, "'nowhere.loss' begins with no stage"),
        ({"arms": {"A b": {}}}, "'A b' does not match"),
        ({"curves": {"loss": "stf.loss"}}, "did you mean 'sft'"),
        ({"search": {"fw": [{"sft.steps": 1}]}, "choose": {"metric": "loss"}}, "did you mean 'few'"),
        ({"search": {"few": []}, "choose": {"metric": "loss"}}, "has no settings to try"),
        ({"search": {"few": [{"sft.steps": 1}]}}, "needs `choose`"),
        ({"choose": {"metric": "los"}}, "did you mean 'loss'"),
    ],
)
def test_what_a_study_cannot_mean_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        study(**changes)


def test_dense_and_moe_are_compared_at_equal_active_parameters_and_tokens() -> None:
    """Dense against MoE: what one token passes differs by the routers alone."""
    recipe = load("ablations/moe-muon")
    assert isinstance(recipe, StudyRecipe)
    stages = {stage.name: stage for stage in pipeline_of(recipe).stages if stage.name.startswith("pretrain-")}
    made = {name: load(stage.recipe, stage.set, expect="pretrain") for name, stage in stages.items()}
    assert len({one.total_tokens for one in made.values()}) == 1
    moe, dense = made["pretrain-moe-muon-1-0"].model, made["pretrain-dense-muon-1-0"].model
    routers = moe.num_moe_layers * moe.n_routed_experts * moe.hidden_size
    assert moe.parameter_counts().active - dense.parameter_counts().active == routers
    assert dense.num_moe_layers == 0
    assert moe.parameter_counts().total > 1.2 * dense.parameter_counts().total
    assert made["pretrain-moe-adamw-1-0"].model == moe


def test_every_shipped_study_resolves(tmp_path: Path) -> None:
    """Its stages load, and every place they name is an earlier stage."""
    shipped = [entry.name for entry in list_recipes() if entry.type == "study"]
    assert shipped
    for name in shipped:
        recipe = load(name)
        assert isinstance(recipe, StudyRecipe)
        assert resolve(pipeline_of(recipe), tmp_path, load)
