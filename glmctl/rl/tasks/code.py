"""Small Python functions, judged by hidden unit tests in the sandbox.

Each kind is a short prompt, a reference solution with a number in it, and a way to draw arguments. They are small on
purpose: a model of a few million parameters can learn them. The reward is 1 iff every hidden case passes.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glmctl.data.conversations import Conversation
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import CodeTask, SandboxSpec
from glmctl.rl.environment import Environment, Problem
from glmctl.rl.sandbox.execute import current, run_tests
from glmctl.rl.tasks.single_turn import SingleTurn

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
ENTRY = "f"


@dataclass(frozen=True)
class Kind:
    """`prompt`, `body` and `slip` are format strings over the number n; `solve` is the body's function for us."""

    prompt: str
    body: str
    slip: str
    """what somebody writes who does not look closely; wrong"""
    draw: Callable[[random.Random], list[Any]]
    solve: Callable[[int, list[Any]], Any]


def _number(rng: random.Random) -> list[Any]:
    return [rng.randint(-50, 50)]


def _numbers(rng: random.Random) -> list[Any]:
    return [[rng.randint(-9, 9) for _ in range(rng.randint(1, 6))]]


def _word(rng: random.Random) -> list[Any]:
    return ["".join(rng.choice("abcde") for _ in range(rng.randint(1, 6)))]


KINDS: dict[str, Kind] = {
    "add": Kind("returns x plus {n}", "x + {n}", "x - {n}", _number, lambda n, a: a[0] + n),
    "times": Kind("returns x times {n}", "x * {n}", "x + {n}", _number, lambda n, a: a[0] * n),
    "rest": Kind("returns the rest of x divided by {n}", "x % {n}", "x // {n}", _number, lambda n, a: a[0] % n),
    "above": Kind("tells whether x is above {n}", "x > {n}", "x < {n}", _number, lambda n, a: a[0] > n),
    "sum": Kind(
        "returns the sum of the list x plus {n}", "sum(x) + {n}", "sum(x) - {n}", _numbers, lambda n, a: sum(a[0]) + n
    ),
    "most": Kind(
        "returns the largest of the list x and {n}",
        "max(x + [{n}])",
        "min(x + [{n}])",
        _numbers,
        lambda n, a: max([*a[0], n]),
    ),
    "scale": Kind(
        "returns the list x with each number times {n}",
        "[y * {n} for y in x]",
        "[y + {n} for y in x]",
        _numbers,
        lambda n, a: [y * n for y in a[0]],
    ),
    "keep": Kind(
        "returns the numbers of the list x below {n}",
        "[y for y in x if y < {n}]",
        "[y for y in x if y > {n}]",
        _numbers,
        lambda n, a: [y for y in a[0] if y < n],
    ),
    "repeat": Kind("returns the string x {n} times", "x * {n}", "x + {n}", _word, lambda n, a: a[0] * n),
    "first": Kind("returns the first {n} letters of x", "x[:{n}]", "x[{n}:]", _word, lambda n, a: a[0][:n]),
}


def generate(spec: CodeTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` distinct problems, each with `spec.cases` hidden cases. Raises RecipeError when there are fewer."""
    every = [(kind, n) for kind in KINDS for n in range(2, spec.max_value + 1)]
    if len(every) < count:
        raise RecipeError(f"task.max_value: {len(every)} different problems exist, {count} are asked for")
    problems = []
    for kind, n in rng.sample(every, count):
        text = f"Write a Python function f(x) that {KINDS[kind].prompt.format(n=n)}."
        calls = [KINDS[kind].draw(rng) for _ in range(spec.cases)]
        state = {"kind": kind, "cases": [[call, KINDS[kind].solve(n, call)] for call in calls]}
        problems.append(Problem(f"code/{kind}/{n}", "code", text, n, state))
    return problems


def demonstrate(problem: Problem, *, hasty: bool = False) -> Conversation:
    """The reference solution in a fence; a hasty one has the kind's slip in it."""
    kind = KINDS[problem.state["kind"]]
    body = (kind.slip if hasty else kind.body).format(n=problem.answer)
    content = f"```python\ndef {ENTRY}(x):\n    return {body}\n```"
    answer = {"role": "assistant", "reasoning_content": problem.state["kind"], "content": content}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One function, tested in the sandbox. Raises DataError for a problem without cases."""
    if not problem.state.get("cases"):
        raise DataError(f"problem {problem.id}: 'state' holds no cases")
    return SingleTurn(problem, _judge)


def written_code(content: str) -> str | None:
    """The last fenced block of an answer; None without one."""
    blocks = _FENCE.findall(content)
    return str(blocks[-1]) if blocks else None


def _judge(problem: Problem, content: str) -> float:
    code = written_code(content)
    if code is None:
        return 0.0
    return float(_passes(code, json.dumps(problem.state["cases"]), current()))


@functools.lru_cache(maxsize=4096)
def _passes(code: str, cases: str, spec: SandboxSpec) -> bool:
    """Whether `code` passes all of `cases` (JSON) in a box of `spec`.

    The samples of a prompt are often the same program, and starting a box costs more than running it, so a verdict
    is kept; a failure of box or judge is raised and not kept.
    """
    found = run_tests(code, ENTRY, [(arguments, expected) for arguments, expected in json.loads(cases)])
    return found.passed == found.total
