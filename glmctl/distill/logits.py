"""Logit distillation: the student learns the teacher's whole distribution over each next token of given text.

Loss of a token: (1 - w) T^2 KL(teacher || student) at temperature T + w (-log p_student of the text's own token)
(Hinton et al. 2015, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from glmctl import console
from glmctl.data.batches import IGNORE, Batch, SftBatches
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import read_conversations
from glmctl.errors import DataError, RecipeError
from glmctl.kernels.linear_cross_entropy import linear_cross_entropy
from glmctl.kernels.linear_kl import linear_kl
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe, RouterStats
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import LogitDistillRecipe
from glmctl.run.directory import Run, resolve_model
from glmctl.training.schedule import lr_at
from glmctl.training.session import Clock, Session, rate
from glmctl.training.sft import encode
from glmctl.training.step import StepMetrics


def run(recipe: LogitDistillRecipe, run: Run) -> dict[str, Any]:
    """Train the student and export it.

    Summary: `loss` (nats a token, mean over the last tenth of the steps), `loss_first`, `steps`, `conversations`,
    `dropped`, `trained_tokens`, `tokens_per_second`. Raises DataError when the tokenizers differ or no conversation
    fits, RecipeError for several processes or too few positions.
    """
    accelerator = make_accelerator(recipe.precision, recipe.trackers, run.path)
    if accelerator.num_processes > 1:
        raise RecipeError("logit_distill runs in one process")
    folder, teacher_folder = resolve_model(recipe.student), resolve_model(recipe.teacher)
    template = ChatTemplate.load(folder)
    if ChatTemplate.load(teacher_folder).tokenizer.hash != template.tokenizer.hash:
        raise DataError(f"{teacher_folder}: another tokenizer than the student's, {folder}")
    model = load_model(folder, dtype=torch.float32)
    teacher = load_model(teacher_folder, dtype=torch.float32).requires_grad_(False).to(accelerator.device)
    positions = min(one.config.max_position_embeddings for one in (model, teacher))
    if recipe.sequence_length > positions:
        raise RecipeError(f"sequence_length {recipe.sequence_length} exceeds the models' {positions} positions")
    conversations = read_conversations(recipe.data, bad_rows=recipe.bad_rows)
    encoded = encode(conversations, template, recipe.loss_on)
    batches = SftBatches(encoded, recipe.sequence_length, recipe.seed, pad_id=template.tokenizer.pad_id)
    session = Session(
        model.to(accelerator.device),
        run,
        accelerator,
        optimizer=recipe.optimizer,
        grad_clip=recipe.grad_clip,
        policy=recipe.checkpoint,
        trackers=recipe.trackers,
    )
    _train(recipe, session, teacher, batches)
    session.export(folder)
    return {**_summary(run.metrics.rows()), "conversations": len(conversations), "dropped": batches.dropped}


def _train(recipe: LogitDistillRecipe, session: Session, teacher: GlmMoe, batches: SftBatches) -> None:
    rows = max(1, recipe.batch_tokens // recipe.sequence_length)
    micro_rows = rows if recipe.micro_tokens is None else max(1, recipe.micro_tokens // recipe.sequence_length)
    done = session.resume()
    with session.stopping() as stop, console.progress(recipe.name, recipe.steps, start=done) as progress:
        for step in range(done + 1, recipe.steps + 1):
            clock = Clock()
            lr = lr_at(step / recipe.steps, recipe.schedule)
            parts = batches.batch(step - 1, rows).split(micro_rows)
            metrics = _step(recipe, session, teacher, parts, lr)
            tokens = rows * recipe.sequence_length
            row = {"lr": lr, "tokens": step * tokens, "filled_tokens": metrics.tokens, **clock.read(metrics.tokens)}
            session.log(step, recipe.steps, metrics, row)
            session.end_step(step, recipe.steps, stop)
            progress.advance(loss=metrics.loss)


def _step(
    recipe: LogitDistillRecipe, session: Session, teacher: GlmMoe, parts: Sequence[Batch], lr: float
) -> StepMetrics:
    """One optimizer step, normalised over all its targets however it is cut."""
    targets = max(1, sum(part.target_count for part in parts))
    mtp_targets = max(1, sum(part.mtp_target_count for part in parts))
    main, mtp, counts = 0.0, 0.0, []
    for part in parts:
        batch = part.to(session.model.device)
        stats = RouterStats(sequence_balance=False)
        with session.accelerator.autocast():
            loss, second = losses(session.model, teacher, batch, recipe, stats)
        session.stepper.accumulate(loss / targets + recipe.mtp_weight * second / mtp_targets)
        main, mtp = main + float(loss.detach()) / targets, mtp + float(second.detach()) / mtp_targets
        counts.append(stats.counts_LE.cpu())
    skipped = session.stepper.guard.skipped
    norm = session.stepper.update(lr)
    applied = session.stepper.guard.skipped == skipped
    tokens = sum(part.token_count for part in parts)
    return StepMetrics(main, mtp, 0.0, norm, targets, tokens, torch.stack(counts).sum(0), not applied)


def losses(
    model: GlmMoe, teacher: GlmMoe, batch: Batch, recipe: LogitDistillRecipe, stats: RouterStats | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the loss over the targets, sum of the MTP layer's own cross-entropy), nats."""
    placed = {"positions_BT": batch.positions_BT, "documents_BT": batch.documents_BT}
    at_N = (batch.targets_BT != IGNORE).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        taught_ND = teacher(batch.tokens_BT, **placed).flatten(0, 1)[at_N]
    hidden_BTD = model(batch.tokens_BT, **placed, stats=stats)
    hidden_ND = hidden_BTD.flatten(0, 1)[at_N]
    soft = linear_kl(hidden_ND, model.head_weight, taught_ND, teacher.head_weight, temperature=recipe.temperature)
    loss = (1.0 - recipe.hard_weight) * soft
    if recipe.hard_weight:
        hard, _ = linear_cross_entropy(hidden_ND, model.head_weight, batch.targets_BT.flatten()[at_N])
        loss = loss + recipe.hard_weight * hard
    second = torch.zeros((), device=hidden_ND.device)
    if model.mtp is not None and recipe.mtp_weight > 0:
        mtp_BTD = model.mtp(hidden_BTD, batch.mtp_tokens_BT, **placed, stats=stats)
        second, _ = linear_cross_entropy(mtp_BTD.flatten(0, 1), model.head_weight, batch.mtp_targets_BT.flatten())
    return loss, second


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [row["loss"] for row in rows if row["loss"] is not None]
    tail = found[-max(1, len(rows) // 10) :]
    return {
        "loss": sum(tail) / max(1, len(tail)),
        "loss_first": found[0] if found else None,
        "steps": len(rows),
        "trained_tokens": sum(int(row["targets"]) for row in rows),
        "tokens_per_second": rate(rows, sum(int(row["filled_tokens"]) for row in rows)),
    }
