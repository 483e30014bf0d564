"""One question, one answer: the environment of every task without tools, given how an answer is judged."""

from __future__ import annotations

from collections.abc import Callable

from glmctl.rl.environment import Message, Problem, StopReason, Tool, Transition, finished, tool_calls

Judge = Callable[[Problem, str], float]
"""the problem and the final content -> reward in -1..1; may raise InfrastructureFailure"""


class SingleTurn:
    """Shows the prompt, judges the first answer. A tool call is malformed: none is on offer."""

    def __init__(self, problem: Problem, judge: Judge) -> None:
        self.problem = problem
        self.judge = judge

    def reset(self) -> tuple[list[Message], list[Tool] | None]:
        return [{"role": "user", "content": self.problem.prompt}], None

    def step(self, message: Message) -> Transition:
        if tool_calls(message):
            return finished(0.0, StopReason.MALFORMED, problem="a tool was called where none is on offer")
        return finished(self.judge(self.problem, str(message.get("content") or "")), StopReason.ANSWERED)
