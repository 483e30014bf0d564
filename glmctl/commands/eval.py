"""`glmctl eval`: a model and tasks, as lm-eval spells them, or a recipe. Comparing and judging: `eval --compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from glmctl.commands import _eval_options as options
from glmctl.commands import _eval_results as results
from glmctl.commands import _eval_words as read
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError
from glmctl.recipe import names

app = typer.Typer(**stage.PLAIN)


@app.command("eval")
def eval_(
    target: options.Target = None,
    tasks: options.Tasks = None,
    problems: options.Problems = None,
    model_args: options.ModelArgs = None,
    num_fewshot: options.NumFewshot = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    apply_chat_template: options.ApplyChatTemplate = False,
    fewshot_as_multiturn: options.FewshotAsMultiturn = True,
    system_instruction: options.SystemInstruction = None,
    gen_kwargs: options.GenKwargs = None,
    include_path: options.IncludePath = None,
    metadata: options.Metadata = None,
    seed: options.Seed = None,
    use_cache: options.UseCache = None,
    unsafe: options.Unsafe = False,
    no_sandbox: options.NoSandbox = False,
    log_samples: options.LogSamples = False,
    output_path: options.OutputPath = None,
    nothink: options.Nothink = False,
    samples: options.Samples = None,
    temperature: options.Temperature = None,
    list_: options.List = False,
    compare: options.Compare = None,
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    overrides: stage.SetOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Evaluate a model: `glmctl eval runs/demo/distill -t glmctl_cloze -L 100`."""
    if list_:
        results.list_tasks()
        return
    if judge is not None or judge_model is not None:
        results.judge(compare, judge, judge_model, read.names(tasks), output_path)
        return
    if compare is not None:
        results.compare(*compare)
        return
    target = target or read.pretrained(model_args)
    if target is None:
        raise GlmctlError("missing argument 'MODEL|RECIPE'", hint="`glmctl eval --help` shows the options")
    given: dict[str, tuple[str, Any]] = {
        "tasks": ("--tasks", read.names(tasks)),
        "problems": ("--problems", read.pairs("--problems", problems)),
        "num_fewshot": ("--num_fewshot", num_fewshot),
        "limit": ("--limit", read.whole(limit)),
        "max_slots": ("--batch_size", read.batch_size(batch_size)),
        "apply_chat_template": ("--apply_chat_template", apply_chat_template or None),
        "fewshot_as_multiturn": ("--no-fewshot_as_multiturn", None if fewshot_as_multiturn else False),
        "system_instruction": ("--system_instruction", system_instruction),
        "gen_kwargs": ("--gen_kwargs", read.keywords("--gen_kwargs", gen_kwargs)),
        "include_path": ("--include_path", None if include_path is None else str(include_path)),
        "metadata": ("--metadata", read.json_object("--metadata", metadata)),
        "use_cache": ("--use_cache", None if use_cache is None else str(use_cache)),
        "confirm_run_unsafe_code": ("--confirm_run_unsafe_code", unsafe or None),
        "enable_thinking": ("--nothink", False if nothink else None),
        "samples_per_problem": ("--samples", samples),
        **read.seeds(seed),
    }
    unboxed = ["sandbox.level=unsafe-none"] if no_sandbox else []
    is_recipe = names.looks_like_recipe(target)
    overrides = read.sampling(temperature, None if is_recipe else samples) + unboxed + (overrides or [])
    if is_recipe:
        words = read.as_overrides(given) + overrides
        stage.run_stage("eval", target, words, output_path, fresh=fresh, dry_run=dry_run)
        return
    _evaluate_folder(target, given, overrides, output_path, fresh=fresh, dry_run=dry_run)


def _evaluate_folder(
    target: str,
    given: dict[str, tuple[str, Any]],
    overrides: list[str],
    output_path: Path | None,
    *,
    fresh: bool,
    dry_run: bool,
) -> None:
    if given["tasks"][1] is None and given["problems"][1] is None:
        raise GlmctlError(
            f"nothing to evaluate '{target}' on; name tasks with -t or problem files with --problems",
            hint="or give a recipe, e.g. `glmctl eval demo/eval`",
        )
    stage.require_artifact(target)
    from glmctl.recipe.build import build, run_name

    name = run_name("eval", target, {key: value for key, (_, value) in given.items()}, overrides)
    models = {run_name("", target).lstrip("-"): target}
    recipe = build("eval", {**given, "name": ("name", name), "models": ("MODEL", models)}, overrides)
    stage.drive(recipe, output_path or stage.default_path(name), fresh=fresh, dry_run=dry_run)
