"""Many episodes at once through the engine's continuous batch, token for token as the model wrote them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import Sampling
from glmctl.rl.environment import Problem, StopReason
from glmctl.rl.episode import Episode, Trajectory
from glmctl.rl.seeds import derive_seed

MAX_SLOTS = 128
"""sequences that decode together: more than a served model has, for nobody waits for a single one"""

IN_FLIGHT = 8 * MAX_SLOTS
"""episodes that are open at once; more would only lie in memory"""

INFRASTRUCTURE_LIMIT = 0.2
"""share of failed episodes above which a batch says more about the machine than about the model"""


def rollout_engine(model: GlmMoe, episode_tokens: int, *, speculative: int = 0) -> Engine:
    """An engine for episodes of at most `episode_tokens` tokens (and never more than the model's context).

    speculative: tokens that the MTP layer drafts in a step; they change speed, never the distribution.
    """
    length = min(episode_tokens, model.config.max_position_embeddings)
    return Engine(model, max_slots=MAX_SLOTS, max_length=length, speculative=speculative)


def rollout(
    engine: Engine,
    template: ChatTemplate,
    problems: Sequence[Problem],
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    max_turns: int,
    enable_thinking: bool = True,
) -> list[Trajectory]:
    """`samples` episodes of each problem, all running concurrently; returned by problem, then by sample.

    `sampling.max_tokens` bounds one turn. Every random draw is a function of (seed, id of the problem, sample, turn),
    so a trajectory does not depend on what else is in the batch. An episode that its environment or the engine fails
    comes back with reward None; more than a fifth of such episodes raise EnvironmentProblem. A prompt that does not
    fit into the engine raises RecipeError.
    """
    asked: list[tuple[Problem, Trajectory]] = []
    known: Counter[str] = Counter()
    for group, problem in enumerate(problems):
        # a problem that occurs twice in a batch goes on with fresh samples, not with copies
        first = known[problem.id]
        known[problem.id] += samples
        for sample in range(first, first + samples):
            asked.append((problem, Trajectory(problem.id, problem.task, group, sample, enable_thinking)))
    play(engine, template, asked, sampling=sampling, seed=seed, max_turns=max_turns)
    trajectories = [trajectory for _, trajectory in asked]
    check_infrastructure(trajectories)
    return trajectories


def play(
    engine: Engine,
    template: ChatTemplate,
    asked: Iterable[tuple[Problem, Trajectory]],
    *,
    sampling: Sampling,
    seed: int,
    max_turns: int,
    finished: Callable[[Trajectory], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> float:
    """Play every trajectory in place, at most `IN_FLIGHT` at once; those of one problem differ in `sample`.

    One that has tokens already goes on where it stopped. `finished` is called with each the moment it ends, whatever
    its end. Once `stopped` says so, what is under way is given up as it is, so that it may be played on later, and the
    call returns. `group` and `sample` together name a trajectory. Returns the seconds spent in environments.
    """
    running: dict[str, Episode] = {}
    judging = 0.0
    stop_ids = tuple(template.tokenizer.eos_ids)

    def submit(episode: Episode) -> None:
        """Ask the engine for the episode's next turn, unless the episode is over or the context is full."""
        trajectory = episode.trajectory
        room = engine.max_length - len(trajectory.tokens)
        turn = len(trajectory.versions)
        if not episode.done and room <= 0:
            if turn == 0:
                raise RecipeError(
                    f"problem {trajectory.problem_id}: its prompt has {len(trajectory.tokens)} tokens, "
                    f"an episode {engine.max_length}",
                    hint="raise episode_tokens (the model's context is the most)",
                )
            episode.truncate()
        if episode.done:
            if finished is not None:
                finished(trajectory)
            return
        # a turn that was cut short has some of its tokens
        left = max(1, sampling.max_tokens - episode.turn_tokens)
        params = SamplingParams(
            max_tokens=min(left, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop_token_ids=stop_ids,
            logprobs=True,
            seed=derive_seed(seed, trajectory.problem_id, trajectory.sample, turn),
        )
        name = f"{trajectory.group}.{trajectory.sample}.{turn}"
        running[name] = episode
        engine.add(Request(name, list(trajectory.tokens), params))

    waiting = iter(asked)
    prompts: dict[str, list[int]] = {}
    try:
        while not stopped():
            fresh = list(islice(waiting, IN_FLIGHT - len(running)))
            for problem, trajectory in fresh:
                episode = Episode(template, problem, trajectory, max_turns)
                if trajectory.tokens:
                    episode.resume()
                else:
                    episode.start(prompts)
                submit(episode)
            if not running:
                if not fresh:
                    break
                continue
            for event in engine.step():
                episode = running[event.id]
                assert event.logprob is not None
                episode.push(event.token, event.logprob)
                if event.finish_reason is not None:
                    del running[event.id]
                    before = episode.judging_seconds
                    episode.finish_turn(event.finish_reason, event.weight_version)
                    judging += episode.judging_seconds - before
                    submit(episode)
        for episode in running.values():
            episode.suspend(engine.version)
        return judging
    finally:
        # only an exception or a stop leaves requests here; the engine may be shared and must not go on with them
        for name in running:
            engine.abort(name)


def check_infrastructure(trajectories: Sequence[Trajectory]) -> None:
    """Raise EnvironmentProblem when more than 20% of the episodes failed for reasons other than the model."""
    failed = [one for one in trajectories if one.stop_reason is StopReason.INFRASTRUCTURE]
    if len(failed) > INFRASTRUCTURE_LIMIT * len(trajectories):
        raise EnvironmentProblem(
            f"{len(failed)} of {len(trajectories)} rollouts failed in the environment or engine, "
            f"first: {failed[0].problem_id}: {failed[0].detail}"
        )
