"""The eval driver: every model of the recipe on its tasks and problems, results in lm-eval's own format.

`<export>/<model>/results.json` holds what lm-eval writes, our multi-turn scores beside it, and
`samples_<task>.jsonl` every document with its answer. The summary has one figure a model and task (`<model>/<task>`)
and the rest beside it (`<model>/<task>_<metric>`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.engine.rounding import round_weights
from glmctl.errors import RecipeError, unknown
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.evaluation.results import add_verified, by_task, document, write_json, write_rows
from glmctl.evaluation.speculative import check
from glmctl.evaluation.statistics import repeated
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import EvalRecipe
from glmctl.rl.environment import Problem, read_problems
from glmctl.rl.episode import Trajectory
from glmctl.rl.journal import sample_row
from glmctl.rl.score import score_problems
from glmctl.rl.tasks import environment
from glmctl.run import atomic
from glmctl.run.directory import Run, resolve_model
from glmctl.run.headline import figure, words
from glmctl.run.metrics import MetricsLog

SHOWN = 4
"""answers to each problem file that go into samples.jsonl"""


def run(recipe: EvalRecipe, run: Run) -> dict[str, Any]:
    """Score every model and return the summary. Raises RecipeError for a task, model or file that does not exist."""
    problems = {name: _problems(path, recipe.limit) for name, path in recipe.problems.items()}
    _check(recipe)
    folders = {name: resolve_model(path) for name, path in recipe.models.items()}
    run.samples.unlink(missing_ok=True)
    samples = MetricsLog(run.samples)
    summary: dict[str, Any] = {}
    total = len(recipe.models) * (len(recipe.tasks) + len(problems) + 1)
    with atomic.publish(run.export) as export, console.progress("evaluating", total, unit="task") as progress:
        for name, folder in folders.items():
            model, template = load_model(folder), ChatTemplate.load(folder)
            if name in recipe.weights:
                round_weights(model, recipe.weights[name])
            one = _Evaluation(recipe, name, model, template, problems, export / name, samples)
            for key, value in one.measure(progress).items():
                summary[f"{name}/{key}"] = value
    _show(recipe.name, summary, list(recipe.models))
    return summary


def _check(recipe: EvalRecipe) -> None:
    """What can be known to be wrong before a model is loaded."""
    if not recipe.tasks and not recipe.problems:
        raise RecipeError(f"{recipe.name}: neither `tasks` nor `problems` are given, there is nothing to evaluate")
    for name in [*recipe.models, *recipe.problems]:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(f"{recipe.name}: '{name}' names files; use letters, digits, '.', '_' and '-'")
    for task in recipe.tasks:
        if task.startswith("glmctl_") and task not in OWN_TASKS:
            raise unknown("task", task, OWN_TASKS, where=recipe.name)
        if task in recipe.problems:
            raise RecipeError(f"{recipe.name}: '{task}' is the name of a task and of a problem file; rename the latter")
    for path in recipe.perplexity_texts:
        if not Path(path).is_file():
            raise RecipeError(f"{path}: no such file")


def _problems(path: str, limit: int | None) -> list[Problem]:
    if not Path(path).is_file():
        raise RecipeError(f"{path}: no such problem file")
    return read_problems(Path(path))[:limit]


class _Evaluation:
    """One model of the recipe."""

    def __init__(
        self,
        recipe: EvalRecipe,
        name: str,
        model: GlmMoe,
        template: ChatTemplate,
        problems: Mapping[str, Sequence[Problem]],
        folder: Path,
        samples: MetricsLog,
    ) -> None:
        self.recipe, self.name, self.model, self.template = recipe, name, model, template
        self.problems, self.folder, self.samples = problems, folder, samples

    def measure(self, progress: console.Progress) -> dict[str, Any]:
        """Everything about this model; keys without the model's name."""
        started = time.time()
        self.folder.mkdir()
        summary: dict[str, Any] = {}
        results: dict[str, Any] = {}
        if self.recipe.tasks:
            results = self._lm_eval()
            summary |= by_task(results)
            progress.advance(len(self.recipe.tasks), model=self.name)
        for name, problems in self.problems.items():
            summary |= self._verified(name, problems, results)
            progress.advance(model=self.name)
        summary |= self._speculative()
        progress.advance(model=self.name)
        self._write(results, started)
        return summary

    def _lm_eval(self) -> dict[str, Any]:
        from glmctl.evaluation.harness import run_tasks
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
            seed=recipe.seed,
        )
        inputs = TaskInputs(
            self.template,
            recipe.sampling,
            recipe.enable_thinking,
            problems=[problem for problems in self.problems.values() for problem in problems],
            texts=[Path(path) for path in recipe.perplexity_texts],
        )
        return run_tasks(
            lm,
            recipe.tasks,
            inputs,
            limit=recipe.limit,
            num_fewshot=recipe.num_fewshot,
            apply_chat_template=recipe.apply_chat_template,
            bootstrap_iters=recipe.bootstrap_iters,
        )

    def _verified(self, name: str, problems: Sequence[Problem], results: dict[str, Any]) -> dict[str, float]:
        """Multi-turn episodes judged by their environments."""
        recipe = self.recipe
        score = score_problems(
            Engine(self.model, max_slots=recipe.max_slots),
            self.template,
            problems,
            sampling=recipe.sampling,
            enable_thinking=recipe.enable_thinking,
            seed=recipe.seed,
            max_turns=recipe.max_turns,
            samples=recipe.samples_per_problem,
        )
        figures = {
            "accuracy": score.accuracy,
            "well_formed": score.well_formed,
            "thinking_rate": score.thinking_rate,
            "mean_tokens": score.mean_tokens,
        }
        if recipe.samples_per_problem > 1:
            figures |= repeated(_rewards(score.samples))
        add_verified(results, name, figures, len(problems))
        rows = [{"model": self.name, **sample_row(one, self.template)} for one in score.samples]
        write_rows(self.folder / f"samples_{name}.jsonl", rows)
        for row in rows[:SHOWN]:
            self.samples.append(row)
        beside = {f"{name}_{key}": value for key, value in figures.items() if key != "accuracy"}
        return {name: score.accuracy, **beside}

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

    def _write(self, results: dict[str, Any], started: float) -> None:
        recipe = self.recipe
        config = {
            "model_args": {"pretrained": recipe.models[self.name]},
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": recipe.weights.get(self.name, str(self.model.dtype)),
            **recipe.model_dump(
                mode="json",
                include={"limit", "num_fewshot", "bootstrap_iters", "sampling", "samples_per_problem", "max_turns"},
            ),
            **recipe.model_dump(mode="json", include={"enable_thinking", "apply_chat_template", "seed"}),
        }
        write_json(self.folder / "results.json", document(results, config, started))
        for task, rows in results.get("samples", {}).items():
            write_rows(self.folder / f"samples_{task}.jsonl", rows)


def _rewards(samples: Sequence[Trajectory]) -> list[list[float]]:
    """Rewards by problem; one that infrastructure failed throughout says nothing and is left out."""
    groups: dict[int, list[float]] = {}
    for one in samples:
        if one.reward is not None:
            groups.setdefault(one.group, []).append(one.reward)
    return list(groups.values())


def _show(title: str, summary: Mapping[str, Any], models: Sequence[str]) -> None:
    """A table of tasks by models."""
    tasks = list(dict.fromkeys(key.partition("/")[2] for key in summary))
    found = [[summary.get(f"{model}/{task}") for model in models] for task in tasks]
    rows = [
        [words(task), *("" if value is None else figure(task, value) for value in values)]
        for task, values in zip(tasks, found, strict=True)
    ]
    console.table(title, ["task", *models], rows)
