"""reasoning-gym's procedural tasks, scored by their own functions (in the verifier's process).

A problem keeps the whole entry, so that a problem file scores the same on every machine with the package. Its pins
are narrow, so it is nobody's dependency: `pip install reasoning-gym` beside glmctl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from glmctl.data.conversations import Conversation
from glmctl.errors import EnvironmentProblem, RecipeError, unknown
from glmctl.recipe.schema import GymTask
from glmctl.rl.environment import Environment, Problem, content_id
from glmctl.rl.tasks.single_turn import SingleTurn
from glmctl.rl.verifier import verify

VERIFIER = "glmctl.rl.tasks.gym:judge"


def generate(spec: GymTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` entries with distinct questions of reasoning-gym's `dataset`, made with its `config`.

    Raises EnvironmentProblem without the package, RecipeError for an unknown data set, a config it refuses, or one
    with too few different questions.
    """
    gym = _package()
    if spec.dataset not in gym.factory.DATASETS:
        raise unknown("reasoning-gym data set", spec.dataset, gym.factory.DATASETS, where="task.dataset")
    try:
        data = gym.create_dataset(spec.dataset, size=3 * count, seed=rng.getrandbits(31), **spec.config)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"task.config: reasoning-gym refuses it: {error}") from error
    found: dict[str, Problem] = {}
    for entry in data:
        body = json.loads(json.dumps(entry, default=str))
        question = str(entry["question"])
        if question not in found:
            state = {"dataset": spec.dataset, "entry": body}
            found[question] = Problem(
                content_id(f"gym/{spec.dataset}", question), "gym", question, str(entry["answer"]), state
            )
        if len(found) == count:
            return list(found.values())
    raise RecipeError(f"task: {spec.dataset} gave {len(found)} different questions, {count} are asked for")


def demonstrate(problem: Problem) -> Conversation:
    """The answer with no more than a word of reasoning: the package has no worked solutions."""
    answer = {"role": "assistant", "reasoning_content": "done", "content": str(problem.answer)}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One question, scored by the data set's own function."""
    _package()
    return SingleTurn(problem, lambda one, content: verify(VERIFIER, content, one))


def judge(reply: str, problem: Mapping[str, Any]) -> float:
    """The data set's score of the reply, 0..1."""
    state = problem["state"]
    return float(_package().get_score_answer_fn(state["dataset"])(reply.strip(), state["entry"]))


def _package() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise EnvironmentProblem(f"task gym needs reasoning-gym: {error}", hint="pip install reasoning-gym") from error
    return reasoning_gym
