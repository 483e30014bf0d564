"""Integer expressions, worked left to right in the reasoning; the final content is the bare number.

`+` and `-` appear in expressions of any length, where left to right is the mathematical order. `*` appears only
in expressions of two terms, so that no rule of precedence is needed anywhere.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

from glmctl.data.conversations import Conversation
from glmctl.errors import RecipeError
from glmctl.recipe.schema import ArithmeticTask
from glmctl.rl.environment import Environment, Message, Problem, StopReason, Tool, Transition, finished, tool_calls

_TOKEN = re.compile(r"\d+|[-+*]")
_ANSWER = re.compile(r"[+-]?[0-9]{1,18}")


def generate(spec: ArithmeticTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` distinct problems, the number of terms uniform over `spec.terms`, operands uniform in 0..max_value.

    Raises RecipeError when the task has fewer than `count` different expressions, or needs `*` in three terms.
    """
    low, high = spec.terms
    if not 2 <= low <= high:
        raise RecipeError(f"task.terms: need 2 <= first <= second, found {list(spec.terms)}")
    if high > 2 and not set(spec.operators) - {"*"}:
        raise RecipeError("task.operators: '*' is used in two-term expressions only; give terms: [2, 2]")
    space = sum(_expressions_of(spec, terms) for terms in range(low, high + 1))
    if space < count:
        raise RecipeError(f"task: {space} different expressions exist, {count} are asked for; raise max_value or terms")
    if space < 3 * count:
        # rejection would stall near exhaustion
        expressions = rng.sample(list(_all_expressions(spec)), count)
    else:
        distinct: dict[str, None] = {}
        while len(distinct) < count:
            distinct[_draw(spec, rng)] = None
        expressions = list(distinct)
    return [Problem(f"arithmetic/{text}", "arithmetic", f"Compute {text}.", work(text)[1]) for text in expressions]


def work(expression: str) -> tuple[list[str], int]:
    """The steps (`34+57=91`, `91-12=79`) and the value of an expression, left to right."""
    first, *rest = _TOKEN.findall(expression)
    value, lines = int(first), []
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        before, value = value, _apply(value, operator, int(operand))
        lines.append(f"{before}{operator}{operand}={value}")
    return lines, value


def demonstrate(problem: Problem, *, hasty: bool = False) -> Conversation:
    """The scripted solution: one step a line as reasoning, then the bare number.

    A hasty one is right too, but its reasoning is the whole expression and its value at once. A model can copy the
    manner and seldom the result, so a cold start that mixes both leaves RL to find out which manner pays.
    """
    expression = problem.prompt.removeprefix("Compute ").removesuffix(".")
    lines, value = work(expression)
    if hasty:
        lines = [f"{expression}={value}"]
    answer: Message = {"role": "assistant", "reasoning_content": "\n".join(lines), "content": str(value)}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One question, one answer."""
    return ArithmeticEnvironment(problem)


class ArithmeticEnvironment:
    """Reward 1 iff the final content is exactly the value (spaces and one final full stop apart), else 0."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def reset(self) -> tuple[list[Message], list[Tool] | None]:
        return [{"role": "user", "content": self.problem.prompt}], None

    def step(self, message: Message) -> Transition:
        if tool_calls(message):
            return finished(0.0, StopReason.MALFORMED, problem="a tool was called where none is on offer")
        value = parse_integer(str(message.get("content") or ""))
        return finished(float(value == self.problem.answer), StopReason.ANSWERED, value=value)


def parse_integer(content: str) -> int | None:
    """The integer that `content` is, or None: surrounding white space and one final full stop are forgiven."""
    text = content.strip().removesuffix(".")
    return int(text) if _ANSWER.fullmatch(text) else None


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def _operators(spec: ArithmeticTask, terms: int) -> list[str]:
    allowed = sorted(set(spec.operators))
    return allowed if terms == 2 else [operator for operator in allowed if operator != "*"]


def _expressions_of(spec: ArithmeticTask, terms: int) -> int:
    return int((spec.max_value + 1) ** terms * len(_operators(spec, terms)) ** (terms - 1))


def _join(values: tuple[int, ...], operators: tuple[str, ...]) -> str:
    return str(values[0]) + "".join(f"{op}{value}" for op, value in zip(operators, values[1:], strict=True))


def _draw(spec: ArithmeticTask, rng: random.Random) -> str:
    terms = rng.randint(*spec.terms)
    values = tuple(rng.randint(0, spec.max_value) for _ in range(terms))
    return _join(values, tuple(rng.choice(_operators(spec, terms)) for _ in range(terms - 1)))


def _all_expressions(spec: ArithmeticTask) -> Iterator[str]:
    for terms in range(spec.terms[0], spec.terms[1] + 1):
        for values in itertools.product(range(spec.max_value + 1), repeat=terms):
            for operators in itertools.product(_operators(spec, terms), repeat=terms - 1):
                yield _join(values, operators)
