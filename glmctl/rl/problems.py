"""Stage `problems`: generate verifiable problems, split them, and write scripted demonstrations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from glmctl import console
from glmctl.data.conversations import Conversation
from glmctl.errors import RecipeError
from glmctl.recipe.schema import ArithmeticTask, CodeTask, ProblemsRecipe, ToolUseTask
from glmctl.rl import tasks
from glmctl.rl.environment import Problem
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import arithmetic, code, tool_use
from glmctl.run import atomic
from glmctl.run.directory import Run


def run(recipe: ProblemsRecipe, run: Run) -> dict[str, Any]:
    """Write train.jsonl, heldout.jsonl (disjoint by prompt) and cold_start.jsonl into the run's export folder.

    A task with tools also gets undeclared.jsonl: every training problem demonstrated without the declarations of its
    tools. Most of a tool conversation is the same declarations again; without them the same tokens of mid-training hold
    several times as many arguments copied from question to call, which is the skill that a small model learns last.
    The same recipe writes the same bytes. Raises RecipeError when the task has too few different problems.
    """
    if recipe.cold_start > recipe.train:
        raise RecipeError(f"cold_start ({recipe.cold_start}) exceeds train ({recipe.train}): it is drawn from it")
    problems = generate(recipe)
    heldout, train = problems[: recipe.heldout], problems[recipe.heldout :]
    demonstrations = [show(problem, recipe).row() for problem in train[: recipe.cold_start]]
    with atomic.publish(run.export) as folder:
        atomic.write_text(folder / "train.jsonl", _lines(problem.to_row() for problem in train))
        atomic.write_text(folder / "heldout.jsonl", _lines(problem.to_row() for problem in heldout))
        atomic.write_text(folder / "cold_start.jsonl", _lines(demonstrations))
        if any("tools" in row for row in demonstrations):
            bare = (replace(show(problem, recipe), tools=None).row() for problem in train)
            atomic.write_text(folder / "undeclared.jsonl", _lines(bare))
    console.note(f"{recipe.task.type}: for example {train[0].prompt!r} -> {train[0].answer}")
    return {"train": len(train), "heldout": len(heldout), "cold_start": len(demonstrations), "task": recipe.task.type}


def generate(recipe: ProblemsRecipe) -> list[Problem]:
    """Train + held-out problems with distinct prompts, a pure function of the recipe."""
    rng = random.Random(derive_seed(recipe.seed, "problems", recipe.task.type))
    count = recipe.train + recipe.heldout
    return tasks.generate(recipe.task, count, rng)


def show(problem: Problem, recipe: ProblemsRecipe) -> Conversation:
    """The demonstration of one training problem, in the manner that the recipe's shares and seed give it."""
    task = recipe.task
    if not isinstance(task, ArithmeticTask | CodeTask | ToolUseTask):
        return tasks.demonstrate(problem)
    hasty = random.Random(derive_seed(recipe.seed, "manner", problem.id)).random() < task.hasty
    match task.type:
        case "arithmetic":
            return arithmetic.demonstrate(problem, hasty=hasty)
        case "code":
            return code.demonstrate(problem, hasty=hasty)
        case "tool_use":
            return tool_use.demonstrate(problem, hasty=hasty)


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
