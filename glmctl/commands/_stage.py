"""What every stage command shares: its options, the dry run, and the one call that opens a run and drives it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from glmctl import console
from glmctl.errors import GlmctlError, Interrupted, RecipeError, nearest
from glmctl.recipe import names

if TYPE_CHECKING:
    from glmctl.recipe.schema import Recipe

DRIVERS = {
    "tokenizer": "glmctl.data.tokenizer:run",
    "data": "glmctl.data.prepare:run",
    "problems": "glmctl.rl.problems:run",
    "reasoning": "glmctl.data.reasoning:run",
    "agentic": "glmctl.distill.agentic.collect:run",
    "pretrain": "glmctl.training.pretrain:run",
    "sft": "glmctl.training.sft:run",
    "reward": "glmctl.training.reward:run",
    "rl": "glmctl.rl.grpo:run",
    "distill": "glmctl.distill.unify:run",
    "on_policy_distill": "glmctl.distill.on_policy:run",
    "logit_distill": "glmctl.distill.logits:run",
    "eval": "glmctl.evaluation.run:run",
    "convert": "glmctl.convert.run:run",
    "serve": "glmctl.serving.run:run",
}
"""recipe type -> `module:function` of `run(recipe, run) -> summary`, imported when it is needed"""

NEXT = {
    "pretrain": "glmctl generate {run} --raw --prompt 'def '",
    "sft": "glmctl generate {run} --prompt 'Compute 3+4.'",
    "reward": "glmctl distill RECIPE --set teachers.0.reward.model={run}",
    "rl": "glmctl generate {run} --prompt 'Compute 3+4.'",
    "distill": "glmctl serve {run}",
    "on_policy_distill": "glmctl serve {run}",
    "logit_distill": "glmctl serve {run}",
    "convert": "glmctl serve {run}",
    "eval": "glmctl serve {model}",
    "tokenizer": "glmctl data prepare RECIPE --set tokenizer={run}",
    "data": "glmctl pretrain RECIPE --set stages.0.data={run}",
    "reasoning": "glmctl sft RECIPE --set 'data=[{run}/export/conversations.jsonl]'",
    "agentic": "glmctl sft RECIPE --set 'data=[{run}/export/conversations.jsonl]' --set loss_on=all_turns",
    "problems": "glmctl sft RECIPE --set 'data=[{run}/export/cold_start.jsonl]'",
}
"""recipe type -> what one would type after it"""

PICTURED = frozenset({"distill", "on_policy_distill"})
"""recipe types whose runs compare models, and so end with a report.html of their own"""

PLAIN: dict[str, Any] = {
    "rich_markup_mode": None,  # rich would double the time of --help
    "add_completion": False,
    "pretty_exceptions_enable": False,
}

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name or a .yaml path.",
        autocompletion=names.complete,
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key: --set schedule.peak_lr=1e-3. May be repeated."),
]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run directory; default runs/NAME (GLMCTL_RUNS/NAME).")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over; an existing run is moved aside.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the resolved recipe and what follows from it.")]
ProcessesOption = Annotated[
    int, typer.Option("--processes", metavar="N", min=1, help="Training processes on this machine.")
]


def default_path(name: str) -> Path:
    """Where a run lives unless --run says otherwise."""
    return Path(os.environ.get("GLMCTL_RUNS") or "runs") / name


def add_command(app: typer.Typer, name: str, kind: str, description: str) -> None:
    """Give `app` a command that runs recipes of one kind in one process and takes nothing but what all stages take."""

    @app.command(name, help=description)
    def command(
        recipe: RecipeArgument,
        overrides: SetOption = None,
        run: RunOption = None,
        fresh: FreshOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        run_stage(kind, recipe, overrides, run, fresh=fresh, dry_run=dry_run)


def run_stage(
    kind: str,
    recipe_name: str,
    overrides: list[str] | None,
    run: Path | None,
    *,
    fresh: bool,
    dry_run: bool,
    processes: int = 1,
    also: Sequence[str] = (),
) -> None:
    """A stage command from recipe name to printed result; `also` are the other recipe types that it runs."""
    from glmctl.recipe.load import load

    recipe = load(recipe_name, overrides or (), expect=kind, also=also)
    drive(recipe, run or default_path(recipe.name), fresh=fresh, dry_run=dry_run, processes=processes)


def drive(recipe: Recipe, path: Path, *, fresh: bool, dry_run: bool, processes: int = 1) -> None:
    """Show (`dry_run`) or run one resolved recipe, and print its result."""
    if dry_run:
        show(recipe, path)
        return
    _refuse_placeholders(recipe)
    if processes > 1 and "RANK" not in os.environ:
        from glmctl.parallel.launch import relaunch

        raise typer.Exit(relaunch(processes, _without_processes(sys.argv[1:])))
    summary = execute(recipe, path, fresh=fresh)
    if os.environ.get("RANK", "0") != "0":
        return
    model = next(iter(recipe.models.values())) if recipe.type == "eval" else ""
    command = NEXT.get(recipe.type, "").format(run=path, model=model)
    body = {"name": recipe.name, "type": recipe.type, "run": str(path), "summary": summary}
    console.result(body, text=console.pairs({"run": str(path), **summary}), next_command=command or None)


def execute(recipe: Recipe, path: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Open the run at `path`, drive the recipe unless it is finished, record how it ended, and return its summary.

    Raises:
        GlmctlError: what the run or its driver raised; the run directory says `failed` or `interrupted`.
    """
    from glmctl.run.directory import Run

    run = Run.open(recipe, path, fresh=fresh)
    try:
        if run.finished and not _endless(recipe):
            console.note(f"{path}: finished already; --fresh runs it again")
            return dict(run.summary)
        summary = _driven(recipe, run)
        run.finish(summary)
        if recipe.type in PICTURED and run.writer:
            from glmctl.run.report import report

            console.note(f"report: {report(run.path)}")
        return summary
    finally:
        run.close()


def _endless(recipe: Recipe) -> bool:
    """A server that was stopped is not thereby done."""
    return recipe.type == "serve" and not recipe.ask and not recipe.ask_problems


def _driven(recipe: Recipe, run: Any) -> dict[str, Any]:
    try:
        return driver(recipe.type)(recipe, run)
    except Interrupted as error:
        run.fail(error.message, state="interrupted")
        raise
    except KeyboardInterrupt as error:
        run.fail("interrupted", state="interrupted")
        raise Interrupted(f"{run.path}: interrupted", exit_code=130, hint="the same command continues") from error
    except GlmctlError as error:
        run.fail(error.message)
        raise
    except BaseException as error:
        # not handled here: recorded, so that the run directory does not claim to be running
        run.fail(f"{type(error).__name__}: {error}")
        raise


def driver(kind: str) -> Callable[..., dict[str, Any]]:
    """The `run` function of a recipe type."""
    module, _, function = DRIVERS[kind].partition(":")
    return cast(Callable[..., dict[str, Any]], getattr(importlib.import_module(module), function))


def require_artifact(given: str) -> None:
    """Stop before a run directory is made for a model that is not there. RecipeError with the nearest that is."""
    path = Path(given)
    if path.exists():
        return
    beside = [str(path.with_name(p.name)) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    match = nearest(given, [*beside, *names.shipped_files()])
    suffix = f"; did you mean '{match}'?" if match else ""
    raise RecipeError(f"{given}: no such model folder, run or recipe{suffix}")


def show(recipe: Recipe, path: Path) -> None:
    """The resolved recipe and everything that follows from it, without doing any of it."""
    from glmctl.recipe.load import derived, dump

    implied = {**derived(recipe), "run": str(path)}
    if recipe.type not in ("eval", "serve"):
        implied["export"] = str(path / "export")
    text = f"{dump(recipe)}\n# what follows from it\n{console.pairs(implied)}"
    console.result({"recipe": recipe.model_dump(mode="json"), "derived": implied}, text=text)


def _refuse_placeholders(recipe: Recipe) -> None:
    """`${stage}` is filled in by a pipeline; on its own a stage needs a path there."""
    open_keys = [key for key, value in _strings(recipe.model_dump(mode="json"), "") if re.search(r"\$\{[^}]*\}", value)]
    if open_keys:
        raise RecipeError(
            f"{recipe.name}: only a pipeline fills in {', '.join(open_keys)}",
            hint="on its own the recipe needs paths: " + " ".join(f"--set {key}=PATH" for key in open_keys),
        )


def _strings(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(key, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, item in items for found in _strings(item, f"{key}.{name}" if key else str(name))]


def _without_processes(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != "--processes" and not word.startswith("--processes="):
            kept.append(word)
        skip = not skip and word == "--processes"
    return kept
