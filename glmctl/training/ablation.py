"""`glmctl ablate`: variants of one pretraining at equal tokens, each at its own best setting, over several seeds.

Every trial is an ordinary run below `trials/`, so an interrupted ablation goes on where it was, and `glmctl runs
compare` reads its curves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from glmctl import console
from glmctl.errors import DivergedError, GlmctlError, Interrupted, RecipeError, unknown
from glmctl.recipe.ablation import AblationRecipe, Variant
from glmctl.recipe.load import derived, load
from glmctl.recipe.schema import PretrainRecipe
from glmctl.run import atomic
from glmctl.run.ablation import Outcome, Trial, page, setting_words, table
from glmctl.run.directory import Run
from glmctl.training import pretrain


@dataclass(frozen=True)
class Planned:
    """One variant with its settings, every trial resolved."""

    variant: Variant
    settings: list[dict[str, Any]]
    recipes: dict[tuple[int, int], PretrainRecipe]
    """(place of the setting, seed) -> what is run"""


def run(recipe: AblationRecipe, run: Run) -> dict[str, Any]:
    """Search each variant's settings on the first seed, run the best on all seeds, and export table and curves.

    The export holds `ablation.json` (every trial), `ablation.md` (the table) and `ablation.html` (table and curves).
    A trial that diverges counts as infinitely bad. Summary: for each variant the mean of the figure over its seeds,
    and what the later variants have more than the first.

    Raises:
        RecipeError: a variant's keys do not fit the recipe, variants train on different numbers of tokens, or no run
            has the figure; before anything is trained, as far as it can be known then.
        DivergedError: every setting of a variant diverged on the first seed, or the best one on another.
        Interrupted: a signal came; the same command continues.
    """
    planned = [_plan(recipe, variant) for variant in recipe.variants]
    _require_equal_tokens(recipe, planned)
    outcomes = [_variant(recipe, one, run.path / "trials") for one in planned]
    if run.writer:
        with atomic.publish(run.export) as folder:
            atomic.write_json(folder / "ablation.json", [outcome.as_json() for outcome in outcomes])
            atomic.write_text(folder / "ablation.md", table(outcomes, recipe.figure))
            atomic.write_text(folder / "ablation.html", page(recipe.name, outcomes, recipe.figure))
    first = outcomes[0]
    summary: dict[str, Any] = {f"{one.name}_{recipe.figure}": one.mean for one in outcomes}
    summary |= {f"{one.name}_minus_{first.name}": one.mean - first.mean for one in outcomes[1:]}
    return {**summary, "trials": sum(len(one.trials) for one in outcomes)}


def _plan(recipe: AblationRecipe, variant: Variant) -> Planned:
    settings = variant.search or [{}]
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    recipes = {}
    for place, setting in enumerate(settings):
        for seed in seeds:
            name = trial_name(variant.name, place, seed)
            changes = {**recipe.set, **variant.set, **setting, "seed": seed, "name": f"{recipe.name}-{name}"}
            recipes[place, seed] = cast(PretrainRecipe, load(recipe.recipe, changes, expect="pretrain"))
    return Planned(variant, settings, recipes)


def trial_name(variant: str, place: int, seed: int) -> str:
    """Folder of a trial below `trials/`."""
    return f"{variant}-{place}-seed{seed}"


def _require_equal_tokens(recipe: AblationRecipe, planned: list[Planned]) -> None:
    counts = {one.total_tokens for plan in planned for one in plan.recipes.values()}
    if len(counts) > 1:
        raise RecipeError(f"{recipe.name}: variants must train on equally many tokens, not {sorted(counts)}")


def _variant(recipe: AblationRecipe, planned: Planned, folder: Path) -> Outcome:
    """All trials of one variant."""

    def trial(place: int, seed: int) -> Trial:
        one = planned.recipes[place, seed]
        path = folder / trial_name(planned.variant.name, place, seed)
        console.note(f"{planned.variant.name}, seed {seed}{_words(planned.settings[place])}")
        summary = _execute(one, path)
        if summary is not None and recipe.figure not in summary:
            raise unknown("figure", recipe.figure, summary, where=f"{recipe.name}: figure")
        figure = math.inf if summary is None else float(summary[recipe.figure])
        return Trial(path, planned.settings[place], seed, figure, summary or {})

    places = range(len(planned.settings))
    searched = [trial(place, recipe.seed) for place in places]
    best = min(places, key=lambda place: searched[place].figure)
    rest = [trial(best, seed) for seed in range(recipe.seed + 1, recipe.seed + recipe.seeds)]
    chosen = [searched[best], *rest]
    if not all(math.isfinite(one.figure) for one in chosen):
        raise DivergedError(
            f"{recipe.name}: variant '{planned.variant.name}' diverged{_words(planned.settings[best])}",
            hint="search lower learning rates",
        )
    counts = derived(planned.recipes[best, recipe.seed])
    return Outcome(
        planned.variant.name,
        chosen=chosen,
        searched=searched,
        parameters=int(counts["parameters"]),
        active=int(counts["parameters_active"]),
        tokens=int(counts["tokens"]),
    )


def _execute(recipe: PretrainRecipe, path: Path) -> dict[str, Any] | None:
    """The summary of one trial, made or resumed; None when it diverged."""
    with Run.open(recipe, path) as trial:
        if trial.finished:
            return trial.summary
        try:
            summary = pretrain.run(recipe, trial)
        except DivergedError as error:
            trial.fail(error.message)
            console.warn(f"{path.name}: {error.message}")
            return None
        except GlmctlError as error:
            trial.fail(error.message, state="interrupted" if isinstance(error, Interrupted) else "failed")
            raise
        trial.finish(summary)
        return summary


def _words(setting: dict[str, Any]) -> str:
    return f" ({setting_words(setting)})" if setting else ""
