"""lm-eval run on our `LM`.

`lm_eval.evaluate` is called, not `simple_evaluate`: the latter describes the whole machine by running a dozen programs
(seconds, and nothing that a result needs). Seeds, few-shot settings and scores are the same; a test compares the two.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api import task as lm_eval_task
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from glmctl.errors import EnvironmentProblem, RecipeError, unknown
from glmctl.evaluation.catalog import FEWSHOT_SEED, NUMPY_SEED, OWN_GROUPS, OWN_TASKS, PYTHON_SEED, TORCH_SEED
from glmctl.evaluation.results import Results
from glmctl.evaluation.suites import SUITES
from glmctl.evaluation.tasks import TaskInputs, build_task


@dataclass(frozen=True)
class Settings:
    """What `lm_eval run` calls by the same names."""

    limit: int | float | None = None
    num_fewshot: int | None = None
    fewshot_seed: int = FEWSHOT_SEED
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    include_path: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    confirm_run_unsafe_code: bool = False
    bootstrap_iters: int = 0


def run_tasks(lm: LM, tasks: Sequence[str], inputs: TaskInputs, settings: Settings | None = None) -> Results:
    """Evaluate tasks and groups by name and return lm-eval's results with `samples` by task.

    Our own tasks come with prompts and sampling of their own; template, system instruction, examples and `gen_kwargs`
    are for all others, which are looked up in lm-eval's registry (a scan of many files: only when one is asked for).
    RecipeError for a name that is in neither, EnvironmentProblem for a data set that is not on this machine.
    """
    settings = settings or Settings()
    ours, theirs = split(tasks)
    merged: Results = {}
    with _quiet(), _ambient_seeds():
        if ours:
            loaded = TaskManager(include_defaults=False).load(_own(ours, inputs))
            _merge(merged, _evaluate(lm, loaded, settings, ours=True))
        if theirs:
            _merge(merged, _evaluate(lm, _load(theirs, settings), settings, ours=False))
    return merged


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(our tasks and groups, lm-eval's), the report's suites replaced by the lm-eval names of their parts."""
    ours: list[str] = []
    theirs: list[str] = []
    for name in names:
        if name in SUITES:
            theirs += [part.task for part in SUITES[name] if part.task is not None]
        elif name in OWN_TASKS or name in OWN_GROUPS:
            ours.append(name)
        else:
            theirs.append(name)
    return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))


def _own(names: Sequence[str], inputs: TaskInputs) -> list[Task | Group]:
    """Tasks and groups of ours; a task that several groups hold is one task."""
    grouped = {task for name in names for task in OWN_GROUPS.get(name, ())}
    tasks = {name: build_task(name, inputs) for name in dict.fromkeys([*names, *grouped]) if name in OWN_TASKS}
    if len(grouped) < sum(len(OWN_GROUPS.get(name, ())) for name in names):
        # lm-eval refuses a task in two groups; then they are only names for several tasks
        return list(tasks.values())
    built: list[Task | Group] = [tasks[name] for name in tasks if name not in grouped]
    for name in names:
        if name in OWN_GROUPS:
            group = Group(name)
            for task in OWN_GROUPS[name]:
                group.add(tasks[task])
            built.append(group)
    return built


def _load(names: Sequence[str], settings: Settings) -> Any:
    manager = _manager(names, settings)
    for name in names:
        if name not in manager.all_tasks:
            raise unknown("task", name, [*OWN_TASKS, *OWN_GROUPS, *SUITES, *manager.all_tasks])
    try:
        return manager.load(list(names))
    except ImportError as error:
        raise EnvironmentProblem(f"tasks {', '.join(names)} need a package that is not installed: {error}") from error
    except OSError as error:
        # what `datasets` raises for a set that is neither here nor to be fetched is an OSError of one kind or another
        first = str(error).splitlines()[0]
        raise EnvironmentProblem(
            f"tasks {', '.join(names)} need data that is not on this machine: {first}",
            hint="HF_HUB_OFFLINE=0 lets them download it; `glmctl eval --list` shows the tasks that need none",
        ) from error


def _manager(names: Sequence[str], settings: Settings) -> TaskManager:
    """lm-eval's registry: the user's folder alone where that is enough, for reading all of lm-eval's takes seconds."""
    metadata = dict(settings.metadata)
    if settings.include_path is not None:
        if not Path(settings.include_path).is_dir():
            raise RecipeError(f"{settings.include_path}: no such folder of tasks")
        own = TaskManager(include_path=settings.include_path, include_defaults=False, metadata=metadata)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=settings.include_path, metadata=metadata)


def _evaluate(lm: LM, loaded: Any, settings: Settings, *, ours: bool) -> Results:
    tasks = loaded["tasks"].values()
    unsafe = [task.config.task for task in tasks if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not settings.confirm_run_unsafe_code:
        raise RecipeError(
            f"tasks {', '.join(unsafe)} run what the model wrote without a sandbox",
            hint="--confirm_run_unsafe_code allows it; glmctl_code is boxed",
        )
    _set_fewshot(tasks, settings)
    if not ours and settings.gen_kwargs:
        for task in tasks:
            if task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(settings.gen_kwargs), update=True)
    found = evaluate(
        lm,
        loaded,
        limit=settings.limit,
        bootstrap_iters=settings.bootstrap_iters,
        apply_chat_template=settings.apply_chat_template and not ours,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
        system_instruction=None if ours else settings.system_instruction,
        confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        log_samples=True,
    )
    assert found is not None, "only other ranks than the first return nothing"
    results: Results = found
    return results


def _set_fewshot(tasks: Sequence[Task], settings: Settings) -> None:
    """As `simple_evaluate` does: a task whose config says 0 stays at 0."""
    for task in tasks:
        given = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and given != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=settings.fewshot_seed)


def _merge(merged: Results, found: Results) -> None:
    for key, value in found.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value


@contextmanager
def _ambient_seeds() -> Iterator[None]:
    """lm-eval's tasks draw from the global generators (to shuffle choices, say): seeded as there, then put back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's advice and progress bars are for its own command line; its errors stay."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval_task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval_task.tqdm = lambda rows, **options: rows
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval_task.tqdm = bar
