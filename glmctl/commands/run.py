"""`glmctl run`: a pipeline of stages as one resumable run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage

if TYPE_CHECKING:
    from glmctl.recipe.schema import PipelineRecipe

app = typer.Typer(**stage.PLAIN)


@app.command()
def run(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Run a pipeline: stages whose inputs have not changed are skipped, an interrupted one continues.

    A stage's own keys can be set too: `glmctl run demo --set pretrain.seed=1`.
    """
    from glmctl.recipe.load import load

    pipeline = _load(recipe, overrides or [])
    path = run or stage.default_path(pipeline.name)
    if dry_run:
        _show(pipeline, path)
        return
    from glmctl.run.pipeline import run_pipeline

    # it prints its own plan, table and result
    run_pipeline(pipeline, path, load, stage.execute, fresh=fresh)


def _load(name: str, overrides: list[str]) -> PipelineRecipe:
    """The pipeline, with `STAGE.key=value` words handed on to the stages that they name."""
    from glmctl.recipe.document import parse
    from glmctl.recipe.load import load
    from glmctl.recipe.schema import PipelineRecipe

    plain = load(name, expect="pipeline")
    assert isinstance(plain, PipelineRecipe), plain
    stages = {one.name for one in plain.stages} - set(PipelineRecipe.model_fields)
    own = [word for word in overrides if word.partition(".")[0] not in stages]
    pipeline = load(name, own, expect="pipeline")
    assert isinstance(pipeline, PipelineRecipe), pipeline
    extra: dict[str, dict[str, Any]] = {}
    for word in overrides:
        if word not in own:
            key, _, text = word.partition("=")
            stage_name, _, inner = key.partition(".")
            extra.setdefault(stage_name, {})[inner] = parse(text, f"--set {key}")
    changed = [one.model_copy(update={"set": {**one.set, **extra.get(one.name, {})}}) for one in pipeline.stages]
    return pipeline.model_copy(update={"stages": changed})


def _show(pipeline: PipelineRecipe, path: Path) -> None:
    from glmctl.recipe.load import derived, load
    from glmctl.run.pipeline import resolve

    rows, body = [], {}
    for one in resolve(pipeline, path, load):
        filled = one.recipe
        implied = derived(filled)
        keys = [key for key in ("parameters", "tokens", "steps", "rollouts", "problems") if key in implied]
        words = [f"{key} {console.number(implied[key])}" for key in keys]
        rows.append([one.name, one.kind, one.recipe_name, "  ".join(words)])
        body[one.name] = {"type": one.kind, "recipe": filled.model_dump(mode="json"), "derived": implied}
    console.table(f"{pipeline.name}: {len(rows)} stages in {path}", ["stage", "type", "recipe", "what follows"], rows)
    console.result({"name": pipeline.name, "run": str(path), "stages": body}, text="")
