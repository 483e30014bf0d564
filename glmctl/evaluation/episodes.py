"""Problems of files as whole episodes, several samples each, kept one by one as they end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.evaluation.responses import Responses
from glmctl.recipe.schema import EvalRecipe
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import check_infrastructure, play
from glmctl.rl.score import Score, summarize


def score_episodes(
    engine: Engine,
    template: ChatTemplate,
    problems: Sequence[Problem],
    recipe: EvalRecipe,
    responses: Responses,
    moved: Callable[[str, int, int], None],
) -> Score:
    """`recipe.samples_per_problem` episodes of each problem, those that `responses` knows not played again.

    `moved` is told ("episodes", how many are over, how many there are).

    One that the environment failed is not kept: it is played again by whoever comes back. Raises as `rl.rollout` does.
    """
    asked: list[tuple[str, Problem, Trajectory]] = []
    known: Counter[str] = Counter()
    for group, problem in enumerate(problems):
        first = known[problem.id]
        known[problem.id] += recipe.samples_per_problem
        for sample in range(first, known[problem.id]):
            key = responses.key(
                "episode",
                problem.to_row(),
                sample,
                recipe.sampling.model_dump(),
                recipe.seed,
                recipe.max_turns,
                recipe.enable_thinking,
                engine.max_length,
            )
            row = responses.get(key)
            if row is None:
                one = Trajectory(problem.id, problem.task, group, sample, recipe.enable_thinking)
            else:
                one = Trajectory.from_row({**row, "group": group})
            asked.append((key, problem, one))
    keys = {(one.group, one.sample): key for key, _, one in asked}
    fresh = [(problem, one) for _, problem, one in asked if one.reward is None]
    done = len(asked) - len(fresh)

    def keep(one: Trajectory) -> None:
        nonlocal done
        if one.reward is not None:
            responses.put([(keys[one.group, one.sample], one.to_row())])
        done += 1
        moved("episodes", done, len(asked))

    play(engine, template, fresh, sampling=recipe.sampling, seed=recipe.seed, max_turns=recipe.max_turns, finished=keep)
    trajectories = [one for _, _, one in asked]
    check_infrastructure(trajectories)
    return summarize(trajectories)
