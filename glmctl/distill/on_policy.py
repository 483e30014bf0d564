"""On-policy distillation: reverse KL to the teachers on the student's own samples.

Each step the student answers problems of every teacher's domain, and the teacher says how likely it would have made
each of those tokens (log-probs of an engine). The reverse KL of a token, KL(student || teacher) in the context that the
student itself got into, is estimated from the one token that was drawn, log p_student - log p_teacher, and minimised by
its policy gradient: sum over tokens of (log p_student - log p_teacher) grad log p_student (MiniLLM, arXiv 2306.08543,
equation 2 with each token's own term; GKD, arXiv 2306.13649, with all data on-policy).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.errors import DataError, RecipeError
from glmctl.kernels.linear_cross_entropy import token_log_probs
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import LocalTeacher, OnPolicyDistillRecipe, Sampling
from glmctl.rl.environment import Problem
from glmctl.rl.episode import Trajectory
from glmctl.rl.pack import PackedRollouts, Weighted, pack
from glmctl.rl.rollout import MAX_SLOTS, rollout, rollout_engine
from glmctl.rl.score import GREEDY, load_heldout, score_problems
from glmctl.rl.seeds import derive_seed
from glmctl.run.directory import Run, resolve_model
from glmctl.training.schedule import lr_at
from glmctl.training.session import Session
from glmctl.training.step import Stepper


@dataclass(frozen=True)
class Domain:
    """A teacher, ready to grade, and its problems."""

    spec: LocalTeacher
    engine: Engine
    problems: list[Problem]
    heldout: list[Problem]


def run(recipe: OnPolicyDistillRecipe, run: Run) -> dict[str, Any]:
    """Train the student and export it.

    Summary: `reverse_kl_first` and `reverse_kl_last` (nats a token, means over the first and the last tenth of the
    steps), for each teacher `<name>_teacher`, `<name>_start` and `<name>_student` (held-out accuracy, greedy, of the
    teacher, of the student before and after), `samples`, `tokens` (written by the student), `steps`.

    Raises DataError when a teacher has another tokenizer, RecipeError for several processes, EnvironmentProblem when
    over a fifth of a step's episodes fail in the machinery.
    """
    accelerator = make_accelerator("fp32", recipe.trackers, run.path)
    if accelerator.num_processes > 1:
        raise RecipeError("on_policy_distill runs in one process: rollouts and training share one set of weights")
    folder = resolve_model(recipe.student)
    template = ChatTemplate.load(folder)
    model = load_model(folder, device=accelerator.device, dtype=torch.float32)
    domains = [open_domain(one, recipe, template, accelerator.device) for one in recipe.teachers]
    session = Session(
        model,
        run,
        accelerator,
        optimizer=recipe.optimizer,
        grad_clip=recipe.grad_clip,
        policy=recipe.checkpoint,
        trackers=recipe.trackers,
    )
    _train(recipe, session, rollout_engine(model, recipe.episode_tokens), template, domains)
    session.export(folder)
    return _summary(run.metrics.rows(), [one.name for one in recipe.teachers])


def _train(
    recipe: OnPolicyDistillRecipe, session: Session, student: Engine, template: ChatTemplate, domains: Sequence[Domain]
) -> None:
    """Every step that is not done yet: samples, grades, one update, the new weights to the engine."""
    done = session.resume()
    student.load_weights(done)
    if done == 0:
        row = {f"{d.spec.name}_teacher": _accuracy(d.engine, template, d, recipe) for d in domains}
        session.run.metrics.append({"step": 0, **row, **_scores(student, template, domains, recipe)})
    sampling = Sampling(temperature=1.0, max_tokens=recipe.max_tokens)
    with session.stopping() as stop, console.progress(recipe.name, recipe.steps, start=done) as progress:
        for step in range(done + 1, recipe.steps + 1):
            began = time.perf_counter()
            graded: list[Trajectory] = []
            row = {}
            for domain, problems in draw(domains, step, recipe):
                made = rollout(
                    student,
                    template,
                    problems,
                    samples=recipe.samples_per_prompt,
                    sampling=sampling,
                    seed=derive_seed(recipe.seed, "on-policy", domain.spec.name, step),
                    max_turns=recipe.max_turns,
                )
                whole = [one for one in made if one.reward is not None and one.generated_tokens]
                graded += grade(domain.engine, whole)
                row[f"{domain.spec.name}_reward"] = sum(one.reward or 0.0 for one in whole) / max(1, len(whole))
            if not graded:
                raise DataError(f"step {step}: the student wrote nothing that could be graded")
            lr = lr_at(step / recipe.steps, recipe.schedule)
            batches = [one.to(session.model.device) for one in pack(_evenly(graded), recipe.micro_tokens)]
            reverse_kl, norm = update(session.model, session.stepper, batches, lr=lr)
            student.load_weights(step)
            tokens = sum(one.generated_tokens for one in graded)
            row |= {"loss": reverse_kl, "grad_norm": norm, "lr": lr, "samples": len(graded), "tokens": tokens}
            if step % recipe.evaluate_every == 0 or step == recipe.steps:
                row |= _scores(student, template, domains, recipe)
            row["seconds"] = time.perf_counter() - began
            session.run.metrics.append({"step": step, **row})
            session.end_step(step, recipe.steps, stop)
            progress.advance(reverse_kl=reverse_kl)


# ----------------------------------------------------------------------------- one step


def draw(domains: Sequence[Domain], step: int, recipe: OnPolicyDistillRecipe) -> Iterator[tuple[Domain, list[Problem]]]:
    """The prompts of a step by domain, in the teachers' shares; a function of (seed, step)."""
    whole = sum(domain.spec.share for domain in domains)
    for domain in domains:
        count = max(1, math.floor(recipe.prompts_per_step * domain.spec.share / whole + 0.5))
        rng = random.Random(derive_seed(recipe.seed, "prompts", domain.spec.name, step))
        yield domain, rng.sample(domain.problems, min(count, len(domain.problems)))


def grade(teacher: Engine, samples: Sequence[Trajectory]) -> list[Trajectory]:
    """Copies of `samples` whose log-probs are the teacher's, temperature 1, in nats."""
    one_more = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    asked = [Request(str(at), list(one.tokens), one_more) for at, one in enumerate(samples)]
    graded = []
    for one, answer in zip(samples, teacher.generate(asked), strict=True):
        assert answer.prompt_logprobs is not None
        found = [0.0, *(entry.logprob for entry in answer.prompt_logprobs)]
        logprobs = [value if mine else 0.0 for value, mine in zip(found, one.loss_mask, strict=True)]
        graded.append(replace(one, logprobs=logprobs))
    return graded


def update(model: GlmMoe, stepper: Stepper, batches: Sequence[PackedRollouts], *, lr: float) -> tuple[float, float]:
    """One step on rollouts whose behaviour log-probs are the teacher's; (mean reverse KL in nats a token, norm)."""
    total, tokens = 0.0, 0
    for batch in batches:
        logp_N = student_logp(model, batch)
        excess_N = logp_N.detach() - batch.behaviour_logp_N
        stepper.accumulate((batch.weight_N * excess_N * logp_N).sum())
        total += float(excess_N.sum())
        tokens += len(excess_N)
    return total / tokens, stepper.update(lr)


def student_logp(model: GlmMoe, batch: PackedRollouts) -> Tensor:
    """Log-prob [N] of every generated token under the model."""
    hidden_BTD = model(batch.tokens_BT, positions_BT=batch.positions_BT, documents_BT=batch.documents_BT)
    return token_log_probs(hidden_BTD.flatten(0, 1)[batch.at_N], model.head_weight, batch.target_N)


def _evenly(samples: Sequence[Trajectory]) -> list[Weighted]:
    """Every token of the step counts alike."""
    tokens = sum(one.generated_tokens for one in samples)
    return [Weighted(one, advantage=0.0, weight=1.0 / tokens) for one in samples]


# ----------------------------------------------------------------------------- teachers


def open_domain(
    spec: LocalTeacher, recipe: OnPolicyDistillRecipe, template: ChatTemplate, device: torch.device
) -> Domain:
    """The teacher loaded, its problems read. DataError when its tokens are not the student's."""
    folder: Path = resolve_model(spec.model)
    if ChatTemplate.load(folder).tokenizer.hash != template.tokenizer.hash:
        raise DataError(f"{folder}: another tokenizer than the student's; its log-probs would be of other tokens")
    model = load_model(folder, device=device, dtype=torch.float32)
    # one place more than an episode has: a request has to generate something
    length = min(recipe.episode_tokens + 1, model.config.max_position_embeddings)
    if length <= recipe.episode_tokens:
        raise RecipeError(f"episode_tokens: at most {length - 1}, one less than teacher {spec.name} has positions")
    engine = Engine(model, max_slots=MAX_SLOTS, max_length=length)
    heldout = load_heldout(spec.heldout, recipe.heldout_limit)
    return Domain(spec, engine, load_heldout(spec.problems, None), heldout)


def _scores(
    engine: Engine, template: ChatTemplate, domains: Sequence[Domain], recipe: OnPolicyDistillRecipe
) -> dict[str, float]:
    return {f"{domain.spec.name}_student": _accuracy(engine, template, domain, recipe) for domain in domains}


def _accuracy(engine: Engine, template: ChatTemplate, domain: Domain, recipe: OnPolicyDistillRecipe) -> float:
    found = score_problems(
        engine,
        template,
        domain.heldout,
        sampling=GREEDY.model_copy(update={"max_tokens": recipe.max_tokens}),
        enable_thinking=True,
        seed=recipe.seed,
        max_turns=recipe.max_turns,
    )
    return found.accuracy


def _summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    start, steps = rows[0], rows[1:]
    tenth = max(1, len(steps) // 10)
    body: dict[str, Any] = {
        "reverse_kl_first": sum(row["loss"] for row in steps[:tenth]) / tenth,
        "reverse_kl_last": sum(row["loss"] for row in steps[-tenth:]) / tenth,
        "samples": sum(row["samples"] for row in steps),
        "tokens": sum(row["tokens"] for row in steps),
        "steps": len(steps),
    }
    for name in names:
        body |= {
            f"{name}_teacher": start[f"{name}_teacher"],
            f"{name}_start": start[f"{name}_student"],
            f"{name}_student": steps[-1][f"{name}_student"],
        }
    return body
