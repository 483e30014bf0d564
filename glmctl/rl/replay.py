"""Looking at a run's rollouts again, and judging them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import RlRecipe
from glmctl.rl.environment import InfrastructureFailure, Problem, StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.recording import read_step, recorded_steps
from glmctl.rl.sandbox.execute import sandbox
from glmctl.rl.score import load_heldout
from glmctl.rl.tasks import environment
from glmctl.run.metrics import MetricsLog

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421, 0x9B: 0xFFFD}


@dataclass(frozen=True)
class Shown:
    """One rollout of a step, with what became of its reward where the run wrote that down."""

    step: int
    trajectory: Trajectory
    reply: str
    """what the model wrote; "" where only its messages are known"""
    breakdown: dict[str, float | None] | None


def rollouts_of(run: Path, step: int | None = None) -> list[Shown]:
    """The rollouts of one step, or of every step that has some: of rollouts/ if they were recorded, else the samples.

    Raises RecipeError when `run` is no RL run or has none for that step.
    """
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run}: not a run directory")
    steps = recorded_steps(run)
    if steps:
        return [one for number in ([step] if step is not None else steps) for one in _recorded(run, number)]
    sampled = [one for one in _sampled(run) if step is None or one.step == step]
    if not sampled:
        known = sorted({one.step for one in _sampled(run)})
        found = f"of steps {', '.join(map(str, known))}" if known else "of no step"
        raise RecipeError(f"{run}: no rollouts of step {step} here, only {found}; rollouts.record keeps them all")
    return sampled


def judge_again(run: Path, rollouts: Sequence[Shown]) -> Iterator[tuple[Shown, float | None]]:
    """Each judged rollout with the reward that its messages earn now; None when the judge fails.

    Rollouts that no environment judged (malformed, truncated, out of turns) are left out: their 0 follows from how
    they ended. Raises DataError when a problem is no longer in the run's problem files.
    """
    recipe = RlRecipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    problems = {problem.id: problem for problem in load_heldout(recipe.problems, None)}
    with sandbox(recipe.sandbox):
        for one in rollouts:
            trajectory = one.trajectory
            if trajectory.stop_reason is not StopReason.ANSWERED:
                continue
            if trajectory.problem_id not in problems:
                raise DataError(f"{run}: problem {trajectory.problem_id} is in none of the recipe's files any more")
            yield one, _reward(problems[trajectory.problem_id], trajectory)


def _reward(problem: Problem, trajectory: Trajectory) -> float | None:
    judge = environment(problem)
    judge.reset()
    reward = None
    try:
        for message in trajectory.assistant_turns:
            reward = judge.step(message).reward
    except InfrastructureFailure:
        return None
    return reward


def _recorded(run: Path, step: int) -> Iterator[Shown]:
    found = read_step(run, step)
    for one in [*(one for group in found.groups for one in group), *found.others]:
        yield Shown(step, one, "", None)


def _sampled(run: Path) -> list[Shown]:
    names = vars(Trajectory("", "", 0, 0))
    return [
        Shown(row["step"], Trajectory.from_row({k: row[k] for k in names}), row["reply"], row["breakdown"])
        for row in MetricsLog(run / "trajectories.jsonl").rows()
    ]


def as_text(one: Shown) -> str:
    """A rollout as people read it: where it is from, each message, and its reward with its parts.

    A model may have written what a terminal obeys; control characters are shown as their pictures.
    """
    t = one.trajectory
    head = f"step {one.step}  {t.problem_id}  sample {t.sample}  weights {t.versions}"
    lines = [head, *(_message(message) for message in t.messages)]
    if one.reply and not t.well_formed:
        lines.append(f"[what it wrote] {one.reply}")
    reward = "masked" if t.reward is None else f"{t.reward:g}"
    ending = f"reward {reward}  {t.stop_reason}" + (f" ({t.detail})" if t.detail else "")
    parts = {**(one.breakdown or {}), **t.info}
    if parts:
        ending += "  " + "  ".join(f"{key} {_value(value)}" for key, value in parts.items())
    return "\n".join([*lines, ending]).translate(_PICTURES)


def as_row(one: Shown) -> dict[str, Any]:
    """The same for --json."""
    t = one.trajectory
    return {
        "step": one.step,
        "problem": t.problem_id,
        "sample": t.sample,
        "reward": t.reward,
        "stop_reason": t.stop_reason,
        "breakdown": one.breakdown,
        "info": t.info,
        "versions": t.versions,
        "messages": t.messages,
        "reply": one.reply,
    }


def _message(message: dict[str, Any]) -> str:
    parts = [str(message.get("content") or "")]
    if message.get("reasoning_content"):
        parts.insert(0, f"<think>{message['reasoning_content']}</think>")
    for call in message.get("tool_calls") or []:
        function = call["function"]
        parts.append(f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})")
    return f"[{message['role']}] " + " ".join(part for part in parts if part)


def _value(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
