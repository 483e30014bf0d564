"""Several experts into one hybrid model (GLM-4.5 report section 3.1: overall SFT starts from the base model).

Samples of the experts -> rejection filters -> selection -> a mixture with and without reasoning -> SFT of the base ->
scores of every expert and of the hybrid, thinking and not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import torch

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.distill.filters import filter_samples
from glmctl.distill.mixture import mix
from glmctl.distill.sample import choose_prompts, sample_teacher
from glmctl.distill.select import select
from glmctl.engine.engine import Engine
from glmctl.errors import DataError, Interrupted, RecipeError
from glmctl.model.folder import load_model
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import DistillRecipe, Teacher
from glmctl.rl.environment import Problem
from glmctl.rl.rollout import rollout_engine
from glmctl.rl.score import GREEDY, Score, load_heldout, score_problems
from glmctl.rl.seeds import derive_seed
from glmctl.run import atomic
from glmctl.run.directory import Run, resolve_model
from glmctl.run.signals import StopFlag
from glmctl.training.sft import finetune


def run(recipe: DistillRecipe, run: Run) -> dict[str, Any]:
    """Train the hybrid and export it. `mixture.jsonl` is the data it saw, `rejections.json` what it was spared.

    Summary, for each teacher: `<name>_expert` and `<name>_hybrid` (held-out accuracy, thinking), `<name>_ratio`,
    `<name>_direct` (accuracy of /nothink answers), `<name>_kept`, `<name>_rejected`; and over all of them
    `direct_obeyed` (share of /nothink answers that are well-formed and have no reasoning), `thinking_obeyed` (share
    of answers with reasoning in every turn when thinking is on), `mixture`, and the SFT's own figures.
    Raises DataError when the filters leave a teacher nothing to teach.
    """
    names = [teacher.name for teacher in recipe.teachers]
    if len(set(names)) < len(names):
        raise RecipeError(f"teachers: two have the same name: {names}")
    accelerator = make_accelerator(recipe.precision)
    if accelerator.num_processes > 1:
        raise RecipeError("distill runs in one process; the SFT of its mixture.jsonl can run in many")
    base, device = resolve_model(recipe.student), accelerator.device
    result: dict[str, Any] = {}
    with StopFlag() as stop:
        rows: list[Conversation] = []
        for teacher in recipe.teachers:
            rows += teach(recipe, teacher, run, result, stop, device)
    # mixed once, here: the packer draws its epochs from this order
    random.Random(derive_seed(recipe.seed, "mixture")).shuffle(rows)
    atomic.write_text(
        run.path / "mixture.jsonl", "".join(json.dumps(row.row(), ensure_ascii=False) + "\n" for row in rows)
    )

    model, template = load_model(base, device=device, dtype=torch.float32), ChatTemplate.load(base)
    trained = finetune(model, rows, template, recipe, run, base, loss_on=recipe.loss_on)
    with StopFlag() as stop:
        result |= grade(recipe, rollout_engine(model, recipe.episode_tokens), template, result, stop)
    return {**result, "mixture": len(rows), **{f"sft_{key}": value for key, value in trained.items()}}


def teach(
    recipe: DistillRecipe, teacher: Teacher, run: Run, result: dict[str, Any], stop: StopFlag, device: torch.device
) -> list[Conversation]:
    """One expert's part of the mixture; its held-out score and counts go into `result`."""
    folder = resolve_model(teacher.model)
    model, template = load_model(folder, device=device, dtype=torch.float32), ChatTemplate.load(folder)
    engine = rollout_engine(model, recipe.episode_tokens)
    samples = sample_teacher(
        engine,
        template,
        teacher,
        choose_prompts(teacher, load_heldout(teacher.problems, None), recipe.seed),
        sampling=recipe.sampling,
        max_turns=recipe.max_turns,
        seed=recipe.seed,
        path=run.path / f"samples-{teacher.name}.jsonl",
        stop=stop,
    )
    kept, rejections = filter_samples(samples, recipe.min_tokens)
    atomic.write_json(run.path / f"rejections-{teacher.name}.json", rejections.to_row())
    if not kept:
        raise DataError(
            f"teacher {teacher.name}: none of {len(samples)} samples passed the filters: {rejections.counts}"
        )
    chosen = select(kept, hard_fraction=recipe.select_hard_fraction, responses_per_prompt=recipe.responses_per_prompt)
    refused = ", ".join(f"{name} {count}" for name, count in rejections.counts.items()) or "none refused"
    console.note(f"{teacher.name}: {len(samples)} samples, {len(kept)} verified ({refused}), {len(chosen)} taught")
    score = heldout_score(recipe, teacher, engine, template, thinking=True)
    result |= {
        f"{teacher.name}_expert": score.accuracy,
        f"{teacher.name}_kept": len(chosen),
        f"{teacher.name}_rejected": len(samples) - len(kept),
    }
    return mix(chosen, teacher.direct_fraction, derive_seed(recipe.seed, teacher.name))


def grade(
    recipe: DistillRecipe, engine: Engine, template: ChatTemplate, experts: dict[str, Any], stop: StopFlag
) -> dict[str, Any]:
    """The hybrid on every teacher's held-out problems, with thinking and without."""
    result: dict[str, Any] = {}
    thinking, direct = [], []
    for teacher in recipe.teachers:
        thought = heldout_score(recipe, teacher, engine, template, thinking=True)
        blurted = heldout_score(recipe, teacher, engine, template, thinking=False)
        thinking.append((thought.thinking_rate, len(thought.samples)))
        direct.append((blurted.direct_rate, len(blurted.samples)))
        expert = experts[f"{teacher.name}_expert"]
        result |= {
            f"{teacher.name}_hybrid": thought.accuracy,
            # an expert that solves nothing proves nothing about its pupil
            f"{teacher.name}_ratio": thought.accuracy / expert if expert else 0.0,
            f"{teacher.name}_direct": blurted.accuracy,
        }
        if stop.raised:
            raise Interrupted("interrupted while scoring the hybrid", exit_code=stop.raised)
    return {**result, "thinking_obeyed": _share(thinking), "direct_obeyed": _share(direct)}


def heldout_score(
    recipe: DistillRecipe, teacher: Teacher, engine: Engine, template: ChatTemplate, *, thinking: bool
) -> Score:
    """Greedy score on the teacher's held-out problems."""
    problems: Sequence[Problem] = load_heldout(teacher.heldout, recipe.heldout_limit)
    return score_problems(
        engine,
        template,
        problems,
        sampling=GREEDY.model_copy(update={"max_tokens": recipe.sampling.max_tokens}),
        enable_thinking=thinking,
        seed=recipe.seed,
        max_turns=recipe.max_turns,
    )


def _share(parts: Sequence[tuple[float, int]]) -> float:
    """Mean of shares weighted by how many they are of."""
    return sum(share * count for share, count in parts) / sum(count for _, count in parts)
