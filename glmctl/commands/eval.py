"""`glmctl eval`: a model and tasks, as lm-eval spells them, or a recipe. Comparing and judging: `eval --compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glmctl.commands import _eval_results as results
from glmctl.commands import _eval_words as read
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
        list[str] | None,
        typer.Option("--tasks", "-t", metavar="TASK,...", help="Tasks and groups: ours (--list) or lm-eval's."),
    ] = None,
    problems: Annotated[
        list[str] | None,
        typer.Option("--problems", metavar="NAME=FILE", help="A problem file, scored by its own verifier."),
    ] = None,
    model_args: Annotated[
        str | None,
        typer.Option("--model_args", "--model-args", "-a", metavar="pretrained=DIR", help="MODEL, as lm-eval has it."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num_fewshot", "--num-fewshot", "-f", metavar="N", help="Examples in the prompt.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option("--limit", "-L", metavar="N", help="Only N questions of a task; below 1 a share.")
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option("--batch_size", "--batch-size", "-b", metavar="N|auto", help="Requests that generate at once."),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply_chat_template", "--apply-chat-template", help="To lm-eval's tasks; ours know when.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool,
        typer.Option("--fewshot_as_multiturn/--no-fewshot_as_multiturn", help="Examples as turns of the chat."),
    ] = True,
    system_instruction: Annotated[
        str | None,
        typer.Option("--system_instruction", "--system-instruction", metavar="TEXT", help="Of lm-eval's tasks."),
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option("--gen_kwargs", "--gen-kwargs", metavar="KEY=VALUE,...", help="Generation of lm-eval's tasks."),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include_path", "--include-path", metavar="DIR", help="A folder with tasks of your own."),
    ] = None,
    metadata: Annotated[
        str | None, typer.Option("--metadata", metavar="JSON", help="Handed to lm-eval's tasks.")
    ] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", metavar="N", help="Of sampling and examples; or four, as lm-eval has them.")
    ] = None,
    use_cache: Annotated[
        Path | None, typer.Option("--use_cache", "--use-cache", "-c", metavar="DIR", help="Keep answers here for good.")
    ] = None,
    unsafe: Annotated[
        bool,
        typer.Option(
            "--confirm_run_unsafe_code", "--confirm-run-unsafe-code", help="Let lm-eval's tasks run code unboxed."
        ),
    ] = False,
    no_sandbox: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Run what the model writes without isolation, in our tasks too.")
    ] = False,
    log_samples: Annotated[
        bool, typer.Option("--log_samples", "--log-samples", "-s", help="Always on: every sample is kept.")
    ] = False,
    output_path: Annotated[
        Path | None,
        typer.Option("--output_path", "--output-path", "-o", "--run", metavar="DIR", help="The run directory."),
    ] = None,
    nothink: Annotated[bool, typer.Option("--nothink", help="Direct answers, without reasoning.")] = False,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Samples of each problem: avg@N and pass@k.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Of problems and our tasks; 0 is greedy.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List our offline tasks and the report's suites.")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Two evaluated models (<run>/export/<model>), paired."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL", help="With --compare: an OpenAI-compatible judge of the answers."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge_model", "--judge-model", metavar="NAME", help="The judge's model.")
    ] = None,
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
