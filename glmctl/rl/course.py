"""What changes in the course of a run besides the weights: pool, temperature, length, and rollouts carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmctl.recipe.schema import RlRecipe, Sampling
from glmctl.rl.actor import Actor
from glmctl.rl.collect import Batch, Group
from glmctl.rl.curriculum import Curriculum
from glmctl.rl.environment import Problem
from glmctl.rl.rollout import rollout
from glmctl.rl.score import score_problems
from glmctl.rl.seeds import derive_seed
from glmctl.rl.temperature import Temperature

MEASURED_AT_ONCE = 4096
"""samples that are in memory together while difficulties are measured"""


class Course:
    """A checkpoint's `state` holds all of it, so a resumed run goes on exactly."""

    def __init__(self, recipe: RlRecipe, actor: Actor, train: Sequence[Problem], heldout: Sequence[Problem]) -> None:
        self._recipe, self._actor = recipe, actor
        dynamic = recipe.dynamic_temperature
        self._validation = heldout[: dynamic.problems] if dynamic is not None else heldout
        self.curriculum = Curriculum(recipe, train)
        self.temperature = Temperature(dynamic, recipe.sampling.temperature)

    def begin(self) -> dict[str, Any]:
        """Before the first step: what to log, the statistics of the first pool if there is one."""
        return self._enter(1) if self.curriculum.due else {}

    def sampling(self, step: int) -> Sampling:
        """How the rollouts of `step` are sampled."""
        length = max_tokens(self._recipe, step)
        return self._recipe.sampling.model_copy(update={"temperature": self.temperature.value, "max_tokens": length})

    def collect(self, step: int) -> Batch:
        """The rollouts of `step`."""
        course = self.curriculum
        return self._actor.collector.collect(
            course.prompts, step, group_size=course.group_size, sampling=self.sampling(step)
        )

    def after_step(self, step: int, reward: float) -> dict[str, Any]:
        """Let everything see the mean reward of `step`, under the weights after it; returns what to log."""
        found = self.temperature.after_step(step, reward, lambda value: self._score(step, value))
        if self.curriculum.after_step(step, reward) and step < self._recipe.steps:
            found |= self._enter(step + 1)
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "curriculum": self.curriculum.state(),
            "temperature": self.temperature.state(),
            "carried": [group.to_row() for group in self._actor.collector.carried],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.curriculum.load_state(state["curriculum"])
        self.temperature.load_state(state["temperature"])
        self._actor.collector.carried = [Group.from_row(row) for row in state["carried"]]

    def _enter(self, step: int) -> dict[str, Any]:
        def attempt(problems: Sequence[Problem], first: int, count: int) -> list[list[float | None]]:
            seed = derive_seed(self._recipe.seed, "difficulty", step, first)
            return self._rewards(problems, count, seed, step)

        return {"curriculum": self.curriculum.enter(step, attempt)}

    def _rewards(self, problems: Sequence[Problem], count: int, seed: int, step: int) -> list[list[float | None]]:
        """The rewards of `count` samples of each problem."""
        rewards: list[list[float | None]] = []
        size = max(1, MEASURED_AT_ONCE // count)
        for start in range(0, len(problems), size):
            made = rollout(
                self._actor.scorer,
                self._actor.template,
                problems[start : start + size],
                samples=count,
                sampling=self.sampling(step),
                seed=seed,
                max_turns=self._recipe.max_turns,
                enable_thinking=self._recipe.enable_thinking,
            )
            drawn = [one.reward for one in made]
            rewards += [drawn[at : at + count] for at in range(0, len(drawn), count)]
        return rewards

    def _score(self, step: int, temperature: float) -> float:
        """The mean reward of the validation problems at a temperature; every temperature gets the same draws."""
        dynamic = self._recipe.dynamic_temperature
        assert dynamic is not None
        sampling = self._recipe.sampling.model_copy(update={"temperature": temperature})
        return score_problems(
            self._actor.scorer,
            self._actor.template,
            self._validation,
            sampling=sampling,
            enable_thinking=self._recipe.enable_thinking,
            seed=derive_seed(self._recipe.seed, "temperature", step),
            max_turns=self._recipe.max_turns,
            samples=dynamic.samples,
        ).accuracy


def max_tokens(recipe: RlRecipe, step: int) -> int:
    """The most tokens of a turn in `step`: of the latest stage of `lengths` that has begun, else the sampling's."""
    begun = [stage.max_tokens for stage in recipe.lengths if stage.from_step <= step]
    return begun[-1] if begun else recipe.sampling.max_tokens
