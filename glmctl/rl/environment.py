"""What an agent acts in: `reset() -> messages, tools`, then `step(message) -> observation, reward, done`.

Messages are OpenAI-shaped dictionaries: an assistant message may carry `reasoning_content` and
`tool_calls[].function.{name, arguments}` with `arguments` already a mapping. Only messages that the chat template's
parser found well-formed reach `step`; what the parser refuses ends the rollout before (spec section 3.4).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from glmctl.errors import DataError

Message = dict[str, Any]
Tool = dict[str, Any]


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"
    """the model gave a final answer and the environment judged it"""
    MALFORMED = "malformed"
    """the format of a turn or of a tool call was broken: halted, reward 0"""
    TRUNCATED = "truncated"
    """a turn used up its tokens, or the context was full: reward 0"""
    TURNS_EXHAUSTED = "turns_exhausted"
    """the model still called tools in its last allowed turn: reward 0"""
    INFRASTRUCTURE = "infrastructure"
    """environment or engine failed, not the model: reward None, the trajectory is masked, never a 0"""


class InfrastructureFailure(Exception):
    """Raised by an environment when *it* cannot go on; says nothing about the model's answer."""


@dataclass(frozen=True)
class Problem:
    """One verifiable question. `answer` is for the verifier only; the model sees what `Environment.reset` returns."""

    id: str
    task: str
    prompt: str
    answer: int | str
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether the answer is known to be right: of every generated task, and of rows that do not deny it."""
        return self.state.get("verified", True) is True

    def to_row(self) -> dict[str, Any]:
        """The problem as one JSON-able row of a problem file."""
        row = asdict(self)
        if not self.state:
            del row["state"]
        return row

    @classmethod
    def from_row(cls, row: Any, where: str) -> Problem:
        """Read a row back. Raises DataError naming `where` (file:line) and what is missing or of the wrong type."""
        if not isinstance(row, dict):
            raise DataError(f"{where}: a problem is a JSON object, found {type(row).__name__}")
        wanted: dict[str, tuple[type, ...]] = {"id": (str,), "task": (str,), "prompt": (str,), "answer": (int, str)}
        for key, kinds in wanted.items():
            if type(row.get(key)) not in kinds:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise DataError(f"{where}: '{key}' must be {names}, found {row.get(key)!r}")
        state = row.get("state", {})
        if not isinstance(state, dict):
            raise DataError(f"{where}: 'state' must be an object, found {state!r}")
        return cls(row["id"], row["task"], row["prompt"], row["answer"], state)


@dataclass(frozen=True)
class Transition:
    """What one step led to.

    `messages` are the observation (tool results) when the episode goes on, else empty. `reward` is a float in -1..1
    when `done`, else None. `stop` names why it is done. `info` is for logs.
    """

    messages: list[Message]
    reward: float | None
    done: bool
    stop: StopReason | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a transition that no trainer should learn from: an environment's bug is not the model's reward."""
        if self.done:
            # NaN fails the comparison
            valid = isinstance(self.reward, float) and abs(self.reward) <= 1.0
            if not valid or self.stop is None:
                raise InfrastructureFailure(f"environment ended with reward {self.reward!r}, stop {self.stop!r}")
        elif self.reward is not None or not self.messages:
            raise InfrastructureFailure("environment goes on without an observation, or with a reward")


class Environment(Protocol):
    """One episode of one problem. Deterministic: the same messages lead to the same observations and reward."""

    def reset(self) -> tuple[list[Message], list[Tool] | None]:
        """The opening messages and the tools on offer (None: no tools)."""
        ...

    def step(self, message: Message) -> Transition:
        """Judge or execute one well-formed assistant message. May raise InfrastructureFailure."""
        ...


def finished(reward: float, stop: StopReason, **info: Any) -> Transition:
    """A final transition with `reward`."""
    return Transition([], float(reward), True, stop, info)


def tool_calls(message: Message) -> list[dict[str, Any]]:
    """The `{name, arguments}` of each call in an assistant message, in order."""
    return [call["function"] for call in message.get("tool_calls") or []]


def content_id(task: str, text: str) -> str:
    """An id for a problem that has no short name: `text` is what tells it from others of the task."""
    return f"{task}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def require_one_id_each(problems: Iterable[Problem]) -> None:
    """DataError when two different problems have one id: prompts, draws and journals go by it. One may occur twice."""
    known: dict[str, Problem] = {}
    for problem in problems:
        other = known.setdefault(problem.id, problem)
        if other != problem:
            raise DataError(
                f"two problems have the id '{problem.id}': {other.prompt[:60]!r} and {problem.prompt[:60]!r}",
                hint="an id names one problem in all files of a recipe",
            )


def read_problems(path: Path) -> list[Problem]:
    """Problems of one JSON-lines file, in file order.

    Raises DataError naming file and line, or an id that two of them share.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read problems: {error}") from error
    problems = []
    # not splitlines, which also parts at characters that JSON leaves as they are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        problems.append(Problem.from_row(row, f"{path}:{number}"))
    if not problems:
        raise DataError(f"{path}: no problems in this file")
    require_one_id_each(problems)
    return problems
