"""Calls whose argument is code: `run` is to be called with exactly the lines that the question shows.

What is hard here is writing, not thinking: quotes, backslashes and line breaks have to arrive as they are. It is the
probe for how a format of tool calls carries code (spec section 3.2; the report's reason for tags).
"""

from __future__ import annotations

import random

from glmctl.data.conversations import Conversation
from glmctl.errors import RecipeError
from glmctl.recipe.schema import CodeCallsTask
from glmctl.rl.environment import (
    Environment,
    Message,
    Problem,
    StopReason,
    Tool,
    Transition,
    content_id,
    finished,
    tool_calls,
)
from glmctl.rl.tasks.function_calls import call_problem, same_call

TOOLS: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "parameters": {"type": "object", "properties": {"source": {"type": "string"}}, "required": ["source"]},
        },
    }
]
NAMES = ("a", "b", "c", "x", "y", "z")
LINES = (
    "{n} = {d}",
    'print("{n}")',
    "{n} = '{m}'",
    'print("{n}\\n")',
    'if {n} == "{m}":\n    {n} = {d}',
    "print(f'{n}=\"{d}\"')",
    '{n} = "\\t" + {m}',
)
"""with the signs that JSON escapes: quotes, backslashes, line breaks"""


def generate(spec: CodeCallsTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` problems with distinct code. Raises RecipeError when so few lines cannot tell so many apart."""
    found: dict[str, Problem] = {}
    for _ in range(50 * count):
        lines = [_line(rng) for _ in range(rng.randint(*spec.lines))]
        code = "\n".join(lines)
        found.setdefault(code, Problem(content_id("code_calls", code), "code_calls", f"Run this:\n{code}", code))
        if len(found) == count:
            return list(found.values())
    raise RecipeError(f"task.lines: {len(found)} different problems were found, {count} are asked for")


def _line(rng: random.Random) -> str:
    line = rng.choice(LINES)
    for key, value in (("{n}", rng.choice(NAMES)), ("{m}", rng.choice(NAMES)), ("{d}", str(rng.randint(0, 9)))):
        line = line.replace(key, value)
    return line


def demonstrate(problem: Problem) -> Conversation:
    """The call."""
    turn: Message = {"role": "assistant", "reasoning_content": "run it", "content": ""}
    turn["tool_calls"] = [{"type": "function", "function": _wanted(problem)}]
    return Conversation([{"role": "user", "content": problem.prompt}, turn], TOOLS)


def environment(problem: Problem) -> Environment:
    """One turn: the call is compared, sign for sign."""
    return CodeCallsEnvironment(problem)


class CodeCallsEnvironment:
    """Ends at the first message."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def reset(self) -> tuple[list[Message], list[Tool] | None]:
        return [{"role": "user", "content": self.problem.prompt}], TOOLS

    def step(self, message: Message) -> Transition:
        calls = tool_calls(message)
        broken = next((problem for call in calls if (problem := call_problem(call, TOOLS))), None)
        if broken is not None:
            return finished(0.0, StopReason.MALFORMED, problem=broken)
        right = len(calls) == 1 and same_call(calls[0], _wanted(self.problem))
        return finished(float(right), StopReason.ANSWERED)


def _wanted(problem: Problem) -> dict[str, object]:
    return {"name": "run", "arguments": {"source": str(problem.answer)}}
