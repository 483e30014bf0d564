"""One step's batch of rollouts: a fixed number of prompts, or over-sampling until enough groups are useful.

Over-sampling draws prompts in waves and stops everything the moment `prompts_per_step` groups are complete and teach
something. What was under way is dropped, or carried: it goes on in the next step under that step's weights, each
stretch of tokens with the version that made it (as slime's partial rollouts; K2's report has them too). Whatever
finishes first is trained first, which favours short answers; carrying the rest gives the long ones their turn.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.recipe.schema import RlRecipe, Sampling
from glmctl.rl.advantage import has_signal
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.learn import shaped_reward
from glmctl.rl.prompts import Prompts
from glmctl.rl.rollout import check_infrastructure, play
from glmctl.rl.seeds import derive_seed


@dataclass
class Group:
    """The samples of one prompt. `ended` are the samples (places in `samples`) whose rollout has come to its end."""

    problem: Problem
    samples: list[Trajectory]
    ended: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Whether every sample has ended."""
        return len(self.ended) == len(self.samples)

    @property
    def oldest(self) -> int | None:
        """The oldest weights that made a token of it; None before the first token."""
        return min((version for one in self.samples for version in one.versions), default=None)

    def to_row(self) -> dict[str, Any]:
        """The group as a JSON-able row of a checkpoint."""
        samples = [one.to_row() for one in self.samples]
        return {"problem": self.problem.to_row(), "samples": samples, "ended": sorted(self.ended)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Group:
        """The inverse of `to_row`."""
        problem = Problem.from_row(row["problem"], "a carried group")
        return cls(problem, [Trajectory.from_row(one) for one in row["samples"]], set(row["ended"]))


@dataclass(frozen=True)
class Batch:
    """What a step collected."""

    groups: list[list[Trajectory]]
    """to train on, at most `prompts_per_step`"""
    ended: list[Trajectory]
    """every rollout that came to its end in this step, for the log"""
    carried: list[Group]
    """for the next step"""
    drawn: int
    """prompts drawn in this step; those carried into it are not"""
    stopped: int
    """rollouts that were under way when the batch was full"""
    expired: int
    """carried rollouts that were given up at the step's beginning: too many versions behind"""
    seconds: float
    """of all of it"""
    seconds_reward: float
    """of these, in environments: judges and tools"""
    tokens: int
    """generated in this step"""


class Collector:
    """Collects the batches of a run; `carried` is what it keeps from step to step."""

    def __init__(self, recipe: RlRecipe, engine: Engine, template: ChatTemplate) -> None:
        self._recipe, self._engine, self._template = recipe, engine, template
        self.carried: list[Group] = []

    def collect(self, prompts: Prompts, step: int, *, group_size: int, sampling: Sampling) -> Batch:
        """The batch of `step`. Raises EnvironmentProblem when over 20% of its rollouts failed in the machinery."""
        began, made = time.perf_counter(), self._engine.stats.tokens
        work = _Step(self._recipe, step, group_size, sampling.max_tokens)
        fresh = self._not_too_old(self._engine.version)
        expired = sum(len(group.samples) for group in self.carried) - sum(len(group.samples) for group in fresh)
        work.go_on_with(fresh)
        judging, drawn = 0.0, prompts.drawn
        while (count := work.wanted(prompts.drawn - drawn)) or work.waiting:
            for problem in prompts.take(count):
                work.add(problem)
            judging += play(
                self._engine,
                self._template,
                work.asked(),
                sampling=sampling,
                seed=derive_seed(self._recipe.seed, "rollout", step),
                max_turns=self._recipe.max_turns,
                finished=work.finished,
                stopped=work.full,
            )
            if work.full():
                break
        ended = sorted(work.ended, key=lambda one: (one.group, one.sample))
        check_infrastructure(ended)
        left = work.left()
        self.carried = left if self._recipe.rollouts.unfinished == "carry" else []
        return Batch(
            groups=[group.samples for group in work.chosen()],
            ended=ended,
            carried=self.carried,
            drawn=prompts.drawn - drawn,
            stopped=sum(len(group.samples) - len(group.ended) for group in left),
            expired=expired,
            seconds=time.perf_counter() - began,
            seconds_reward=judging,
            tokens=self._engine.stats.tokens - made,
        )

    def _not_too_old(self, version: int) -> list[Group]:
        """The carried groups without those that would be trained with tokens older than the recipe allows."""
        most = self._recipe.rollouts.max_staleness
        return [group for group in self.carried if group.oldest is None or version - group.oldest <= most]


class _Step:
    """The groups of one step, in the order in which they began, and those that are complete and useful."""

    def __init__(self, recipe: RlRecipe, step: int, group_size: int, max_tokens: int) -> None:
        self._recipe, self._step, self._size, self._max_tokens = recipe, step, group_size, max_tokens
        self._known: Counter[str] = Counter()
        self._useful: list[Group] = []
        self._begun = 0
        self.groups: list[Group] = []
        self.ended: list[Trajectory] = []
        """what came to its end in this step"""

    def go_on_with(self, carried: Sequence[Group]) -> None:
        """Take groups of the step before; complete ones count at once."""
        for group in carried:
            self._enter(group)
            for one in group.samples:
                self._known[one.problem_id] = max(self._known[one.problem_id], one.sample + 1)
                if not one.generated_tokens:
                    one.born = self._step
            if group.complete:
                self._note(group)

    def add(self, problem: Problem) -> None:
        """A fresh group."""
        # a problem that occurs twice in a batch goes on with fresh samples, not with copies
        first = self._known[problem.id]
        self._known[problem.id] += self._size
        thinking = self._recipe.enable_thinking
        samples = [
            Trajectory(problem.id, problem.task, 0, sample, thinking, born=self._step)
            for sample in range(first, first + self._size)
        ]
        self._enter(Group(problem, samples))

    def asked(self) -> list[tuple[Problem, Trajectory]]:
        """What has to be played, of the groups that were not asked for before."""
        fresh, self._begun = self.groups[self._begun :], len(self.groups)
        return [(g.problem, one) for g in fresh for place, one in enumerate(g.samples) if place not in g.ended]

    @property
    def waiting(self) -> bool:
        """Whether there are groups that were not asked for yet."""
        return self._begun < len(self.groups)

    def wanted(self, drawn: int) -> int:
        """How many prompts the next wave draws, after `drawn` in this step."""
        recipe = self._recipe
        share = recipe.oversample if recipe.dynamic_sampling else 1.0
        if not recipe.rollouts.until_full:
            return math.ceil(recipe.prompts_per_step * share) if drawn == 0 else 0
        if self.full():
            return 0
        missing = math.ceil((recipe.prompts_per_step - len(self._useful) - self._open) * share)
        most = math.ceil(recipe.prompts_per_step * recipe.rollouts.max_draw)
        return max(0, min(missing, most - drawn))

    def finished(self, one: Trajectory) -> None:
        """A rollout has come to its end."""
        group = self.groups[one.group]
        # the samples of a group are numbered on
        group.ended.add(one.sample - group.samples[0].sample)
        self.ended.append(one)
        if group.complete:
            self._note(group)

    def full(self) -> bool:
        """Whether no more rollouts are needed."""
        return self._recipe.rollouts.until_full and len(self._useful) >= self._recipe.prompts_per_step

    def chosen(self) -> list[Group]:
        """The groups to train on: the first to be complete, or, without `until_full`, the first to be drawn."""
        ready = self._useful
        if not self._recipe.rollouts.until_full:
            ready = sorted(ready, key=lambda group: group.samples[0].group)
        return ready[: self._recipe.prompts_per_step]

    def left(self) -> list[Group]:
        """What could go on: groups under way, and complete and useful ones that came too late."""
        return [group for group in self.groups if not group.complete] + self._useful[self._recipe.prompts_per_step :]

    @property
    def _open(self) -> int:
        return sum(not group.complete for group in self.groups)

    def _enter(self, group: Group) -> None:
        for one in group.samples:
            one.group = len(self.groups)
        self.groups.append(group)

    def _note(self, group: Group) -> None:
        # the rewards that advantages will be made of: masked samples have none, and a penalty is a difference too
        rewards = [shaped_reward(one, self._recipe.objective, self._max_tokens) for one in group.samples]
        if not self._recipe.dynamic_sampling or has_signal(rewards):
            self._useful.append(group)
