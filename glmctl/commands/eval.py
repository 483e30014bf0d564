"""`glmctl eval`: a model and tasks, as lm-eval spells them, or a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError
from glmctl.recipe import names

app = typer.Typer(**stage.PLAIN)


@app.command("eval")
def eval_(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A run directory or model folder (with -t), or a recipe.",
            autocompletion=names.complete,
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "-t", metavar="TASK,...", help="lm-eval task names, or our own.")
    ] = None,
    problems: Annotated[
        list[str] | None,
        typer.Option("--problems", metavar="NAME=FILE", help="A problem file, scored by its own verifier."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num_fewshot", "--num-fewshot", "-f", metavar="N", help="Examples in the prompt.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-L", metavar="N", help="Only N questions of a task.")] = None,
    nothink: Annotated[bool, typer.Option("--nothink", help="Direct answers, without reasoning.")] = False,
    output_path: Annotated[
        Path | None,
        typer.Option("--output_path", "--output-path", "-o", "--run", metavar="DIR", help="The run directory."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Samples of each problem: avg@N and pass@k.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Of problems and our tasks; 0 is greedy.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List our own offline tasks.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Two evaluated models (<run>/export/<model>), paired."),
    ] = None,
    overrides: stage.SetOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Evaluate a model: `glmctl eval runs/demo/distill -t glmctl_cloze -L 100`."""
    if list_:
        _list()
        return
    if compare is not None:
        _compare(*compare)
        return
    if target is None:
        raise GlmctlError("missing argument 'MODEL|RECIPE'", hint="`glmctl eval --help` shows the options")
    if temperature is not None:
        overrides = [f"sampling.temperature={temperature}", *(overrides or [])]
    wanted = [name for word in tasks or [] for name in word.split(",") if name]
    options: dict[str, tuple[str, Any]] = {
        "tasks": ("--tasks", wanted or None),
        "problems": ("--problems", dict(map(_pair, problems)) if problems else None),
        "num_fewshot": ("--num_fewshot", num_fewshot),
        "limit": ("--limit", limit),
        "enable_thinking": ("--nothink", False if nothink else None),
        "samples_per_problem": ("--samples", samples),
    }
    if names.looks_like_recipe(target):
        stage.run_stage(
            "eval", target, _as_overrides(options) + (overrides or []), output_path, fresh=fresh, dry_run=dry_run
        )
        return
    if not wanted and not problems:
        raise GlmctlError(
            f"nothing to evaluate '{target}' on; name tasks with -t or problem files with --problems",
            hint="or give a recipe, e.g. `glmctl eval demo/eval`",
        )
    stage.require_artifact(target)
    from glmctl.recipe.build import build, run_name

    given = {key: value for key, (_, value) in options.items()}
    name = run_name("eval", target, given, overrides)
    models = {run_name("", target).lstrip("-"): target}
    recipe = build("eval", {**options, "name": ("name", name), "models": ("MODEL", models)}, overrides)
    stage.drive(recipe, output_path or stage.default_path(name), fresh=fresh, dry_run=dry_run)


def _list() -> None:
    from glmctl.evaluation.catalog import OWN_TASKS

    rows = [[name, one.metric, one.problems or "", one.about] for name, one in OWN_TASKS.items()]
    console.table("", ["task", "metric", "problems", "what"], rows)
    keys = ("task", "metric", "problems", "about")
    console.result({"tasks": [dict(zip(keys, row, strict=True)) for row in rows]}, text="")


def _compare(first: Path, second: Path) -> None:
    from dataclasses import asdict

    from glmctl.evaluation.compare import compare, show

    results = compare(first, second)
    show(first, second, results)
    rows = {task: {**asdict(one), "difference": one.difference} for task, one in results.items()}
    console.result({"first": str(first), "second": str(second), "tasks": rows}, text="")


def _pair(word: str) -> tuple[str, str]:
    name, equals, path = word.partition("=")
    if not equals or not name or not path:
        raise GlmctlError(f"--problems {word}: expected NAME=FILE")
    return name, path


def _as_overrides(options: dict[str, tuple[str, Any]]) -> list[str]:
    import json

    # JSON is YAML, so a list or mapping survives the words of --set
    return [f"{key}={json.dumps(value)}" for key, (_, value) in options.items() if value is not None]
