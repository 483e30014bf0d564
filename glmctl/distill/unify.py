"""Several experts into one hybrid model (GLM-4.5 report section 3.1: overall SFT starts from the base model).

Samples of the experts -> rejection filters -> selection -> a mixture with and without reasoning -> SFT of the base ->
base, experts and hybrid, thinking and not, on every domain. Every step leaves a file behind it that it is not done
twice for: `samples-<teacher>.jsonl` and `heldout/` sample by sample, the SFT's checkpoints.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.distill.compare import BASE, DIRECT, HYBRID, Comparison, headline
from glmctl.distill.experts import EnginePlayer, Player, open_expert, template_of
from glmctl.distill.filters import Judge, filter_samples, reward_scorer
from glmctl.distill.mixture import epochs, mix, repeat
from glmctl.distill.sample import SampleJournal, choose_prompts, collect
from glmctl.distill.select import preferences, select
from glmctl.errors import DataError, RecipeError
from glmctl.model.folder import load_model
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import DistillRecipe, Teacher
from glmctl.rl.rollout import rollout_engine
from glmctl.rl.score import load_heldout
from glmctl.rl.seeds import derive_seed
from glmctl.run import atomic
from glmctl.run.directory import Run, resolve_model
from glmctl.run.signals import StopFlag
from glmctl.training.sft import encode, finetune


@dataclass(frozen=True)
class Lesson:
    """What one teacher has to teach."""

    rows: list[Conversation]
    rejected: dict[str, int]
    """by filter"""
    samples: int
    cost: dict[str, Any]


def run(recipe: DistillRecipe, run: Run) -> dict[str, Any]:
    """Train the hybrid and export it. `mixture.jsonl` is the data it saw, `rejections-<teacher>.json` what it was
    spared, `preferences-<teacher>.jsonl` both as pairs for a reward model, `comparison.json` how it compares.

    Summary, for each teacher: `<name>_base`, `<name>_expert` and `<name>_hybrid` (held-out accuracy, thinking),
    `<name>_gain_points` (expert over base), `<name>_ratio` (hybrid of expert), `<name>_direct` (accuracy of /nothink
    answers), `<name>_kept`, `<name>_rejected`; and over all of them `direct_obeyed` (share of /nothink answers that
    are well-formed and have no reasoning), `thinking_obeyed` (share of answers with reasoning in every turn when
    thinking is on), `mixture`, the SFT's own figures, and the tables `comparison`, `rejections`, `cost`.
    Raises DataError when the filters leave a teacher nothing to teach.
    """
    accelerator = make_accelerator(recipe.precision)
    if accelerator.num_processes > 1:
        raise RecipeError("distill runs in one process; the SFT of its mixture.jsonl can run in many")
    base, device = resolve_model(recipe.student), accelerator.device
    template = ChatTemplate.load(base)
    domains = {one.name: load_heldout(one.heldout, recipe.heldout_limit) for one in recipe.teachers}
    comparison = Comparison(run.path, domains, recipe.sampling.max_tokens, recipe.seed)
    limits = {"episode_tokens": recipe.episode_tokens, "max_turns": recipe.max_turns}
    with StopFlag() as stop:
        lessons: dict[str, Lesson] = {}
        for teacher in recipe.teachers:
            expert = functools.cache(functools.partial(open_expert, teacher, base, device=device, **limits))
            written = template_of(teacher, base)
            lessons[teacher.name] = teach(recipe, teacher, expert, written, run.path, stop, device=device)
            comparison.score(teacher.name, f"expert-{teacher.name}", expert, written, stop)

        def untaught() -> Player:
            model = load_model(base, device=device, dtype=torch.float32)
            return EnginePlayer(rollout_engine(model, recipe.episode_tokens), template, recipe.max_turns)

        comparison.score(BASE, "base", functools.cache(untaught), template, stop)
    rows = blend(recipe, lessons, template)
    atomic.write_text(
        run.path / "mixture.jsonl", "".join(json.dumps(row.row(), ensure_ascii=False) + "\n" for row in rows)
    )

    model = load_model(base, device=device, dtype=torch.float32)
    trained = finetune(model, rows, template, recipe, run, base, loss_on=recipe.loss_on)
    hybrid = EnginePlayer(rollout_engine(model, recipe.episode_tokens), template, recipe.max_turns)
    with StopFlag() as stop:
        comparison.score(HYBRID, "hybrid", lambda: hybrid, template, stop)
        comparison.score(DIRECT, "hybrid-nothink", lambda: hybrid, template, stop, enable_thinking=False)
    comparison.publish(run)
    return summary(comparison, lessons, rows, trained)


def teach(
    recipe: DistillRecipe,
    teacher: Teacher,
    expert: Callable[[], Player],
    template: ChatTemplate,
    folder: Path,
    stop: StopFlag,
    *,
    device: torch.device,
) -> Lesson:
    """One expert's part of the mixture: sampled, filtered, selected, with and without reasoning.

    `template` is the one that its samples are written in. Raises DataError when nothing is left.
    """
    journal = SampleJournal(folder / f"samples-{teacher.name}.jsonl")
    samples = collect(
        journal,
        expert,
        choose_prompts(teacher, load_heldout(teacher.problems, None), recipe.seed),
        label=f"sample {teacher.name}",
        samples=teacher.samples_per_prompt,
        sampling=recipe.sampling,
        seed=derive_seed(recipe.seed, "distill", teacher.name),
        stop=stop,
    )
    judge = Judge(template, recipe.min_tokens)
    if teacher.reward is not None:
        judge = replace(judge, scorer=reward_scorer(teacher.reward, device), min_score=teacher.reward.min_score)
    kept, rejections = filter_samples(samples, judge)
    atomic.write_json(folder / f"rejections-{teacher.name}.json", rejections.to_row())
    if pairs := preferences(kept, samples):
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        atomic.write_text(folder / f"preferences-{teacher.name}.jsonl", lines)
    if not kept:
        raise DataError(
            f"teacher {teacher.name}: none of {len(samples)} samples passed the filters: {rejections.counts}"
        )
    chosen = select(kept, hard_fraction=recipe.select_hard_fraction, responses_per_prompt=recipe.responses_per_prompt)
    refused = ", ".join(f"{name} {count}" for name, count in rejections.counts.items()) or "none refused"
    cost = journal.cost
    console.note(
        f"{teacher.name}: {len(samples)} samples, {console.number(cost.tokens)} tokens in "
        f"{console.duration(cost.seconds)}; {len(kept)} verified ({refused}), {len(chosen)} taught"
    )
    rows = mix(chosen, teacher.direct_fraction, derive_seed(recipe.seed, teacher.name))
    return Lesson(rows, rejections.counts, len(samples), cost.to_row())


def blend(recipe: DistillRecipe, lessons: dict[str, Lesson], template: ChatTemplate) -> list[Conversation]:
    """All teachers' conversations in the shares of `recipe.mixture`, shuffled.

    Mixed once, here: the packer draws its epochs from this order.
    """
    shown = dict.fromkeys(lessons, 1.0)
    if recipe.mixture:
        sizes = {
            name: sum(sum(one.loss_mask) for one in encode(lesson.rows, template, recipe.loss_on))
            for name, lesson in lessons.items()
        }
        shown = epochs(sizes, recipe.mixture)
        console.note("shown in an epoch: " + ", ".join(f"{name} {times:.2f} times" for name, times in shown.items()))
    rows = [
        row
        for name, lesson in lessons.items()
        for row in repeat(lesson.rows, shown[name], derive_seed(recipe.seed, "repeat", name))
    ]
    random.Random(derive_seed(recipe.seed, "mixture")).shuffle(rows)
    return rows


def summary(
    comparison: Comparison, lessons: dict[str, Lesson], rows: Sequence[Conversation], trained: dict[str, Any]
) -> dict[str, Any]:
    """The run's result; see `run`."""
    result = headline(comparison, list(lessons), lambda name: name)
    for name, lesson in lessons.items():
        result |= {f"{name}_kept": len(lesson.rows), f"{name}_rejected": sum(lesson.rejected.values())}
    return {
        **result,
        "mixture": len(rows),
        **{f"sft_{key}": value for key, value in trained.items()},
        "comparison": comparison.table(),
        "rejections": {name: lesson.rejected for name, lesson in lessons.items()},
        "cost": {name: lesson.cost for name, lesson in lessons.items()},
    }
