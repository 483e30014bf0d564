"""Agentic SFT data in the report's four steps (GLM-4.5 report section 3.1; spec section 3.1).

Tools are collected, tasks made, trajectories played and judged. A trajectory is written down once it is played
(`trajectories.jsonl`), its votes once it is judged (`votes.jsonl`), so a run that was stopped goes on without playing
any of them twice.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.data.conversations import Conversation
from glmctl.distill.agentic.actors import Actor, open_speaker
from glmctl.distill.agentic.journal import Journal
from glmctl.distill.agentic.judges import by_model, by_rules, rejections
from glmctl.distill.agentic.play import AgentTrajectory, play
from glmctl.distill.agentic.script import Script
from glmctl.distill.agentic.tasks import AgentTask, read_tasks, synthesise
from glmctl.distill.agentic.toolbox import ToolboxDied
from glmctl.distill.agentic.worlds import EnvironmentWorld, Workbench, World
from glmctl.errors import DataError, EnvironmentProblem, Interrupted, RecipeError
from glmctl.recipe.agentic import AgenticRecipe, ModelJudge, ProblemTools, ScriptedActor
from glmctl.rl.score import load_heldout
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import demonstrate
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.signals import StopFlag

Job = tuple[AgentTask, int]
"""a task and the number of its sample"""


@dataclass(frozen=True)
class Cast:
    """Who takes part."""

    teacher: Actor | None
    """None: every task brings its own script"""
    user: Actor | None
    judges: list[Callable[[AgentTask, AgentTrajectory], str]]


def run(recipe: AgenticRecipe, run: Run) -> dict[str, Any]:
    """Write `conversations.jsonl`, `tools.json` and `rejections.json` into the run's export.

    Summary: `tools`, `tasks`, `trajectories`, `kept`, `turns` (of the assistant, in what was kept), `calls`, and
    `rejected` by cause. Raises DataError when no task can be had or nothing is kept, EnvironmentProblem when an actor
    does not answer or a server stays dead, Interrupted after a signal.
    """
    simulator = open_speaker(recipe.simulator) if recipe.simulator is not None else None
    with ExitStack() as opened:
        benches: list[Workbench] = []
        for _ in range(recipe.concurrency):
            benches.append(Workbench(recipe.tools, simulator))
            opened.callback(benches[-1].close)
        tasks = _tasks(recipe, benches[0], run.path)
        journal = Journal(run.path)
        found = journal.read()
        jobs = [(task, sample) for task in tasks for sample in range(recipe.samples_per_task)]
        _play_all(recipe, jobs, found, journal, benches, _cast(recipe))
    return _publish(run, benches[0], tasks, [found[task.id, sample] for task, sample in jobs])


def _play_all(
    recipe: AgenticRecipe,
    jobs: Sequence[Job],
    found: dict[tuple[str, int], AgentTrajectory],
    journal: Journal,
    benches: Sequence[Workbench],
    cast: Cast,
) -> None:
    """Play what is missing from `found` and judge what has no votes there, `concurrency` at a time."""
    free: queue.SimpleQueue[Workbench] = queue.SimpleQueue()
    for bench in benches:
        free.put(bench)

    def work(job: Job) -> AgentTrajectory:
        task, sample = job
        trajectory = found.get((task.id, sample))
        if trajectory is None:
            bench = free.get()
            try:
                trajectory = played(recipe, task, sample, bench, cast)
            finally:
                free.put(bench)
            # before the judges are asked: one that does not answer must not cost what was played
            journal.played(trajectory)
        if not trajectory.problem:
            trajectory.votes = {f"judge {at}": judge(task, trajectory) for at, judge in enumerate(cast.judges, 1)}
            journal.judged(trajectory)
        return trajectory

    finished = {key for key, trajectory in found.items() if trajectory.finished}
    missing: Iterator[Job] = iter([job for job in jobs if (job[0].id, job[1]) not in finished])
    running: set[Future[AgentTrajectory]] = set()
    failure: EnvironmentProblem | None = None
    with (
        StopFlag() as stop,
        console.progress(recipe.name, len(jobs), unit="sample", start=len(finished)) as bar,
        ThreadPoolExecutor(len(benches)) as pool,
    ):
        while True:
            if failure is None and stop.raised is None:
                running |= {pool.submit(work, job) for job in islice(missing, len(benches) - len(running))}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, EnvironmentProblem):
                    failure = error
                elif error is not None:
                    raise error
                else:
                    trajectory = future.result()
                    found[trajectory.task, trajectory.sample] = trajectory
                    bar.advance(1, kept=sum(one.kept for one in found.values()))
    if failure is not None:
        raise failure
    if stop.raised:
        raise Interrupted(f"interrupted: {recipe.name}", exit_code=stop.raised, hint="the same command continues")


def played(recipe: AgenticRecipe, task: AgentTask, sample: int, bench: Workbench, cast: Cast) -> AgentTrajectory:
    """One trajectory. A server that dies meanwhile is started again and the task played from its beginning."""
    teacher = cast.teacher or Script(task.script, task.id)
    while True:
        bench.begin()
        world: World = EnvironmentWorld(task.problem) if task.problem is not None else bench
        try:
            return play(
                task,
                sample,
                world,
                teacher,
                cast.user,
                max_calls=recipe.max_calls,
                user_turns=recipe.user_turns,
                thinking=recipe.enable_thinking,
                seed=derive_seed(recipe.seed, "agentic", task.id, sample),
            )
        except ToolboxDied as error:
            # what was said so far goes: half a trajectory would teach that answers may be left out
            bench.revive(error)


def _cast(recipe: AgenticRecipe) -> Cast:
    judges: list[Callable[[AgentTask, AgentTrajectory], str]] = []
    for at, spec in enumerate(recipe.judges):
        if isinstance(spec, ModelJudge):
            actor, focus, seed = open_speaker(spec.judge), spec.focus, derive_seed(recipe.seed, "judge", at)
            judges.append(lambda task, found, a=actor, f=focus, s=seed: by_model(task, found, a, f, s))  # type: ignore[misc]
        else:
            judges.append(by_rules)
    teacher = None if isinstance(recipe.teacher, ScriptedActor) else open_speaker(recipe.teacher)
    user = open_speaker(recipe.user) if recipe.user is not None else None
    return Cast(teacher, user, judges)


def _tasks(recipe: AgenticRecipe, bench: Workbench, folder: Path) -> list[AgentTask]:
    """All tasks, synthesised ones written to `tasks.jsonl` so that a resumed run has the same. DataError for none."""
    tasks = read_tasks(recipe.tasks)
    for source in recipe.tools:
        if isinstance(source, ProblemTools):
            tasks += _of_problems(source)
    if recipe.synthesis is not None:
        kept = folder / "tasks.jsonl"
        if not kept.is_file():
            made = synthesise(recipe.synthesis, open_speaker(recipe.synthesis.writer), bench.tools, recipe.seed)
            rows = [{"id": one.id, "prompt": one.prompt, "goal": one.goal} for one in made]
            atomic.write_text(kept, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        tasks += read_tasks([str(kept)])
    if not tasks:
        raise DataError(f"{recipe.name}: no tasks")
    if isinstance(recipe.teacher, ScriptedActor):
        bare = next((task for task in tasks if not task.script), None)
        if bare is not None:
            raise RecipeError(f"{bare.id}: has no script, and the teacher is a scripted one")
    names = [task.id for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two tasks have the id '{twice}'")
    return tasks


def _of_problems(source: ProblemTools) -> list[AgentTask]:
    """Tasks of our own environments, with the scripts that their demonstrations are."""
    found = []
    for problem in load_heldout(source.paths, None)[: source.count]:
        talk = demonstrate(problem)
        if not talk.tools:
            raise RecipeError(f"{problem.id}: a problem without tools is no agent's task")
        calls = [
            {**call["function"], "reasoning": message.get("reasoning_content")}
            for message in talk.messages
            for call in message.get("tool_calls") or []
        ]
        last = talk.messages[-1]
        turn = {"calls": calls, "answer": last["content"], "reasoning": last.get("reasoning_content")}
        found.append(AgentTask(problem.id, problem.prompt, script=[turn], problem=problem))
    return found


def _publish(
    run: Run, bench: Workbench, tasks: Sequence[AgentTask], found: Sequence[AgentTrajectory]
) -> dict[str, Any]:
    kept = [one for one in found if one.kept]
    causes = rejections(found)
    counts = {cause: int(str(entry["count"])) for cause, entry in causes.items()}
    if not kept:
        raise DataError(f"none of {len(found)} trajectories was kept: {counts}")
    rows = [Conversation(one.messages, one.tools, one.enable_thinking).row() for one in kept]
    tools = [*bench.tools, *(tool for one in kept for tool in one.tools)]
    declared = list({json.dumps(tool, sort_keys=True): tool for tool in tools}.values())
    with atomic.publish(run.export) as folder:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic.write_text(folder / "conversations.jsonl", lines)
        atomic.write_json(folder / "tools.json", declared)
        atomic.write_json(folder / "rejections.json", causes)
    written = [message for one in kept for message in one.messages if message["role"] == "assistant"]
    return {
        "tools": len(declared),
        "tasks": len(tasks),
        "trajectories": len(found),
        "kept": len(kept),
        "turns": len(written),
        "calls": sum(len(message.get("tool_calls") or []) for message in written),
        "rejected": counts,
    }
