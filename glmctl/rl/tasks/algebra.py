"""Linear equations in one unknown with a rational solution, judged by math-verify: `1/2`, `0.5`, `x = \\frac12` agree.

Needs the extra `rl`. The judge runs in the verifier's process: symbolic algebra on what a model wrote may not end.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from glmctl.data.conversations import Conversation
from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.recipe.schema import AlgebraTask
from glmctl.rl.environment import Environment, Problem
from glmctl.rl.tasks.single_turn import SingleTurn
from glmctl.rl.verifier import verify

VERIFIER = "glmctl.rl.tasks.algebra:judge"


def generate(spec: AlgebraTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` distinct equations a x + b = c, |a|, |b|, |c| up to max_value, a not 0.

    Raises RecipeError when there are not clearly more than `count` different ones.
    """
    top = spec.max_value
    if 2 * top * (2 * top + 1) ** 2 < 3 * count:
        raise RecipeError(f"task.max_value: {top} gives too few equations for {count}; raise it")
    found: dict[str, Problem] = {}
    while len(found) < count:
        a, b, c = (rng.randint(-top, top) for _ in range(3))
        if a == 0:
            continue
        text = f"{a}x{b:+d}={c}"
        found[text] = Problem(f"algebra/{text}", "algebra", f"Solve {text} for x.", str(Fraction(c - b, a)))
    return list(found.values())


def demonstrate(problem: Problem) -> Conversation:
    """Two steps as reasoning, then the value."""
    equation = problem.prompt.removeprefix("Solve ").removesuffix(" for x.")
    left, _, right = equation.partition("=")
    a, _, rest = left.partition("x")
    reasoning = f"{a}x={int(right) - int(rest)}\nx={problem.answer}"
    answer = {"role": "assistant", "reasoning_content": reasoning, "content": str(problem.answer)}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One equation, one value. Raises EnvironmentProblem without math-verify."""
    if importlib.util.find_spec("math_verify") is None:
        raise EnvironmentProblem("task algebra needs math-verify", hint="pip install 'glmctl[rl]'")
    return SingleTurn(problem, lambda one, content: verify(VERIFIER, content, one))


def judge(reply: str, problem: Mapping[str, Any]) -> float:
    """1 iff math-verify finds the reply's value equal to the answer."""
    from math_verify import parse, verify

    # the process has a limit of its own; math-verify's uses SIGALRM
    found = parse(reply.strip().removeprefix("x").lstrip(" ="), parsing_timeout=None)
    wanted = parse(str(problem["answer"]), parsing_timeout=None)
    return float(bool(found) and verify(wanted, found, timeout_seconds=None))
