"""lm-eval run on our `LM`.

`lm_eval.evaluate` is called, not `simple_evaluate`: the latter seeds every global generator and describes the whole
machine (seconds, and nothing that a result needs). The scores are the same; a test compares the two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lm_eval.api import task as lm_eval_task
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from glmctl.errors import unknown
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.evaluation.lm import GlmctlLM
from glmctl.evaluation.results import Results
from glmctl.evaluation.tasks import TaskInputs, build_task

FEWSHOT_SEED = 1234
"""lm-eval's own default, so that few-shot examples are those of a published score"""


def run_tasks(
    lm: GlmctlLM,
    tasks: Sequence[str],
    inputs: TaskInputs,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 0,
) -> Results:
    """Evaluate task names and return lm-eval's results with `samples` by task.

    Our own tasks come with their prompts rendered; `apply_chat_template` is for all others, which are looked up in
    lm-eval's registry (a scan of many files: only when one is asked for). RecipeError for a name that is in neither.
    """
    merged: Results = {}
    with _quiet():
        own = [build_task(name, inputs) for name in tasks if name in OWN_TASKS]
        other = _load([name for name in tasks if name not in OWN_TASKS])
        for group, chat in ((own, False), (other, apply_chat_template)):
            if not group:
                continue
            _set_fewshot(group, num_fewshot)
            loaded = TaskManager(include_defaults=False).load(group)
            found = evaluate(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=bootstrap_iters,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=True,
            )
            assert found is not None, "only other ranks than the first return nothing"
            for key, value in found.items():
                merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def _load(wanted: Sequence[str]) -> list[Task]:
    if not wanted:
        return []
    manager = TaskManager()
    for name in wanted:
        if name not in manager.all_tasks:
            raise unknown("task", name, [*OWN_TASKS, *manager.all_tasks])
    loaded: list[Task] = list(manager.load(list(wanted))["tasks"].values())
    return loaded


def _set_fewshot(tasks: Sequence[Task], num_fewshot: int | None) -> None:
    """As `simple_evaluate` does: a task whose config says 0 stays at 0."""
    for task in tasks:
        given = task.get_config("num_fewshot")
        if num_fewshot is not None and given != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


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
