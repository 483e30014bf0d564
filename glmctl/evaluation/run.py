"""The eval driver: every model of the recipe on its tasks and problems, results in lm-eval's own format.

`<export>/<model>/results.json` holds what lm-eval writes, our multi-turn scores beside it, and
`samples_<task>.jsonl` every document with its answer. The summary has one figure a model and task (`<model>/<task>`)
and the rest beside it (`<model>/<task>_<metric>`). Answers are kept in `responses/` as they come, so that a killed
evaluation goes on; they go when the results are there.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.engine.rounding import round_weights
from glmctl.errors import RecipeError, unknown
from glmctl.evaluation import suites
from glmctl.evaluation.catalog import OWN_GROUPS, OWN_TASKS
from glmctl.evaluation.episodes import score_episodes
from glmctl.evaluation.record import document, sample_rows
from glmctl.evaluation.responses import Responses, fingerprint
from glmctl.evaluation.results import Results, add_verified, by_task, show, write_json, write_rows
from glmctl.evaluation.speculative import check
from glmctl.evaluation.statistics import repeated
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import EvalRecipe
from glmctl.rl.environment import Problem, read_problems
from glmctl.rl.episode import Trajectory
from glmctl.rl.journal import sample_row
from glmctl.rl.sandbox import boxes
from glmctl.rl.sandbox.execute import sandbox
from glmctl.rl.tasks import RUNS_CODE, environment
from glmctl.run import atomic
from glmctl.run.directory import Run, resolve_model
from glmctl.run.fingerprint import digest
from glmctl.run.metrics import MetricsLog

SHOWN = 4
"""answers to each problem file that go into samples.jsonl"""

RESPONSES = "responses"
"""folder of the run that holds answers until the results are there"""


def run(recipe: EvalRecipe, run: Run) -> dict[str, Any]:
    """Score every model and return the summary. Raises RecipeError for a task, model or file that does not exist."""
    problems = {name: _problems(path, recipe.limit) for name, path in recipe.problems.items()}
    _check(recipe)
    if _runs_code(recipe, problems):
        boxes.require(recipe.sandbox)
    folders = {name: resolve_model(path) for name, path in recipe.models.items()}
    run.samples.unlink(missing_ok=True)
    samples = MetricsLog(run.samples)
    total = len(recipe.models) * (len(recipe.tasks) + len(problems) + 1)
    found: dict[str, _Found] = {}
    answered: list[Responses] = []
    with (
        sandbox(recipe.sandbox),
        atomic.publish(run.export) as export,
        console.progress("evaluating", total, unit="task") as progress,
    ):
        for name, folder in folders.items():
            with _responses(recipe, run, name, folder) as responses:
                model, template = _load(recipe, name, folder), ChatTemplate.load(folder)
                one = _Evaluation(recipe, name, model, template, problems, export / name, samples, responses, progress)
                found[name] = one.measure(folder)
            answered.append(responses)
    if recipe.use_cache is None:
        for responses in answered:
            responses.delete()
        (run.path / RESPONSES).rmdir()
    show(
        recipe.name,
        {name: one.results for name, one in found.items()},
        {name: one.speculative for name, one in found.items()},
    )
    return {f"{name}/{key}": value for name, one in found.items() for key, value in one.summary.items()}


def _check(recipe: EvalRecipe) -> None:
    """What can be known to be wrong before a model is loaded."""
    if not recipe.tasks and not recipe.problems:
        raise RecipeError(f"{recipe.name}: neither `tasks` nor `problems` are given, there is nothing to evaluate")
    for name in [*recipe.models, *recipe.problems]:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(f"{recipe.name}: '{name}' names files; use letters, digits, '.', '_' and '-'")
    ours = [*OWN_TASKS, *OWN_GROUPS]
    for task in recipe.tasks:
        if task.startswith("glmctl_") and task not in ours:
            raise unknown("task", task, ours, where=recipe.name)
        if task.startswith("glm45_") and task not in suites.SUITES:
            raise unknown("suite", task, suites.SUITES, where=recipe.name)
        if task in recipe.problems:
            raise RecipeError(f"{recipe.name}: '{task}' is the name of a task and of a problem file; rename the latter")
    for absent in suites.missing(recipe.tasks):
        console.warn(f"not run here: {absent}")
    for path in [*recipe.perplexity_texts, *recipe.needle.texts]:
        if not Path(path).is_file():
            raise RecipeError(f"{path}: no such file")


def _runs_code(recipe: EvalRecipe, problems: Mapping[str, Sequence[Problem]]) -> bool:
    """Whether anything that is asked is judged by running what the model wrote."""
    tasks = {member for name in recipe.tasks for member in OWN_GROUPS.get(name, (name,))}
    kinds = {OWN_TASKS[task].problems for task in tasks if task in OWN_TASKS}
    kinds |= {problem.task for found in problems.values() for problem in found}
    return bool(RUNS_CODE & kinds)


def _problems(path: str, limit: int | float | None) -> list[Problem]:
    if not Path(path).is_file():
        raise RecipeError(f"{path}: no such problem file")
    problems = read_problems(Path(path))
    if limit is None:
        return problems
    return problems[: math.ceil(limit * len(problems)) if limit < 1 else int(limit)]


def _responses(recipe: EvalRecipe, run: Run, name: str, folder: Path) -> Responses:
    # rounded weights give other answers
    owner = digest([fingerprint(folder), recipe.weights.get(name)])
    if recipe.use_cache is None:
        return Responses(run.path / RESPONSES / f"{name}.jsonl", owner)
    return Responses(Path(recipe.use_cache) / f"{owner[:32]}.jsonl", owner)


def _load(recipe: EvalRecipe, name: str, folder: Path) -> GlmMoe:
    model = load_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    if name in recipe.weights:
        round_weights(model, recipe.weights[name])
    return model


@dataclass(frozen=True)
class _Found:
    """What was found out about one model."""

    results: Results
    """in lm-eval's layout, without samples"""
    speculative: Mapping[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        return {**by_task(self.results), **self.speculative}


@dataclass(frozen=True)
class _Evaluation:
    """One model of the recipe, and where its answers and results go."""

    recipe: EvalRecipe
    name: str
    model: GlmMoe
    template: ChatTemplate
    problems: Mapping[str, Sequence[Problem]]
    target: Path
    samples: MetricsLog
    responses: Responses
    progress: console.Progress

    def measure(self, source: Path) -> _Found:
        """Ask everything, and write `results.json` and the samples to `target`. source: the model's folder."""
        started = time.time()
        self.target.mkdir()
        results: Results = {}
        if self.recipe.tasks:
            results = self._lm_eval()
            self.progress.advance(len(self.recipe.tasks))
        for name, problems in self.problems.items():
            self._verified(name, problems, results)
            self.progress.advance()
        speculative = self._speculative()
        self.progress.advance()
        body = document(results, self.recipe, self.name, source, self.model, self.template, started)
        write_json(self.target / "results.json", body)
        for task, rows in results.pop("samples", {}).items():
            write_rows(self.target / f"samples_{task}.jsonl", sample_rows(rows))
        return _Found(results, speculative)

    def _moved(self, kind: str, done: int, total: int) -> None:
        """Answers came in: no task is over, but the line says how far it is."""
        self.progress.advance(0, model=self.name, **{kind: f"{done}/{total}"})

    def _lm_eval(self) -> Results:
        from glmctl.evaluation.harness import Settings, run_tasks
        from glmctl.evaluation.lm import GlmctlLM
        from glmctl.evaluation.tasks import TaskInputs

        recipe = self.recipe
        lm = GlmctlLM(
            self.model,
            template=self.template,
            batch_tokens=recipe.batch_tokens,
            max_slots=recipe.max_slots,
            max_gen_toks=recipe.sampling.max_tokens,
            enable_thinking=recipe.enable_thinking,
            think_end_token=recipe.think_end_token,
            seed=recipe.seed,
            responses=self.responses,
            moved=self._moved,
        )
        inputs = TaskInputs(
            self.template,
            recipe.sampling,
            recipe.enable_thinking,
            problems=[problem for problems in self.problems.values() for problem in problems],
            samples=recipe.samples_per_problem,
            texts=[Path(path) for path in recipe.perplexity_texts],
            needle=recipe.needle,
            context=self.model.config.max_position_embeddings,
        )
        shared = {name: getattr(recipe, name) for name in Settings.__dataclass_fields__}
        return run_tasks(lm, recipe.tasks, inputs, Settings(**shared))

    def _verified(self, name: str, problems: Sequence[Problem], results: Results) -> None:
        """Multi-turn episodes judged by their environments; their figures are added to `results`."""
        recipe = self.recipe
        engine = Engine(self.model, max_slots=recipe.max_slots)
        score = score_episodes(engine, self.template, problems, recipe, self.responses, self._moved)
        figures = {
            "accuracy": score.accuracy,
            "well_formed": score.well_formed,
            "thinking_rate": score.thinking_rate,
            "mean_tokens": score.mean_tokens,
        }
        if recipe.samples_per_problem > 1:
            figures |= repeated(_rewards(score.samples))
        asked = recipe.model_dump(
            mode="json", include={"sampling", "samples_per_problem", "max_turns", "enable_thinking", "seed"}
        )
        add_verified(results, name, figures, len(problems), {**asked, "problems": recipe.problems[name]})
        rows = [_episode_row(self.name, one, self.template) for one in score.samples]
        write_rows(self.target / f"samples_{name}.jsonl", rows)
        for one in score.samples[:SHOWN]:
            self.samples.append({"model": self.name, **sample_row(one, self.template)})

    def _speculative(self) -> dict[str, Any]:
        """MTP acceptance on the first prompts of the problem files; nothing without MTP layer or problems."""
        asked = [one for problems in self.problems.values() for one in problems[: self.recipe.speculative_limit]]
        if self.model.mtp is None or not asked:
            return {}
        prompts = []
        for problem in asked:
            messages, tools = environment(problem).reset()
            thinking = self.recipe.enable_thinking
            prompt = self.template.encode_prompt(messages, tools, enable_thinking=thinking)
            if len(prompt) < self.model.config.max_position_embeddings:
                prompts.append(prompt)
        if not prompts:
            return {}
        found = check(
            self.model,
            prompts,
            max_tokens=self.recipe.sampling.max_tokens,
            stop_ids=self.template.tokenizer.eos_ids,
            max_slots=self.recipe.max_slots,
        )
        if not found.identical:
            console.warn(
                f"{self.name}: {len(found.differing)} of {len(prompts)} greedy outputs differ with MTP drafts; "
                "two-token passes round differently where two tokens are nearly equally likely"
            )
        return {"mtp_acceptance": found.acceptance, "mtp_identical": found.identical}


def _episode_row(model: str, one: Trajectory, template: ChatTemplate) -> dict[str, Any]:
    """A sample for people, and the whole text that the model saw and wrote, special tokens in sight."""
    return {
        "model": model,
        "problem_id": one.problem_id,
        "sample": one.sample,
        **sample_row(one, template),
        "text": template.tokenizer.decode(one.tokens),
    }


def _rewards(samples: Sequence[Trajectory]) -> list[list[float]]:
    """Rewards by problem; one that infrastructure failed throughout says nothing and is left out."""
    groups: dict[int, list[float]] = {}
    for one in samples:
        if one.reward is not None:
            groups.setdefault(one.group, []).append(one.reward)
    return list(groups.values())
