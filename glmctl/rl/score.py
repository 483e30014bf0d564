"""Held-out scores: every problem of the files at once through the engine, judged by its own environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.errors import RecipeError
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import Sampling
from glmctl.rl.environment import Problem, read_problems, require_one_id_each
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import rollout, rollout_engine
from glmctl.run.directory import resolve_model

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Score:
    """Shares are 0..1, over the episodes that infrastructure did not fail."""

    accuracy: float
    """mean reward"""
    well_formed: float
    """share in which every turn parsed under the template"""
    thinking_rate: float
    """share in which every turn has non-empty reasoning"""
    direct_rate: float
    """share that is well-formed and has no reasoning in any turn"""
    mean_tokens: float
    """tokens the model wrote in an episode"""
    by_task: dict[str, float]
    """accuracy of each task"""
    samples: list[Trajectory]


def score(
    model: GlmMoe | Path | str,
    problem_files: Sequence[Path | str],
    *,
    limit: int | None = None,
    sampling: Sampling = GREEDY,
    enable_thinking: bool = True,
    seed: int = 0,
    max_turns: int = 4,
    episode_tokens: int = 1024,
    template: ChatTemplate | None = None,
) -> Score:
    """Score a model folder, run directory, or a live model (then `template` is needed) on the first `limit` problems
    of each file. Raises RecipeError or DataError for a missing or damaged model or file.
    """
    problems = load_heldout(problem_files, limit)
    if not isinstance(model, GlmMoe):
        folder = resolve_model(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, template = load_model(folder, device=device), template or ChatTemplate.load(folder)
    if template is None:
        raise ValueError("a live model is scored with its chat template")
    engine = rollout_engine(model, episode_tokens)
    return score_problems(
        engine,
        template,
        problems,
        sampling=sampling,
        enable_thinking=enable_thinking,
        seed=seed,
        max_turns=max_turns,
    )


def load_heldout(problem_files: Sequence[Path | str], limit: int | None) -> list[Problem]:
    """The first `limit` problems of each file, in order.

    Raises RecipeError when a file is missing, DataError for a damaged one or one id for two problems.
    """
    problems = []
    for name in problem_files:
        if not Path(name).is_file():
            raise RecipeError(f"{name}: no such problem file")
        problems += read_problems(Path(name))[:limit]
    require_one_id_each(problems)
    return problems


def score_problems(
    engine: Engine,
    template: ChatTemplate,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    enable_thinking: bool,
    seed: int,
    max_turns: int,
    samples: int = 1,
) -> Score:
    """`samples` episodes of each problem, summarised."""
    trajectories = rollout(
        engine,
        template,
        problems,
        samples=samples,
        sampling=sampling,
        seed=seed,
        max_turns=max_turns,
        enable_thinking=enable_thinking,
    )
    return summarize(trajectories)


def summarize(trajectories: Sequence[Trajectory]) -> Score:
    """The score of given episodes; those that infrastructure failed take no part."""
    judged = [one for one in trajectories if one.reward is not None]
    assert judged, "a rollout in which all episodes failed has raised before"
    by_task: dict[str, list[float]] = {}
    for one in judged:
        by_task.setdefault(one.task, []).append(one.reward or 0.0)
    return Score(
        accuracy=_mean([one.reward or 0.0 for one in judged]),
        well_formed=_mean([float(one.well_formed) for one in judged]),
        thinking_rate=_mean([float(thinks(one)) for one in judged]),
        direct_rate=_mean([float(is_direct(one)) for one in judged]),
        mean_tokens=_mean([float(one.generated_tokens) for one in judged]),
        by_task={task: _mean(rewards) for task, rewards in sorted(by_task.items())},
        samples=list(trajectories),
    )


def thinks(trajectory: Trajectory) -> bool:
    """Every turn of the model has non-empty reasoning (and there is a turn that parsed)."""
    turns = trajectory.assistant_turns
    return bool(turns) and all((turn.get("reasoning_content") or "").strip() for turn in turns)


def is_direct(trajectory: Trajectory) -> bool:
    """Well-formed, and no turn of the model has reasoning: how `/nothink` is obeyed."""
    turns = trajectory.assistant_turns
    return trajectory.well_formed and not any((turn.get("reasoning_content") or "").strip() for turn in turns)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
