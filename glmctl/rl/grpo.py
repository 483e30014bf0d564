"""Synchronous, colocated RL: rollouts and training take turns on one set of weights (spec sections 3.3 and 3.6).

Everything in a step is a pure function of (recipe seed, step) and of the model's and the optimizer's state, so a run
resumed from a checkpoint continues bit for bit.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from statistics import fmean as mean
from typing import Any

import torch

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.errors import DataError, RecipeError
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import RlRecipe
from glmctl.rl.advantage import has_signal
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.invariants import check_versions
from glmctl.rl.journal import Journal
from glmctl.rl.learn import UpdateStats
from glmctl.rl.policy import Policy
from glmctl.rl.rollout import rollout, rollout_engine
from glmctl.rl.sandbox import boxes
from glmctl.rl.sandbox.execute import sandbox
from glmctl.rl.score import GREEDY, Score, load_heldout, score_problems
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import RUNS_CODE
from glmctl.run.directory import Run, resolve_model
from glmctl.run.signals import StopFlag
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
    session = Session(
        model,
        run,
        accelerator,
        optimizer=recipe.optimizer,
        grad_clip=recipe.grad_clip,
        policy=recipe.checkpoint,
        trackers=recipe.trackers,
    )
    engine = rollout_engine(model, recipe.episode_tokens)
    policy = Policy(model, session.stepper, recipe, folder)
    journal = Journal(run, template)

    done = session.resume()
    journal.truncate(done)
    engine.load_weights(done)
    if any(problem.task in RUNS_CODE for problem in [*train, *heldout]):
        boxes.require(recipe.sandbox)
        console.note(f"code of the model runs in sandbox level {recipe.sandbox.level}")
    with sandbox(recipe.sandbox):
        train_steps(recipe, session, engine, template, policy, journal, train, heldout, done)
    session.export(folder)
    return summary(run.metrics.rows())


def train_steps(
    recipe: RlRecipe,
    session: Session,
    engine: Engine,
    template: ChatTemplate,
    policy: Policy,
    journal: Journal,
    train: Sequence[Problem],
    heldout: Sequence[Problem],
    done: int,
) -> None:
    """Every step after `done`: rollouts, updates, the new weights to the engine, the log, a checkpoint."""
    if done == 0:
        journal.evaluated(0, evaluate(engine, template, heldout, recipe))
    with StopFlag() as stop, console.progress(recipe.name, recipe.steps, start=done) as progress:
        for step in range(done + 1, recipe.steps + 1):
            began = time.perf_counter()
            trajectories = rollout(
                engine,
                template,
                prompts_of_step(train, recipe, step),
                samples=recipe.group_size,
                sampling=recipe.sampling,
                seed=derive_seed(recipe.seed, "rollout", step),
                max_turns=recipe.max_turns,
                enable_thinking=recipe.enable_thinking,
            )
            check_versions(trajectories, step - 1)
            generated = time.perf_counter()

            groups = choose_groups(trajectories, recipe)
            lr = lr_at(step / recipe.steps, recipe.schedule)
            updates = policy.learn(groups, step, lr, recipe.sampling.temperature) if groups else []
            engine.load_weights(step)

            row = metrics_row(trajectories, len(groups), updates)
            row |= {"lr": lr, "seconds_generate": generated - began, "seconds_train": time.perf_counter() - generated}
            score = None
            if step % recipe.evaluate_every == 0 or step == recipe.steps:
                score = evaluate(engine, template, heldout, recipe)
            journal.stepped(step, row, trajectories, score)
            if recipe.trackers:
                session.accelerator.log(
                    {key: value for key, value in row.items() if isinstance(value, int | float)}, step=step
                )
            session.end_step(step, recipe.steps, stop)
            progress.advance(reward=row["reward_mean"], heldout=journal.heldout)


def check(recipe: RlRecipe, model: GlmMoe, processes: int) -> None:
    """RecipeError for what could only fail or do nothing."""
    if processes > 1:
        raise RecipeError("rl runs in one process: rollouts and training share one set of weights")
    if recipe.sampling.temperature == 0:
        raise RecipeError("sampling.temperature: 0 is greedy; the samples of a group would all be the same")
    if recipe.mtp_weight > 0 and model.mtp is None:
        raise RecipeError("mtp_weight: the model has no multi-token-prediction layer")
    overlong = recipe.objective.overlong
    if overlong is not None and overlong.cache_tokens > recipe.sampling.max_tokens:
        raise RecipeError(
            f"objective.overlong.cache_tokens: more than sampling.max_tokens, {recipe.sampling.max_tokens}"
        )


def load_problems(recipe: RlRecipe) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems. DataError when a held-out prompt is also trained on."""
    train = load_heldout(recipe.problems, None)
    heldout = load_heldout(recipe.heldout, recipe.heldout_limit)
    shared = {problem.prompt for problem in train} & {problem.prompt for problem in heldout}
    if shared:
        raise DataError(f"{len(shared)} held-out prompts are also trained on, for example {min(shared)!r}")
    return train, heldout


def prompts_of_step(problems: Sequence[Problem], recipe: RlRecipe, step: int) -> list[Problem]:
    """The prompts drawn in `step` (from 1): the next ones of an endless sequence of shuffled epochs."""
    share = recipe.oversample if recipe.dynamic_sampling else 1.0
    count = math.ceil(recipe.prompts_per_step * share)
    drawn: list[Problem] = []
    for place in range((step - 1) * count, step * count):
        epoch, at = divmod(place, len(problems))
        if not drawn or at == 0:
            order = list(range(len(problems)))
            random.Random(derive_seed(recipe.seed, "prompts", epoch)).shuffle(order)
        drawn.append(problems[order[at]])
    return drawn


def choose_groups(trajectories: Sequence[Trajectory], recipe: RlRecipe) -> list[list[Trajectory]]:
    """The groups to train on, at most `prompts_per_step`; dynamic sampling leaves out those whose rewards are equal."""
    groups: dict[int, list[Trajectory]] = {}
    for one in trajectories:
        groups.setdefault(one.group, []).append(one)
    useful = [
        group for group in groups.values() if not recipe.dynamic_sampling or has_signal([t.reward for t in group])
    ]
    return useful[: recipe.prompts_per_step]


def evaluate(engine: Engine, template: ChatTemplate, heldout: Sequence[Problem], recipe: RlRecipe) -> Score:
    """Greedy score on the held-out problems with the weights as they are."""
    sampling = GREEDY.model_copy(update={"max_tokens": recipe.sampling.max_tokens})
    return score_problems(
        engine,
        template,
        heldout,
        sampling=sampling,
        enable_thinking=recipe.enable_thinking,
        seed=recipe.seed,
        max_turns=recipe.max_turns,
    )


def metrics_row(trajectories: Sequence[Trajectory], kept: int, updates: Sequence[UpdateStats]) -> dict[str, Any]:
    """Rewards over all rollouts of a step, and the objective over the groups kept (none kept: no update)."""
    judged = [(one, one.reward) for one in trajectories if one.reward is not None]
    by_task: dict[str, list[float]] = {}
    best: dict[int, float] = {}
    for one, reward in judged:
        by_task.setdefault(one.task, []).append(reward)
        best[one.group] = max(reward, best.get(one.group, 0.0))
    row: dict[str, Any] = {
        "reward_mean": mean([reward for _, reward in judged]),
        "reward_by_task": {task: mean(rewards) for task, rewards in sorted(by_task.items())},
        # share of prompts that some sample solved
        "pass_rate": mean([float(reward == 1.0) for reward in best.values()]),
        "well_formed": mean([float(one.well_formed) for one, _ in judged]),
        "tokens_mean": mean([float(one.generated_tokens) for one, _ in judged]),
        "infrastructure": len(trajectories) - len(judged),
        "groups_kept": kept,
    }
    if updates:
        # entropy and gap are about the rollouts as they were made, which the first update sees
        first, last = updates[0], updates[-1]
        row |= {"entropy": first.entropy, "logprob_gap": first.logprob_gap, "ratio_mean": last.ratio_mean}
        row |= {"kl": last.kl, "importance_mean": last.importance_mean}
        row |= {"clip_fraction": last.clip_fraction, "grad_norm": last.grad_norm, "loss": last.loss}
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run's result from its metrics: held-out accuracy before and after, rollout reward of first and last step."""
    scores = [row for row in rows if "heldout" in row]
    rewards = [row["reward_mean"] for row in rows if "reward_mean" in row]
    start, end = scores[0]["heldout"], scores[-1]["heldout"]
    return {
        "heldout_start": start,
        "heldout_end": end,
        "heldout_gain_points": 100.0 * (end - start),
        "reward_first": rewards[0],
        "reward_last": rewards[-1],
        "steps": rows[-1]["step"],
        "well_formed_start": scores[0]["heldout_well_formed"],
        "well_formed": scores[-1]["heldout_well_formed"],
    }
