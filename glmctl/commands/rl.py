"""`glmctl rl`: train by reinforcement learning, and look at what was rolled out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import CompletionItem  # type: ignore[attr-defined]

from glmctl import console
from glmctl.cli import CommandGroup
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError
from glmctl.recipe import names


class TrainByDefault(CommandGroup):
    """`glmctl rl RECIPE` is `glmctl rl train RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["train", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Subcommands, and the recipes that may stand in their place."""
        found = super().shell_complete(ctx, incomplete)
        recipes = names.complete(incomplete) if incomplete else []
        return [*found, *(CompletionItem(name) for name in recipes)]


app = typer.Typer(
    cls=TrainByDefault,
    help="Reinforcement learning on verifiable rewards: `glmctl rl RECIPE` trains, `glmctl rl replay RUN` looks.",
    **stage.PLAIN,
)


@app.command()
def train(
    recipe: stage.RecipeArgument,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
    processes: stage.ProcessesOption = 1,
    record: Annotated[bool, typer.Option("--record", help="Write every rollout to RUN/rollouts.")] = False,
    rollout_only: Annotated[
        bool, typer.Option("--rollout-only", help="Roll out and judge, but train nothing; implies --record.")
    ] = False,
    train_on: Annotated[
        str | None, typer.Option("--train-on", metavar="RUN", help="Train on what this run recorded; no rollouts.")
    ] = None,
    unsafe_no_sandbox: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Run code that the model writes without isolation.")
    ] = False,
) -> None:
    """Train a model by GRPO on verifiable rewards, with rollouts from our own engine."""
    if rollout_only and train_on is not None:
        raise GlmctlError("--rollout-only makes rollouts and --train-on takes those of another run; give one of them")
    chosen = {
        "rollouts.record=true": record,
        "mode=rollout_only": rollout_only,
        "mode=train_only": train_on is not None,
        f"recorded={train_on}": train_on is not None,
        "sandbox.level=unsafe-none": unsafe_no_sandbox,
    }
    words = [word for word, wanted in chosen.items() if wanted]
    stage.run_stage("rl", recipe, [*words, *(overrides or [])], run, fresh=fresh, dry_run=dry_run, processes=processes)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    step: Annotated[int | None, typer.Option("--step", metavar="N", help="Rollouts of this step only.")] = None,
    problem: Annotated[str | None, typer.Option("--problem", metavar="ID", help="Of this problem only.")] = None,
    below: Annotated[
        float | None, typer.Option("--below", metavar="R", help="Only those with a reward below R.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-L", metavar="N", min=1, help="At most N rollouts.")] = 10,
    judge: Annotated[
        bool, typer.Option("--judge", help="Judge all of them again and show those whose reward is another now.")
    ] = False,
) -> None:
    """Show a run's rollouts with what became of their rewards, or judge them again."""
    from glmctl.rl import replay as again

    found = [
        one
        for one in again.rollouts_of(run, step)
        if (problem is None or one.trajectory.problem_id == problem)
        and (below is None or (one.trajectory.reward is not None and one.trajectory.reward < below))
    ]
    if not judge:
        text = "\n\n".join(again.as_text(one) for one in found[:limit])
        shown = {"found": len(found), "rollouts": [again.as_row(one) for one in found[:limit]]}
        console.result(shown, text=f"{text}\n\n{min(limit, len(found))} of {len(found)} rollouts")
        return
    judged = list(again.judge_again(run, found))
    changed = [(one, now) for one, now in judged if now != one.trajectory.reward]
    for one, now in changed[:limit]:
        console.out(f"{again.as_text(one)}\nreward now {now}\n")
    rows = [{**again.as_row(one), "reward_now": now} for one, now in changed[:limit]]
    body = {"judged": len(judged), "changed": len(changed), "rollouts": rows}
    console.result(body, text=f"{len(judged)} rollouts judged again, {len(changed)} have another reward now")
