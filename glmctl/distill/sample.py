"""Ask somebody many problems and write every answer down the moment it ends, so that none is sampled twice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from glmctl import console
from glmctl.distill.experts import Ask, Player
from glmctl.errors import EnvironmentProblem, Interrupted
from glmctl.recipe.schema import Sampling, Teacher
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import check_infrastructure
from glmctl.rl.seeds import derive_seed
from glmctl.run import atomic
from glmctl.run.metrics import MetricsLog
from glmctl.run.signals import StopFlag


@dataclass
class Cost:
    """What sampling took, over all restarts."""

    samples: int = 0
    prompt_tokens: int = 0
    """tokens read: prompts, tool results, and with a server whatever it counts again each turn"""
    tokens: int = 0
    """tokens written by the model"""
    seconds: float = 0.0

    def to_row(self) -> dict[str, Any]:
        """JSON-able, with the rate."""
        return {**asdict(self), "tokens_per_second": self.tokens / max(self.seconds, 1e-9)}


class SampleJournal:
    """Finished samples as JSON lines, one trajectory a line with what it cost, in the order in which they ended."""

    def __init__(self, path: Path) -> None:
        """What is there already is read; the half line of a kill counts as not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.samples: dict[tuple[str, int], Trajectory] = {}
        self.cost = Cost()
        self._log = MetricsLog(path)
        for row in self._log.rows():
            cost = row.pop("cost")
            self._count(Trajectory.from_row(row), cost["prompt_tokens"], cost["seconds"])
        self._since = perf_counter()

    def start_clock(self) -> None:
        """Count the seconds of the next sample from now."""
        self._since = perf_counter()

    def add(self, sample: Trajectory, prompt_tokens: int) -> None:
        """Write one finished sample down."""
        now = perf_counter()
        seconds, self._since = now - self._since, now
        self._log.append({**sample.to_row(), "cost": {"prompt_tokens": prompt_tokens, "seconds": seconds}})
        self._count(sample, prompt_tokens, seconds)

    def drop_failed(self) -> None:
        """Forget what infrastructure failed, so that it is asked again."""
        kept = [row for row in self._log.rows() if row["reward"] is not None]
        atomic.write_text(self._log.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def _count(self, sample: Trajectory, prompt_tokens: int, seconds: float) -> None:
        self.samples[sample.problem_id, sample.sample] = sample
        self.cost.samples += 1
        self.cost.prompt_tokens += prompt_tokens
        self.cost.tokens += sample.generated_tokens
        self.cost.seconds += seconds


def choose_prompts(teacher: Teacher, problems: Sequence[Problem], seed: int) -> list[Problem]:
    """`teacher.prompts` different problems (all, if there are fewer), in an order that depends on the seed alone."""
    rng = random.Random(derive_seed(seed, "distill", teacher.name))
    different = list({problem.id: problem for problem in problems}.values())
    return rng.sample(different, min(teacher.prompts, len(different)))


def collect(
    journal: SampleJournal,
    player: Callable[[], Player],
    problems: Sequence[Problem],
    *,
    label: str,
    samples: int,
    sampling: Sampling,
    seed: int,
    stop: StopFlag,
    enable_thinking: bool = True,
) -> list[Trajectory]:
    """`samples` trajectories of each problem, by problem, those of the journal as they are there.

    `player` is called only when something is missing. A sample is a function of (seed, problem, its number), so an
    interrupted collection continues to the same samples. Raises Interrupted after a signal and EnvironmentProblem
    when over a fifth of the samples failed in the machinery; what is done stays in the journal.
    """
    total = samples * len(problems)

    def missing() -> Iterator[Ask]:
        for group, problem in enumerate(problems):
            for number in range(samples):
                if (problem.id, number) not in journal.samples:
                    yield problem, Trajectory(problem.id, problem.task, group, number, enable_thinking)

    left = sum(1 for _ in missing())
    if left:
        if left < total:
            console.note(f"{label}: {total - left} of {total} samples are there already")
        with console.progress(label, total, unit="sample", start=total - left) as bar:

            def finished(sample: Trajectory, prompt_tokens: int) -> None:
                journal.add(sample, prompt_tokens)
                bar.advance(1, tokens=journal.cost.tokens)

            asked = player()
            journal.start_clock()
            asked.play(
                # settled beforehand: the journal grows while it is played
                iter(list(missing())),
                sampling=sampling,
                seed=seed,
                finished=finished,
                stopped=lambda: stop.raised is not None,
            )
    if stop.raised:
        raise Interrupted(f"interrupted: {label}", exit_code=stop.raised, hint="the same command continues")
    found = [journal.samples[problem.id, number] for problem in problems for number in range(samples)]
    try:
        check_infrastructure(found)
    except EnvironmentProblem:
        journal.drop_failed()
        raise
    return found
