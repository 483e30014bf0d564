"""Science questions: multiple choice judged by letter, and the filter that the report found to matter.

Training on expert-verified multiple choice only beat the mixed pool on GPQA-Diamond, 65.8 to 62.9 (spec section 3.3).
Rows: {"question", "choices": [...], "answer": index, "expert_verified": bool}, or, without choices, an open question
whose "answer" is a short text; open ones are in the mixed pool only.
"""

from __future__ import annotations

import json
import random
import re
import string
from pathlib import Path
from typing import Any

from glmctl.data.conversations import Conversation
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import ScienceTask
from glmctl.rl.environment import Environment, Problem
from glmctl.rl.tasks.single_turn import SingleTurn

_LETTER = re.compile(r"(?:\\boxed\{|\banswer(?: is)?:?\s*|^)\(?([A-Z])\)?\}?[.)]?\s*$", re.IGNORECASE)


def generate(spec: ScienceTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` questions of the files after the filter, choices shuffled so that no letter is favoured.

    Raises RecipeError when too few are left, DataError naming file and line for a row that is no question.
    """
    kept: dict[str, Problem] = {}
    seen = 0
    for path in map(Path, spec.paths):
        if not path.is_file():
            raise RecipeError(f"{path}: no such file")
        # not splitlines, which also parts at characters that JSON leaves as they are
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            seen += 1
            row = _row(line, f"{path}:{number}")
            if spec.filter == "mixed" or (row.get("choices") and row.get("expert_verified") is True):
                problem = _problem(row, f"science/{path.name}:{number}", rng)
                kept[problem.prompt] = problem
    if len(kept) < count:
        raise RecipeError(
            f"task: {len(kept)} of {seen} questions are left by filter '{spec.filter}', {count} are asked for"
        )
    return rng.sample(list(kept.values()), count)


def demonstrate(problem: Problem) -> Conversation:
    """The letter (or the short text)."""
    answer = {"role": "assistant", "reasoning_content": "done", "content": str(problem.answer)}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One question, one letter or short text."""
    return SingleTurn(problem, _judge)


def chosen_letter(content: str) -> str | None:
    """The letter of the last line that gives one: `B`, `(B)`, `The answer is B.`, `\\boxed{B}`."""
    for line in reversed(content.strip().splitlines()):
        if found := _LETTER.search(line.strip()):
            return found[1].upper()
    return None


def _judge(problem: Problem, content: str) -> float:
    if problem.state.get("open"):
        return float(" ".join(content.lower().split()).removesuffix(".") == str(problem.answer).lower())
    return float(chosen_letter(content) == problem.answer)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        question, choices, answer = row["question"], row.get("choices"), row["answer"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: expected an object with 'question' and 'answer': {error!r}") from error
    right = isinstance(answer, str) and bool(answer)
    if choices:
        right = isinstance(choices, list) and type(answer) is int and 0 <= answer < len(choices) <= 26
    if not isinstance(question, str) or not right:
        raise DataError(f"{where}: 'answer' must be an index into 'choices', or without choices a text")
    return dict(row)


def _problem(row: dict[str, Any], name: str, rng: random.Random) -> Problem:
    verified = row.get("expert_verified") is True
    if not row.get("choices"):
        state = {"open": True, "verified": verified}
        return Problem(name, "science", row["question"], " ".join(row["answer"].split()), state)
    order = list(range(len(row["choices"])))
    rng.shuffle(order)
    letters = string.ascii_uppercase
    options = [f"{letters[at]}. {row['choices'][index]}" for at, index in enumerate(order)]
    prompt = "\n".join([row["question"], *options, "Answer with the letter."])
    state = {"open": False, "verified": verified}
    return Problem(name, "science", prompt, letters[order.index(row["answer"])], state)
