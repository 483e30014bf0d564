"""The verifiable tasks by name. Each module has `generate`, `demonstrate` and `environment`."""

from __future__ import annotations

from collections.abc import Callable

from glmctl.data.conversations import Conversation
from glmctl.errors import unknown
from glmctl.rl.environment import Environment, Problem
from glmctl.rl.tasks import arithmetic, tool_use

ENVIRONMENTS: dict[str, Callable[[Problem], Environment]] = {
    "arithmetic": arithmetic.environment,
    "tool_use": tool_use.environment,
}


def environment(problem: Problem) -> Environment:
    """A fresh episode of `problem`. Raises RecipeError for a task that does not exist."""
    if problem.task not in ENVIRONMENTS:
        raise unknown("task", problem.task, ENVIRONMENTS, where=problem.id)
    return ENVIRONMENTS[problem.task](problem)


def demonstrate(problem: Problem) -> Conversation:
    """The scripted solution of `problem`, for cold-start SFT."""
    return {"arithmetic": arithmetic.demonstrate, "tool_use": tool_use.demonstrate}[problem.task](problem)
