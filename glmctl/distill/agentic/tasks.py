"""Step 2 of agentic data, task synthesis: from files, from a model that reads the tools, or from our own problems."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.distill.agentic.actors import Actor, Malformed
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.agentic import TaskSynthesis
from glmctl.rl.environment import Problem, Tool
from glmctl.rl.seeds import derive_seed

_LIST = re.compile(r"\[.*\]", re.DOTALL)
MAX_TRIES = 3
"""requests without a usable task after which the writer is given up"""


@dataclass(frozen=True)
class AgentTask:
    """Something a person wants done with tools."""

    id: str
    prompt: str
    """the first user message"""
    goal: str = ""
    """what the person wants in the end: known to the user simulator and to the judges only"""
    script: list[dict[str, Any]] = field(default_factory=list)
    """for the scripted teacher: one entry a user message, {user?, calls, answer}; `user` says it from the second on"""
    expect: dict[str, Any] = field(default_factory=dict)
    """for the rules: {calls: [names that must have been called], answer: text that the last answer must hold}"""
    problem: Problem | None = None
    """of one of our own environments, which then runs the tools and gives the verdict"""


def read_tasks(paths: Sequence[str]) -> list[AgentTask]:
    """Tasks of JSON lines. RecipeError for a file that is not there, DataError with file:line for a bad row."""
    found = []
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"{path}: no such file")
        # not splitlines, which also parts at characters that JSON leaves as they are
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                found.append(_task_of(line, f"{path.name}:{number}", f"{path}:{number}"))
    return found


def _task_of(line: str, name: str, where: str) -> AgentTask:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise DataError(f"{where}: a task is an object with a 'prompt'")
    script, expect = row.get("script") or [], row.get("expect") or {}
    if not isinstance(expect, dict) or not isinstance(script, list):
        raise DataError(f"{where}: 'script' is a list and 'expect' an object")
    for turn in script:
        if not isinstance(turn, dict) or not isinstance(turn.get("answer"), str):
            raise DataError(f"{where}: every turn of a script has an 'answer'")
        for call in turn.get("calls") or []:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                raise DataError(f"{where}: a call of a script has a 'name' and 'arguments'")
            call.setdefault("arguments", {})
    return AgentTask(str(row.get("id", name)), row["prompt"], str(row.get("goal", "")), script, expect)


# ----------------------------------------------------------------------------- a model writes them


def synthesise(spec: TaskSynthesis, writer: Actor, tools: Sequence[Tool], seed: int) -> list[AgentTask]:
    """The tasks that `spec` asks for, proposed by `writer` for a few tools at a time.

    Of many scattered tools a representative subset is shown first: each request takes the next ones of a shuffled
    round, so all come to be used before any is used again. DataError when the writer keeps giving no tasks.
    """
    found: dict[str, AgentTask] = {}
    for kind, wanted in (("single", spec.single_step), ("multi", spec.multi_step)):
        tries, asked = 0, 0
        have = len(found)
        while len(found) - have < wanted:
            shown = _subset(tools, spec.tools_per_request, derive_seed(seed, kind), asked)
            before = len(found)
            for prompt, goal in _proposed(writer, shown, kind, spec.per_request, derive_seed(seed, kind, asked)):
                if len(found) - have < wanted:
                    found.setdefault(prompt, AgentTask(f"{kind}/{len(found)}", prompt, goal))
            asked += 1
            tries = 0 if len(found) > before else tries + 1
            if tries == MAX_TRIES:
                raise DataError(f"synthesis: {MAX_TRIES} replies in a row held no new {kind}-step task")
    console.note(f"synthesis: {len(found)} tasks, for example: {next(iter(found), '')}")
    return list(found.values())


def _subset(tools: Sequence[Tool], size: int, seed: int, request: int) -> list[Tool]:
    """The `request`-th run of `size` tools of an endless sequence of shuffled rounds."""
    drawn: list[Tool] = []
    for place in range(request * size, request * size + min(size, len(tools))):
        turn, at = divmod(place, len(tools))
        order = random.Random(derive_seed(seed, turn)).sample(range(len(tools)), len(tools))
        if tools[order[at]] not in drawn:
            drawn.append(tools[order[at]])
    return drawn


def _proposed(writer: Actor, tools: Sequence[Tool], kind: str, count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, goal) of every task in one reply; nothing when the reply holds no list of them."""
    steps = "exactly one call" if kind == "single" else "at least two calls, the later ones using earlier results"
    declared = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    request = (
        f"These functions are available to an assistant:\n{declared}\n\n"
        f"Invent {count} different tasks that a person could give the assistant, each solvable with {steps} of these "
        "functions and with nothing else. Give all the values that the calls need. Answer with a JSON list of "
        '{"prompt": what the person writes first, "goal": what must be true or known in the end}, and nothing else.'
    )
    try:
        said = writer.reply([{"role": "user", "content": request}], None, thinking=False, seed=seed)
    except Malformed:
        return []
    listed = _LIST.search(str(said.get("content") or ""))
    try:
        rows = json.loads(listed.group()) if listed else []
    except ValueError:
        return []
    return [
        (row["prompt"].strip(), str(row.get("goal", "")))
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("prompt"), str) and row["prompt"].strip()
    ]
