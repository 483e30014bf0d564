"""A study: stages repeated for every arm and seed, as one pipeline, and what came out of it side by side.

`before` runs once. Each of `stages` runs as `<stage>-<arm>-<seed>`; where its `set` names another repeated `${stage}`,
that of the same arm and seed is meant. An arm with settings to `search` first tries each on the first seed, as
`<stage>-<arm>-<place>-<seed>`, and goes on to the other seeds with the best. The result is `study.json` and
`study.html` beside the pipeline's own files, its pictures also as files under `plots/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from glmctl import console
from glmctl.errors import DataError, DivergedError
from glmctl.recipe.schema import PipelineRecipe, PipelineStage, StudyRecipe
from glmctl.run import atomic
from glmctl.run.metrics import MetricsLog
from glmctl.run.picture import standalone
from glmctl.run.pipeline import PLACEHOLDER, Execute, Load, run_pipeline
from glmctl.run.study_result import Found, Outcome, Points, Trial, page, plots, setting_words, shown


def run_study(recipe: StudyRecipe, root: Path, load: Load, execute: Execute, fresh: bool = False) -> dict[str, Any]:
    """Bring the whole study up to date (see `run_pipeline`) and write and return `study.json` (`Outcome.as_json`).

    Raises:
        DataError: a stage has none of the summary keys that a metric names.
        DivergedError: all searched settings of an arm diverged, or an arm did outside of its search.
    """
    trials: dict[str, list[Trial]] = {}
    places: dict[str, int] = {}
    for arm in recipe.search:
        trials[arm] = []
        for place in range(len(recipe.search[arm])):
            trials[arm].append(_tried(recipe, arm, place, root, load, execute, fresh))
            fresh = False
        places[arm] = _best(recipe, arm, trials[arm])
    stages = run_pipeline(pipeline_of(recipe, places), root, load, execute, fresh=fresh, mixed=False)["stages"]
    outcome = Outcome(collect(recipe, stages, places), trials, places, _curves(recipe, stages, places))
    body = outcome.as_json(recipe)
    atomic.write_json(root / "study.json", body)
    atomic.write_text(root / "study.html", page(recipe, outcome))
    (root / "plots").mkdir(exist_ok=True)
    for name, picture in plots(recipe, outcome).items():
        atomic.write_text(root / "plots" / name, standalone(picture))
    rows = [[metric, *(shown(values) for values in arms.values())] for metric, arms in outcome.found.items()]
    console.table(f"{recipe.name}: mean and deviation over {len(recipe.seeds)} seeds", ["metric", *recipe.arms], rows)
    console.note(f"plots: {root / 'study.html'}")
    return body


def pipeline_of(recipe: StudyRecipe, places: Mapping[str, int] | None = None) -> PipelineRecipe:
    """The study as a plain pipeline; `places`: the chosen setting of each arm that searches (default: the first)."""
    chosen = dict.fromkeys(recipe.search, 0) | dict(places or {})
    stages = list(recipe.before)
    for arm in recipe.arms:
        for seed in recipe.seeds:
            stages += _repeated(recipe, arm, seed, chosen.get(arm))
    return PipelineRecipe(name=recipe.name, seed=recipe.seed, stages=stages)


def collect(recipe: StudyRecipe, stages: Mapping[str, Any], places: Mapping[str, int]) -> Found:
    """Every metric of every arm and seed from the stages' summaries."""
    return {
        metric: {
            arm: [_figure(recipe, metric, arm, stages, _ending(arm, seed, places.get(arm))) for seed in recipe.seeds]
            for arm in recipe.arms
        }
        for metric in recipe.metrics
    }


def _repeated(recipe: StudyRecipe, arm: str, seed: int, place: int | None) -> list[PipelineStage]:
    """The repeated stages of one arm and seed, with the arm's searched setting at `place`."""
    names = {stage.name for stage in recipe.stages}
    changes = recipe.arms[arm] | ({} if place is None else recipe.search[arm][place])
    ending = _ending(arm, seed, place)
    made = []
    for stage in recipe.stages:
        own = {key.partition(".")[2]: value for key, value in changes.items() if _of(key) == stage.name}
        settings = {**stage.set, **own, "seed": seed}
        name = settings.pop("recipe", stage.recipe)
        renamed = {key: _renamed(value, names, ending) for key, value in settings.items()}
        made.append(PipelineStage(name=f"{stage.name}-{ending}", recipe=name, set=renamed))
    return made


def _tried(recipe: StudyRecipe, arm: str, place: int, root: Path, load: Load, execute: Execute, fresh: bool) -> Trial:
    """One setting on the first seed; what it diverges in is said, and only that arm's search is worse for it."""
    assert recipe.choose is not None
    setting, seed = recipe.search[arm][place], recipe.seeds[0]
    stages = [*recipe.before, *_repeated(recipe, arm, seed, place)]
    console.note(f"{recipe.name}: arm '{arm}' tries {setting_words(setting)}")
    try:
        pipeline = PipelineRecipe(name=recipe.name, stages=stages)
        ran = run_pipeline(pipeline, root, load, execute, fresh=fresh, mixed=False)["stages"]
    except DivergedError as error:
        console.warn(f"{recipe.name}: arm '{arm}' with {setting_words(setting)}: {error.message}")
        return Trial(setting, None)
    return Trial(setting, _figure(recipe, recipe.choose.metric, arm, ran, _ending(arm, seed, place)))


def _best(recipe: StudyRecipe, arm: str, trials: Sequence[Trial]) -> int:
    assert recipe.choose is not None
    sign = 1.0 if recipe.choose.best == "lowest" else -1.0
    values = {place: sign * one.value for place, one in enumerate(trials) if one.value is not None}
    if not values:
        raise DivergedError(f"{recipe.name}: every setting of arm '{arm}' diverged", hint="search lower learning rates")
    return min(values, key=lambda place: values[place])


def _figure(recipe: StudyRecipe, metric: str, arm: str, stages: Mapping[str, Any], ending: str) -> float:
    keys = recipe.metrics[metric]
    values = [stages[f"{_of(key)}-{ending}"]["summary"].get(key.partition(".")[2]) for key in keys]
    value = next((one for one in values if one is not None), None)
    if value is None:
        raise DataError(f"{recipe.name}: arm '{arm}' has no {' or '.join(keys)} in its summaries")
    return float(value)


def _curves(recipe: StudyRecipe, stages: Mapping[str, Any], places: Mapping[str, int]) -> dict[str, dict[str, Points]]:
    return {
        label: {
            arm: _mean_curve(
                [
                    Path(stages[f"{_of(key)}-{_ending(arm, seed, places.get(arm))}"]["path"]) / "metrics.jsonl"
                    for seed in recipe.seeds
                ],
                key.partition(".")[2],
            )
            for arm in recipe.arms
        }
        for label, key in recipe.curves.items()
    }


def _mean_curve(logs: Sequence[Path], key: str) -> Points:
    """The mean over the seeds where all of them have the figure, over tokens (or steps where tokens are not told)."""
    curves = []
    for log in logs:
        rows = [row for row in MetricsLog(log).rows() if row.get(key) is not None]
        curves.append({float(row.get("tokens", row["step"])): float(row[key]) for row in rows})
    common = sorted(set.intersection(*map(set, curves)))
    return [(at, fmean(curve[at] for curve in curves)) for at in common]


def _ending(arm: str, seed: int, place: int | None) -> str:
    return f"{arm}-{seed}" if place is None else f"{arm}-{place + 1}-{seed}"


def _of(key: str) -> str:
    """The stage that a key names."""
    return key.partition(".")[0]


def _renamed(value: Any, names: set[str], ending: str) -> Any:
    """`${name}` of a repeated stage as the one of this arm and seed, in every string of `value`."""
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda found: _place(found, names, ending), value)
    if isinstance(value, Mapping):
        return {key: _renamed(one, names, ending) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(one, names, ending) for one in value]
    return value


def _place(found: re.Match[str], names: set[str], ending: str) -> str:
    return f"${{{found[1]}-{ending}}}" if found[1] in names else found[0]
