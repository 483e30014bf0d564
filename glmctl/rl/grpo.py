"""Synchronous, colocated RL: rollouts and training take turns on one set of weights (spec sections 3.3 and 3.6).

Everything in a step is a pure function of (recipe seed, step), of the model's and the optimizer's state, and of the
course's, so a run resumed from a checkpoint continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.errors import DataError, RecipeError
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import RlRecipe, Sampling
from glmctl.rl import recording
from glmctl.rl.actor import Actor
from glmctl.rl.collect import Batch
from glmctl.rl.course import Course
from glmctl.rl.environment import Problem
from glmctl.rl.figures import metrics_row, summary
from glmctl.rl.invariants import check_versions
from glmctl.rl.journal import Journal
from glmctl.rl.live import live
from glmctl.rl.policy import Policy
from glmctl.rl.recording import read_step, recorded_steps, write_step
from glmctl.rl.sandbox import boxes
from glmctl.rl.sandbox.execute import sandbox
from glmctl.rl.score import GREEDY, Score, load_heldout, score_problems
from glmctl.rl.tasks import RUNS_CODE
from glmctl.run.directory import Run, resolve_model
from glmctl.training.schedule import lr_at
from glmctl.training.session import Session


def run(recipe: RlRecipe, run: Run) -> dict[str, Any]:
    """Train `recipe.model` on verifiable rewards and export the result as a Hugging Face folder.

    Summary: heldout_start, heldout_end (greedy accuracy, 0..1), heldout_gain_points, well_formed_start, well_formed
    (share of held-out answers that the template parses, before and after), reward_first, reward_last, steps.
    Raises RecipeError for a recipe that cannot learn, the named errors of `rl.invariants` when one breaks,
    EnvironmentProblem when over 20% of a batch's rollouts fail in the machinery, Interrupted after a signal.
    """
    folder = resolve_model(recipe.model)
    accelerator = make_accelerator("fp32", recipe.trackers, run.path)
    model, template = load_model(folder, device=accelerator.device, dtype=torch.float32), ChatTemplate.load(folder)
    check(recipe, model, accelerator.num_processes)
    train, heldout = load_problems(recipe)
    actor = Actor(model, template, recipe)
    course = Course(recipe, actor, train, heldout)
    session = Session(
        model,
        run,
        accelerator,
        optimizer=recipe.optimizer,
        grad_clip=recipe.grad_clip,
        policy=recipe.checkpoint,
        trackers=recipe.trackers,
        # the policy is made of the session's stepper; no checkpoint is taken before
        driver_state=lambda: {**course.state(), "trained": policy.ledger.state()},
    )
    policy = Policy(model, session.stepper, recipe, folder)
    done = session.resume()
    if session.driver is not None:
        course.load_state(session.driver)
        policy.ledger.load_state(session.driver["trained"])
    if any(problem.task in RUNS_CODE for problem in [*train, *heldout]):
        boxes.require(recipe.sandbox)
        console.note(f"code of the model runs in sandbox level {recipe.sandbox.level}")
    loop = Loop(recipe, session, actor, course, policy, heldout)
    with sandbox(recipe.sandbox):
        loop.steps(done)
    session.export(folder)
    return summary(run.metrics.rows())


class Loop:
    """The steps of one run."""

    def __init__(
        self,
        recipe: RlRecipe,
        session: Session,
        actor: Actor,
        course: Course,
        policy: Policy,
        heldout: Sequence[Problem],
    ) -> None:
        self.recipe, self.session, self.actor, self.course, self.policy = recipe, session, actor, course, policy
        self.heldout = heldout
        self.path = session.run.path
        self.journal = Journal(session.run, actor.template)

    def steps(self, done: int) -> None:
        """Every step after `done`, each ending with its log and, when it is due, a checkpoint."""
        recipe = self.recipe
        self.journal.truncate(done)
        recording.remove_stale(self.path)
        self.actor.follow(self.version_before(done + 1))
        if done == 0:
            self.journal.evaluated(0, self.evaluate(), self.course.begin())
        with self.session.stopping() as stop, live(recipe.name, recipe.steps, start=done) as show:
            for step in range(done + 1, recipe.steps + 1):
                show(self.one(step))
                self.session.end_step(step, recipe.steps, stop)

    def one(self, step: int) -> dict[str, Any]:
        """Step `step`: rollouts, updates, the new weights to the engine, the log. Returns its row of metrics."""
        recipe = self.recipe
        batch, sampling = self.rollouts(step)
        began = time.perf_counter()
        lr = lr_at(step / recipe.steps, recipe.schedule)
        updates = []
        if batch.groups and recipe.mode != "rollout_only":
            updates = self.policy.learn(batch.groups, step, lr, sampling)
        self.actor.follow(self.version_before(step + 1))
        row: dict[str, Any] = {"lr": lr, "seconds_train": time.perf_counter() - began}
        row |= metrics_row(batch, updates, sampling, self.version_before(step)) | self.course.curriculum.fields()
        row |= self.course.after_step(step, row["reward_mean"])
        score = None
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            score = self.evaluate()
        if recipe.rollouts.record or recipe.mode == "rollout_only":
            write_step(self.path, step, batch.groups, batch.ended, sampling.temperature)
        if recipe.trackers:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            self.session.accelerator.log(numbers, step=step)
        return self.journal.stepped(step, row, batch, recipe.objective, sampling, score)

    def rollouts(self, step: int) -> tuple[Batch, Sampling]:
        """The batch of `step` and how it was sampled: made now, or recorded by another run."""
        if self.recipe.mode != "train_only":
            sampling = self.course.sampling(step)
            batch = self.course.collect(step)
            most = self.recipe.rollouts.max_staleness if self.recipe.rollouts.unfinished == "carry" else 0
            check_versions(batch.ended, self.version_before(step), most)
            return batch, sampling
        assert self.recipe.recorded is not None
        began = time.perf_counter()
        found = read_step(Path(self.recipe.recorded), step)
        ended = [one for group in found.groups for one in group] + found.others
        sampling = self.recipe.sampling.model_copy(update={"temperature": found.temperature})
        seconds = time.perf_counter() - began
        batch = Batch(
            groups=found.groups,
            ended=ended,
            carried=[],
            drawn=0,
            stopped=0,
            expired=0,
            seconds=seconds,
            seconds_reward=0.0,
            tokens=sum(one.generated_tokens for one in ended),
        )
        return batch, sampling

    def version_before(self, step: int) -> int:
        """The version of the weights that `step` rolls out with: one for each step done, unless none trains."""
        return 0 if self.recipe.mode == "rollout_only" else step - 1

    def evaluate(self) -> Score:
        """Greedy score on the held-out problems with the weights as they are."""
        sampling = GREEDY.model_copy(update={"max_tokens": self.recipe.sampling.max_tokens})
        return score_problems(
            self.actor.scorer,
            self.actor.template,
            self.heldout,
            sampling=sampling,
            enable_thinking=self.recipe.enable_thinking,
            seed=self.recipe.seed,
            max_turns=self.recipe.max_turns,
        )


def check(recipe: RlRecipe, model: GlmMoe, processes: int) -> None:
    """RecipeError for what could only fail or do nothing."""
    if processes > 1:
        raise RecipeError("rl runs in one process: rollouts and training share one set of weights")
    if recipe.sampling.temperature == 0:
        raise RecipeError("sampling.temperature: 0 is greedy; the samples of a group would all be the same")
    if recipe.mtp_weight > 0 and model.mtp is None:
        raise RecipeError("mtp_weight: the model has no multi-token-prediction layer")
    overlong = recipe.objective.overlong
    shortest = recipe.lengths[0].max_tokens if recipe.lengths else recipe.sampling.max_tokens
    if overlong is not None and overlong.cache_tokens > shortest:
        raise RecipeError(f"objective.overlong.cache_tokens: more than the {shortest} tokens of a turn")
    if recipe.recorded is not None:
        there = recorded_steps(Path(recipe.recorded))
        if there[: recipe.steps] != list(range(1, recipe.steps + 1)):
            raise RecipeError(
                f"recorded: {recipe.recorded} holds rollouts of {len(there)} steps, {recipe.steps} are asked for",
                hint="record them with --set rollouts.record=true or --rollout-only; --set steps=N takes fewer",
            )


def load_problems(recipe: RlRecipe) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems. DataError when a held-out prompt is also trained on."""
    train = load_heldout(recipe.problems, None)
    heldout = load_heldout(recipe.heldout, recipe.heldout_limit)
    shared = {problem.prompt for problem in train} & {problem.prompt for problem in heldout}
    if shared:
        raise DataError(f"{len(shared)} held-out prompts are also trained on, for example {min(shared)!r}")
    return train, heldout
