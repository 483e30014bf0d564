"""Where a trajectory takes place: the toolboxes of a recipe, made-up tools among them, or one of our environments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from glmctl import console
from glmctl.distill.agentic.actors import Actor, Malformed
from glmctl.distill.agentic.mcp_tools import McpToolbox
from glmctl.distill.agentic.openapi import OpenApiToolbox
from glmctl.distill.agentic.toolbox import (
    Arguments,
    PythonToolbox,
    Toolbox,
    ToolboxDied,
    read_declarations,
    tool_name,
)
from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.recipe.agentic import McpTools, OpenApiTools, PythonTools, SimulatedTools, ToolSource
from glmctl.rl.environment import Message, Problem, Tool, tool_calls
from glmctl.rl.tasks import environment
from glmctl.rl.tasks.function_calls import call_problem


class World(Protocol):
    """What an agent acts in during one trajectory."""

    @property
    def tools(self) -> list[Tool]: ...

    def act(self, message: Message) -> list[Message]:
        """Run a message's calls; their results. Raises ToolboxDied."""
        ...

    def answered(self, message: Message) -> float | None:
        """The verdict on an answer, 0..1; None where only judges can tell."""
        ...


class SimulatedToolbox:
    """Tools that exist on paper; a model makes up results that agree with each other."""

    def __init__(self, tools: list[Tool], simulator: Actor) -> None:
        self.tools = tools
        self._simulator = simulator
        self._past: list[str] = []

    def call(self, name: str, arguments: Arguments) -> str:
        """See `Toolbox`."""
        declared = next(tool["function"] for tool in self.tools if tool_name(tool) == name)
        past = "\n".join(self._past) or "(none)"
        request = (
            f"Play the server behind this function:\n{json.dumps(declared, ensure_ascii=False)}\n\n"
            f"Calls so far and what they returned:\n{past}\n\n"
            f"Now it is called with {json.dumps(dict(arguments), ensure_ascii=False)}. Write what it returns, as JSON "
            "or plain text, realistic and in agreement with the calls so far, and nothing else."
        )
        # a simulator that loses the format breaks this trajectory off, as a teacher that does
        said = self._simulator.reply([{"role": "user", "content": request}], None, thinking=False, seed=len(self._past))
        result = str(said.get("content") or "").strip()
        self._past.append(f"{name}({json.dumps(dict(arguments), ensure_ascii=False)}) -> {result}")
        return result

    def forget(self) -> None:
        """Begin a new trajectory."""
        self._past = []

    def close(self) -> None:
        """Nothing is held."""


class Workbench:
    """All tools of a recipe, opened once for one worker; a server that died is started again."""

    def __init__(self, sources: Sequence[ToolSource], simulator: Actor | None) -> None:
        """RecipeError, DataError or EnvironmentProblem when a source cannot be opened, or two tools share a name."""
        self._sources = [source for source in sources if source.type != "problems"]
        self._simulator = simulator
        self._restarts = [source.restarts if isinstance(source, McpTools) else 0 for source in self._sources]
        self._used = [False] * len(self._sources)
        self._died = 0
        """place of the source that broke down last"""
        self._boxes: list[Toolbox] = []
        try:
            for source in self._sources:
                self._boxes.append(self._open(source))
            self._owners = {tool_name(tool): at for at, box in enumerate(self._boxes) for tool in box.tools}
        except BaseException:
            self.close()
            raise
        names = [tool_name(tool) for tool in self.tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            self.close()
            raise RecipeError(f"tools: two sources have a tool '{twice}'")

    @property
    def tools(self) -> list[Tool]:
        """Of all sources, in their order."""
        return [tool for box in self._boxes for tool in box.tools]

    def begin(self) -> None:
        """A new trajectory: nothing of the last one is left in simulated tools and in servers that are `fresh`."""
        for at, source in enumerate(self._sources):
            box = self._boxes[at]
            if isinstance(box, SimulatedToolbox):
                box.forget()
            elif isinstance(source, McpTools) and source.fresh and self._used[at]:
                self._reopen(at)

    def act(self, message: Message) -> list[Message]:
        """See `World`. A call that breaks the protocol is answered with what is wrong, and goes to no tool."""
        return [{"role": "tool", "content": self._result(call)} for call in tool_calls(message)]

    def answered(self, message: Message) -> float | None:
        """See `World`."""
        return None

    def revive(self, error: ToolboxDied) -> None:
        """Start the server that died again. EnvironmentProblem when there is nothing to start, or too often."""
        if not self._restarts[self._died]:
            raise EnvironmentProblem(str(error), hint="the same command continues") from error
        console.warn(f"{error}; starting it again")
        self._restarts[self._died] -= 1
        self._reopen(self._died)

    def close(self) -> None:
        """Give everything back."""
        for box in self._boxes:
            box.close()

    def _result(self, call: dict[str, Any]) -> str:
        problem = call_problem(call, self.tools)
        if problem:
            return f"error: {problem}"
        at = self._owners[call["name"]]
        self._used[at] = True
        try:
            return self._boxes[at].call(call["name"], call["arguments"])
        except ToolboxDied:
            self._died = at
            raise

    def _reopen(self, at: int) -> None:
        self._boxes[at].close()
        self._boxes[at] = self._open(self._sources[at])
        self._used[at] = False

    def _open(self, source: ToolSource) -> Toolbox:
        if isinstance(source, PythonTools):
            return PythonToolbox(source)
        if isinstance(source, OpenApiTools):
            return OpenApiToolbox(source)
        if isinstance(source, McpTools):
            return McpToolbox(source)
        assert isinstance(source, SimulatedTools)
        assert self._simulator is not None, "the recipe has checked it"
        return SimulatedToolbox(read_declarations(Path(source.path)), self._simulator)


class EnvironmentWorld:
    """One of our own environments, deterministic, with a verdict of its own."""

    def __init__(self, problem: Problem) -> None:
        self._environment = environment(problem)
        self.opening, tools = self._environment.reset()
        self.tools: list[Tool] = tools or []

    def act(self, message: Message) -> list[Message]:
        """See `World`. A call that the environment ends the episode over raises Malformed."""
        transition = self._environment.step(message)
        if transition.done:
            raise Malformed(str(transition.info.get("problem", "the environment ended the episode")))
        return transition.messages

    def answered(self, message: Message) -> float | None:
        """See `World`."""
        transition: Any = self._environment.step(message)
        return transition.reward if transition.done else None
