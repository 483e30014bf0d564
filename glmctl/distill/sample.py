"""Ask an expert: several answers to each prompt, written down as they come so that none is sampled twice."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.errors import Interrupted
from glmctl.recipe.schema import Sampling, Teacher
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import rollout
from glmctl.rl.seeds import derive_seed
from glmctl.run import atomic
from glmctl.run.metrics import MetricsLog
from glmctl.run.signals import StopFlag

PROMPTS_AT_ONCE = 64
"""prompts sampled between two writes: what a kill costs"""


def choose_prompts(teacher: Teacher, problems: Sequence[Problem], seed: int) -> list[Problem]:
    """`teacher.prompts` different problems (all, if there are fewer), in an order that depends on the seed alone."""
    rng = random.Random(derive_seed(seed, "distill", teacher.name))
    return rng.sample(list(problems), min(teacher.prompts, len(problems)))


def sample_teacher(
    engine: Engine,
    template: ChatTemplate,
    teacher: Teacher,
    prompts: Sequence[Problem],
    *,
    sampling: Sampling,
    max_turns: int,
    seed: int,
    path: Path,
    stop: StopFlag,
) -> list[Trajectory]:
    """`teacher.samples_per_prompt` trajectories of each prompt, from `path` where they are there already.

    `path` is JSON lines, one trajectory a line. A prompt whose samples are not all there (a kill while writing) is
    sampled again; seeds come from the problem's id, so they come out the same. Raises Interrupted at the next chunk
    after a signal; what is done is kept.
    """
    log = MetricsLog(path)
    whole = _whole_prompts(log, teacher.samples_per_prompt)
    missing = [problem for problem in prompts if problem.id not in whole]
    place = {problem.id: index for index, problem in enumerate(prompts)}
    done = len(prompts) - len(missing)
    if done:
        console.note(f"{teacher.name}: {done} of {len(prompts)} prompts were sampled before")
    with console.progress(f"sample {teacher.name}", len(prompts), unit="prompt", start=done) as bar:
        for at in range(0, len(missing), PROMPTS_AT_ONCE):
            chunk = missing[at : at + PROMPTS_AT_ONCE]
            for trajectory in rollout(
                engine,
                template,
                chunk,
                samples=teacher.samples_per_prompt,
                sampling=sampling,
                seed=derive_seed(seed, "distill", teacher.name),
                max_turns=max_turns,
            ):
                # its place among all prompts, whatever chunk it came in
                trajectory.group = place[trajectory.problem_id]
                whole.setdefault(trajectory.problem_id, []).append(trajectory)
                log.append(trajectory.to_row())
            bar.advance(len(chunk))
            if stop.raised:
                raise Interrupted(f"interrupted while sampling {teacher.name}", exit_code=stop.raised)
    return [trajectory for problem in prompts for trajectory in whole[problem.id]]


def _whole_prompts(log: MetricsLog, samples: int) -> dict[str, list[Trajectory]]:
    """The prompts of which all samples were written; lines of others are removed from the file."""
    rows = log.rows()
    counts = Counter(row["problem_id"] for row in rows)
    whole = [row for row in rows if counts[row["problem_id"]] == samples]
    if len(whole) < len(rows):
        atomic.write_text(log.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole))
    groups: dict[str, list[Trajectory]] = {}
    for row in whole:
        groups.setdefault(row["problem_id"], []).append(Trajectory.from_row(row))
    return groups
