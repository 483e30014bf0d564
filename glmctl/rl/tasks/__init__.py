"""The verifiable tasks by name. Each module has `generate`, `demonstrate` and `environment`."""

from __future__ import annotations

import random
from typing import Protocol

from glmctl.data.conversations import Conversation
from glmctl.errors import unknown
from glmctl.recipe.schema import Task
from glmctl.rl.environment import Environment, Problem
from glmctl.rl.tasks import algebra, arithmetic, code, code_calls, custom, gym, instructions, science, tool_use


class _Module(Protocol):
    def demonstrate(self, problem: Problem) -> Conversation: ...

    def environment(self, problem: Problem) -> Environment: ...


TASKS: dict[str, _Module] = {
    "algebra": algebra,
    "arithmetic": arithmetic,
    "code": code,
    "code_calls": code_calls,
    "custom": custom,
    "gym": gym,
    "instructions": instructions,
    "science": science,
    "tool_use": tool_use,
}

RUNS_CODE = frozenset({"code"})
"""tasks that run what the model wrote, and so need the sandbox"""


def environment(problem: Problem) -> Environment:
    """A fresh episode of `problem`. Raises RecipeError for a task that does not exist."""
    if problem.task not in TASKS:
        raise unknown("task", problem.task, TASKS, where=problem.id)
    return TASKS[problem.task].environment(problem)


def demonstrate(problem: Problem) -> Conversation:
    """The scripted solution of `problem`, for cold-start SFT."""
    return TASKS[problem.task].demonstrate(problem)


def generate(spec: Task, count: int, rng: random.Random) -> list[Problem]:
    """`count` problems with distinct prompts. Raises RecipeError when the task has too few."""
    match spec.type:
        case "algebra":
            return algebra.generate(spec, count, rng)
        case "arithmetic":
            return arithmetic.generate(spec, count, rng)
        case "code":
            return code.generate(spec, count, rng)
        case "code_calls":
            return code_calls.generate(spec, count, rng)
        case "custom":
            return custom.generate(spec, count, rng)
        case "gym":
            return gym.generate(spec, count, rng)
        case "instructions":
            return instructions.generate(spec, count, rng)
        case "science":
            return science.generate(spec, count, rng)
        case "tool_use":
            return tool_use.generate(spec, count, rng)
