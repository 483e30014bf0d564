"""Reward-model training: a score for a whole conversation, learnt from pairs (Bradley and Terry 1952).

The network of `model.network` with one row more, `score`: a conversation's reward is that row times the hidden state of
its last token, the role token that closes the answer. p(chosen > rejected) = sigmoid(r_chosen - r_rejected).

Legend: B rows, T tokens a row, N conversations, D hidden.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.packing import best_fit
from glmctl.data.preferences import Preference, read_preferences
from glmctl.errors import DataError, RecipeError
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe, RouterStats
from glmctl.model.tensor_file import TensorFile, write_tensors
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import RewardRecipe
from glmctl.run.directory import Run, resolve_model
from glmctl.training.schedule import lr_at
from glmctl.training.session import Clock, Session, rate
from glmctl.training.step import StepMetrics

SCORE_FILE = "score.safetensors"
SCORE = "score.weight"
"""[1, D]; the name that transformers gives to the head of its sequence classifiers"""
SCORING_TOKENS = 8192
"""tokens in one forward pass when nobody says otherwise"""

Pair = tuple[list[int], list[int]]
"""tokens of the chosen and of the rejected conversation"""


def run(recipe: RewardRecipe, run: Run) -> dict[str, Any]:
    """Train a reward model from `recipe.model` and export it: a model folder with `score.safetensors` in it.

    Summary: `loss` (nats, mean over the last tenth of the steps), `accuracy` (share of training pairs that were in
    order when they were met, over the same steps), `heldout_accuracy_start` and `heldout_accuracy` when there are
    held-out pairs, `pairs`, `dropped` (pairs longer than `sequence_length`), `tokens_per_second`.

    Raises DataError when no pair fits, RecipeError for several processes.
    """
    folder = resolve_model(recipe.model)
    accelerator = make_accelerator(recipe.precision, recipe.trackers, run.path)
    if accelerator.num_processes > 1:
        raise RecipeError("reward-model training runs in one process")
    template = ChatTemplate.load(folder)
    read = read_preferences(recipe.data, bad_rows=recipe.bad_rows)
    pairs = fitting(read, template, recipe.sequence_length)
    heldout = read_preferences(recipe.heldout, bad_rows=recipe.bad_rows)
    held = fitting(heldout, template, recipe.sequence_length) if heldout else []
    model = with_score(load_model(folder, dtype=torch.float32), seed=recipe.seed).to(accelerator.device)
    session = Session(
        model,
        run,
        accelerator,
        optimizer=recipe.optimizer,
        grad_clip=recipe.grad_clip,
        policy=recipe.checkpoint,
        trackers=recipe.trackers,
    )
    _train(recipe, session, pairs, held)
    session.export(folder, write=lambda export: save_reward_model(model, export, folder))
    return {**_summary(run.metrics.rows()), "pairs": len(pairs), "dropped": len(read) - len(pairs)}


def _train(recipe: RewardRecipe, session: Session, pairs: Sequence[Pair], heldout: Sequence[Pair]) -> None:
    """Every step that is not done yet, with the held-out accuracy before the first and every `evaluate_every`."""
    model = session.model
    done = session.resume()
    start = accuracy(model, heldout) if done == 0 else None
    with session.stopping() as stop, console.progress(recipe.name, recipe.steps, start=done) as progress:
        for step in range(done + 1, recipe.steps + 1):
            clock = Clock()
            chosen = pairs_of_step(pairs, step, recipe)
            lr = lr_at(step / recipe.steps, recipe.schedule)
            metrics, margins_N = _step(session, chosen, recipe, lr)
            row: dict[str, Any] = {"lr": lr, "batch_tokens": metrics.tokens, **clock.read(metrics.tokens)}
            row |= {"accuracy": float((margins_N > 0).float().mean()), "margin": float(margins_N.mean())}
            if step == 1 and start is not None:
                row["heldout_accuracy_start"] = start
            if heldout and (step % recipe.evaluate_every == 0 or step == recipe.steps):
                row["heldout_accuracy"] = accuracy(model, heldout)
            session.log(step, recipe.steps, metrics, row)
            session.end_step(step, recipe.steps, stop)
            progress.advance(loss=metrics.loss, accuracy=row["accuracy"])


def _step(session: Session, pairs: Sequence[Pair], recipe: RewardRecipe, lr: float) -> tuple[StepMetrics, Tensor]:
    """One optimizer step on the mean loss of `pairs`; returns what it saw and their margins [N]."""
    loss, margins, counts = 0.0, [], []
    for part in _micro(pairs, recipe.micro_tokens):
        with session.accelerator.autocast():
            found = pair_loss(session.model, part, recipe.center_weight)
        session.stepper.accumulate(found.loss / len(pairs))
        loss += float(found.loss.detach()) / len(pairs)
        margins.append(found.margins_N)
        counts.append(found.counts_LE)
    skipped = session.stepper.guard.skipped
    metrics = StepMetrics(
        loss=loss,
        mtp_loss=0.0,
        balance_loss=0.0,
        grad_norm=session.stepper.update(lr),
        targets=len(pairs),
        tokens=sum(len(text) for pair in pairs for text in pair),
        counts_LE=torch.stack(counts).sum(0),
        skipped=session.stepper.guard.skipped > skipped,
    )
    return metrics, torch.cat(margins)


# ----------------------------------------------------------------------------- the model


def with_score(model: GlmMoe, *, seed: int) -> GlmMoe:
    """`model` with a `score` row, drawn as its own weights were."""
    head = nn.Linear(model.config.hidden_size, 1, bias=False, dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.empty(1, model.config.hidden_size).normal_(
            0.0, model.config.initializer_range, generator=generator
        )
        head.weight.copy_(drawn)
    model.add_module("score", head.to(model.device))
    return model


def save_reward_model(model: GlmMoe, folder: Path, tokenizer_folder: Path) -> None:
    """A model folder with the tokenizer, and the score row in a file of its own."""
    save_model(model, folder, tokenizer_folder=tokenizer_folder)
    write_tensors(folder / SCORE_FILE, [(SCORE, model.get_parameter(SCORE).detach())])


def load_reward_model(folder: Path, *, device: torch.device | str = "cpu") -> GlmMoe:
    """What `save_reward_model` wrote, in fp32. DataError for a model that has no score."""
    path = folder / SCORE_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {SCORE_FILE}, so not a reward model", hint="`glmctl reward` trains one")
    model = with_score(load_model(folder, dtype=torch.float32), seed=0)
    file, head = TensorFile(path), model.get_parameter(SCORE)
    if SCORE not in file.slots or file.slots[SCORE].shape != tuple(head.shape):
        raise DataError(f"{path}: holds no '{SCORE}' of shape {list(head.shape)}")
    with torch.no_grad():
        head.copy_(file.read(SCORE))
    return model.to(device)


def scores(model: GlmMoe, texts: Sequence[Sequence[int]], stats: RouterStats | None = None) -> Tensor:
    """The reward of each token list [N], in one forward pass over packed rows; differentiable."""
    width = max(map(len, texts))
    rows = best_fit([len(text) for text in texts], width)
    tokens, positions = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    documents, last = np.full((len(rows), width), -1, np.int64), np.zeros(len(texts), np.int64)
    for row, members in enumerate(rows):
        start = 0
        for document, index in enumerate(members):
            here = slice(start, start + len(texts[index]))
            tokens[row, here], positions[row, here] = texts[index], np.arange(len(texts[index]))
            documents[row, here] = document
            start = here.stop
            last[index] = row * width + start - 1
    placed = {
        "positions_BT": torch.from_numpy(positions).to(model.device),
        "documents_BT": torch.from_numpy(documents).to(model.device),
    }
    hidden_BTD = model(torch.from_numpy(tokens).to(model.device), **placed, stats=stats)
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.from_numpy(last).to(model.device)]
    result: Tensor = model.get_submodule("score")(hidden_ND).squeeze(1).float()
    return result


@torch.no_grad()
def score_conversations(
    model: GlmMoe, template: ChatTemplate, conversations: Sequence[Conversation], *, tokens: int = SCORING_TOKENS
) -> list[float]:
    """The reward of each conversation, at most about `tokens` tokens in one pass."""
    texts = [_encoded(one, template) for one in conversations]
    found: list[float] = []
    for part in _runs([len(text) for text in texts], tokens):
        found += scores(model, [texts[at] for at in part]).tolist()
    return found


# ----------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class PairLoss:
    """What one micro-batch of pairs gave."""

    loss: Tensor
    """sum over the pairs, nats"""
    margins_N: Tensor
    """r_chosen - r_rejected, detached"""
    counts_LE: Tensor


def pair_loss(model: GlmMoe, pairs: Sequence[Pair], center_weight: float) -> PairLoss:
    """Sum over pairs of -log sigmoid(r_c - r_r) + center_weight (r_c + r_r)^2 (Eisenstein et al. 2023, section 2)."""
    stats = RouterStats(sequence_balance=False)
    chosen_N, rejected_N = scores(model, [text for pair in pairs for text in pair], stats).view(-1, 2).unbind(1)
    margin_N = chosen_N - rejected_N
    loss = -F.logsigmoid(margin_N).sum() + center_weight * (chosen_N + rejected_N).square().sum()
    routed = model.config.num_moe_layers > 0
    counts_LE = stats.counts_LE.cpu() if routed else torch.zeros(0, model.config.n_routed_experts, dtype=torch.int64)
    return PairLoss(loss, margin_N.detach().cpu(), counts_LE)


def fitting(preferences: Sequence[Preference], template: ChatTemplate, length: int) -> list[Pair]:
    """Tokens of every pair of which both fit in `length` tokens. DataError when none does."""
    encoded = [(_encoded(one.chosen, template), _encoded(one.rejected, template)) for one in preferences]
    kept = [pair for pair in encoded if max(map(len, pair)) <= length]
    if not kept:
        raise DataError(f"none of {len(encoded)} pairs fits in {length} tokens", hint="raise sequence_length")
    if len(kept) < len(encoded):
        console.warn(f"{len(encoded) - len(kept)} of {len(encoded)} pairs exceed {length} tokens: left out")
    return kept


def pairs_of_step(pairs: Sequence[Pair], step: int, recipe: RewardRecipe) -> list[Pair]:
    """The pairs of `step` (from 1): the next ones of an endless sequence of shuffled epochs."""
    drawn: list[Pair] = []
    orders: dict[int, list[int]] = {}
    for place in range((step - 1) * recipe.pairs_per_step, step * recipe.pairs_per_step):
        epoch, at = divmod(place, len(pairs))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{recipe.seed}/{epoch}").sample(range(len(pairs)), len(pairs))
        drawn.append(pairs[orders[epoch][at]])
    return drawn


def _encoded(one: Conversation, template: ChatTemplate) -> list[int]:
    return template.encode_whole(one.messages, one.tools, enable_thinking=one.enable_thinking)


def _micro(pairs: Sequence[Pair], micro_tokens: int | None) -> list[list[Pair]]:
    if micro_tokens is None:
        return [list(pairs)]
    return [[pairs[at] for at in part] for part in _runs([len(a) + len(b) for a, b in pairs], micro_tokens)]


def _runs(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive indices in runs of at most `most` tokens together, or of one."""
    runs: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            runs.append([])
            room = most
        runs[-1].append(index)
        room -= length
    return runs


@torch.no_grad()
def accuracy(model: GlmMoe, pairs: Sequence[Pair]) -> float | None:
    """Share of pairs whose chosen conversation scores higher; None without pairs."""
    if not pairs:
        return None
    margins_N = torch.cat([pair_loss(model, part, 0.0).margins_N for part in _micro(pairs, SCORING_TOKENS)])
    return float((margins_N > 0).float().mean())


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tail = rows[-max(1, len(rows) // 10) :]
    losses = [row["loss"] for row in tail if row["loss"] is not None]
    body = {
        "loss": sum(losses) / max(1, len(losses)),
        "accuracy": sum(row["accuracy"] for row in tail) / len(tail),
        "steps": len(rows),
        "tokens_per_second": rate(rows, sum(int(row["batch_tokens"]) for row in rows)),
    }
    for key in ("heldout_accuracy_start", "heldout_accuracy"):
        found = [row[key] for row in rows if key in row]
        body |= {key: found[-1]} if found else {}
    return body
