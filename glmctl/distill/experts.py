"""Who is asked: a model in our own engine, or one behind any OpenAI-compatible server, by the same calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from glmctl.data.chat import ChatTemplate
from glmctl.distill.endpoint import Endpoint
from glmctl.engine.engine import Engine
from glmctl.errors import EnvironmentProblem
from glmctl.model.folder import load_model
from glmctl.recipe.schema import Expert, Sampling
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import play, rollout_engine
from glmctl.run.directory import resolve_model

Ask = tuple[Problem, Trajectory]
"""a problem and the fresh trajectory that will hold the answer"""
Finished = Callable[[Trajectory, int], None]
"""called with each trajectory the moment it ends, and how many prompt tokens were read for it"""


class Player(Protocol):
    """Somebody who answers. Its template gives the tokens of what it wrote."""

    @property
    def template(self) -> ChatTemplate: ...

    def play(
        self,
        asked: Iterable[Ask],
        *,
        sampling: Sampling,
        seed: int,
        finished: Finished,
        stopped: Callable[[], bool],
    ) -> None:
        """Play every trajectory in place. Once `stopped` says so, nothing new is begun and the call returns."""
        ...


class EnginePlayer:
    """A model of ours."""

    def __init__(self, engine: Engine, template: ChatTemplate, max_turns: int) -> None:
        self.template = template
        self._engine = engine
        self._max_turns = max_turns

    def play(
        self,
        asked: Iterable[Ask],
        *,
        sampling: Sampling,
        seed: int,
        finished: Finished,
        stopped: Callable[[], bool],
    ) -> None:
        """See `Player`; what is under way when it is stopped is given up, and comes out the same another time."""
        play(
            self._engine,
            self.template,
            asked,
            sampling=sampling,
            seed=seed,
            max_turns=self._max_turns,
            finished=lambda one: finished(one, len(one.tokens) - one.generated_tokens),
            stopped=stopped,
        )


class EndpointPlayer:
    """A model behind a server, `concurrency` episodes at once."""

    def __init__(self, endpoint: Endpoint, concurrency: int) -> None:
        self.template = endpoint.template
        self._endpoint = endpoint
        self._concurrency = concurrency

    def play(
        self,
        asked: Iterable[Ask],
        *,
        sampling: Sampling,
        seed: int,
        finished: Finished,
        stopped: Callable[[], bool],
    ) -> None:
        """See `Player`; what is under way when it is stopped was paid for and is waited for.

        EnvironmentProblem when the server does not answer; what was finished before has been handed over.
        """
        waiting = iter(asked)
        running: dict[Future[int], Trajectory] = {}
        failure: EnvironmentProblem | None = None
        with ThreadPoolExecutor(self._concurrency) as pool:
            while True:
                if failure is None and not stopped():
                    for problem, trajectory in islice(waiting, self._concurrency - len(running)):
                        running[pool.submit(self._endpoint.episode, problem, trajectory, sampling, seed)] = trajectory
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    trajectory, error = running.pop(future), future.exception()
                    if error is None:
                        finished(trajectory, future.result())
                    elif isinstance(error, EnvironmentProblem):
                        failure = error
                    else:
                        raise error
        if failure is not None:
            raise failure


def open_expert(
    expert: Expert, student: Path, *, device: torch.device, episode_tokens: int, max_turns: int
) -> EnginePlayer | EndpointPlayer:
    """The expert, ready to be asked. RecipeError or DataError when its folder is not there or damaged.

    What a server says is put into tokens by the student's tokenizer and template.
    """
    if expert.url is None:
        folder = resolve_model(expert.model)
        model = load_model(folder, device=device, dtype=torch.float32)
        return EnginePlayer(rollout_engine(model, episode_tokens), ChatTemplate.load(folder), max_turns)
    key = os.environ.get(expert.api_key_env)
    endpoint = Endpoint(expert.url, expert.model, key, ChatTemplate.load(student), max_turns)
    return EndpointPlayer(endpoint, expert.concurrency)


def template_of(expert: Expert, student: Path) -> ChatTemplate:
    """The template that the expert's samples are written in, without loading the expert."""
    return ChatTemplate.load(student if expert.url is not None else resolve_model(expert.model))
