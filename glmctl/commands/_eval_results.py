"""What `glmctl eval` shows besides running: the catalogue, a comparison, a judgement. Heavy imports when called."""

from __future__ import annotations

from pathlib import Path

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError


def list_tasks() -> None:
    """Our tasks and groups, and the report's suites with what each part needs."""
    from glmctl.evaluation.catalog import OWN_GROUPS, OWN_TASKS
    from glmctl.evaluation.suites import SUITES

    tasks = [[name, one.metric, one.about] for name, one in OWN_TASKS.items()]
    console.table("offline tasks", ["task", "metric", "what"], tasks)
    groups = [[name, ", ".join(members)] for name, members in OWN_GROUPS.items()]
    console.table("groups of them", ["group", "tasks"], groups)
    parts = [
        [suite, one.name, one.task or "", _score(one.glm_4_5), _score(one.air), one.needs]
        for suite, found in SUITES.items()
        for one in found
    ]
    console.table(
        "the report's suites (arXiv 2508.06471)",
        ["suite", "benchmark", "lm-eval", "GLM-4.5", "Air", "needs"],
        parts,
    )
    keys = ("suite", "name", "task", "glm_4_5", "air", "needs")
    body = {
        "tasks": [dict(zip(("task", "metric", "about"), row, strict=True)) for row in tasks],
        "groups": {name: list(members) for name, members in OWN_GROUPS.items()},
        "suites": [dict(zip(keys, row, strict=True)) for row in parts],
    }
    console.result(body, text="")


def compare(first: Path, second: Path) -> None:
    """Two evaluated models, document by document."""
    from dataclasses import asdict

    from glmctl.evaluation import compare as pairs
    from glmctl.evaluation.statistics import holm

    results = pairs.compare(first, second)
    pairs.show(first, second, results)
    adjusted = holm([one.p_value for one in results.values()])
    rows = {
        task: {**asdict(one), "difference": one.difference, "p_value_holm": among_all}
        for (task, one), among_all in zip(results.items(), adjusted, strict=True)
    }
    console.result({"first": str(first), "second": str(second), "tasks": rows}, text="")


def judge(
    pair: tuple[Path, Path] | None, url: str | None, model: str | None, tasks: list[str] | None, out: Path | None
) -> None:
    """Two evaluated models before a judge. GlmctlError (usage) unless models, address and judge are all named."""
    if pair is None or url is None or model is None:
        raise GlmctlError("a judgement needs --compare A B, --judge URL and --judge_model NAME")
    from glmctl.evaluation.judge import Judge
    from glmctl.evaluation.pairwise import judge_folders, show

    first, second = pair
    folder = out or stage.default_path(f"judge-{first.name}-{second.name}")
    found = judge_folders(first, second, Judge(url, model), folder, tasks)
    show(first, second, found)
    body = {task: one.to_row() for task, one in found.items()}
    console.result({"first": str(first), "second": str(second), "run": str(folder), "tasks": body}, text="")


def _score(value: float | None) -> str:
    """A score of the report, nothing where it gives none."""
    return "" if value is None else f"{value:.1f}"
