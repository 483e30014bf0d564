"""A user's own problems: JSON lines with a `prompt`, judged by a Python function of theirs.

The function is named `package.module:function` and called as `(reply, problem) -> float` in -1..1; `problem` is
{"id", "prompt", "answer", "state"}, where state["row"] is the line as it was written. A row with `"verified": false`
has an answer that nobody has checked; a curriculum leaves it out.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from glmctl.data.conversations import Conversation
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import CustomTask
from glmctl.rl.environment import Environment, Problem
from glmctl.rl.tasks.single_turn import SingleTurn
from glmctl.rl.verifier import verify


def generate(spec: CustomTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` rows of the files, shuffled, with distinct prompts. RecipeError for too few, DataError for a bad row."""
    found: dict[str, Problem] = {}
    for name in spec.paths:
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"{path}: no such file")
        # not splitlines, which also parts at characters that JSON leaves as they are
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt = row["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: expected an object with a 'prompt': {error!r}") from error
            if not isinstance(prompt, str):
                raise DataError(f"{path}:{number}: 'prompt' must be a string")
            state = {"verifier": spec.verifier, "row": row, "verified": row.get("verified", True) is True}
            found[prompt] = Problem(f"{path.name}:{number}", "custom", prompt, str(row.get("answer", "")), state)
    if len(found) < count:
        raise RecipeError(f"task.paths: {len(found)} different prompts, {count} are asked for")
    return rng.sample(list(found.values()), count)


def demonstrate(problem: Problem) -> Conversation:
    """The row's `answer`. Raises RecipeError when it has none."""
    if not problem.answer:
        raise RecipeError(f"{problem.id}: no 'answer' to demonstrate; set cold_start to 0")
    answer = {"role": "assistant", "reasoning_content": "done", "content": str(problem.answer)}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One prompt, judged by the function its state names."""
    verifier = problem.state.get("verifier")
    if not isinstance(verifier, str):
        raise DataError(f"problem {problem.id}: 'state' names no verifier")
    return SingleTurn(problem, lambda one, content: verify(verifier, content, one))
