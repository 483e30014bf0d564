"""One step as tensors: the rows that go in, and the tokens that are chosen from the logits that come out."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glmctl.engine.logits import Edit
from glmctl.engine.request import PromptLogprob, TopLogprobs
from glmctl.engine.runner import StepBatch
from glmctl.engine.sampler import Picked, Rows, pick
from glmctl.engine.scheduler import Work
from glmctl.engine.sequence import Sequence


@dataclass(frozen=True)
class Placed:
    """Where a piece of work lies in the step."""

    work: Work
    row: int
    """its first row of the step"""
    scores: int
    """its first row of logits; those before `choices` belong to prompt tokens that are to be scored"""
    choices: int
    """the first row of logits that a token is chosen from: after the newest token, then after each draft"""


def lay_out(works: Seq[Work], table_SM: npt.NDArray[np.int32]) -> tuple[StepBatch, list[Placed]]:
    """The step's rows, one piece of work behind the other."""
    token: list[int] = []
    counts, wanted = list[int](), list[int]()
    placed = []
    for work in works:
        sequence, row, scores = work.sequence, len(token), len(wanted)
        token += sequence.tokens[work.start : work.start + work.count]
        token += work.drafts
        counts.append(len(token) - row)
        if sequence.request.params.prompt_logprobs is not None:
            wanted += [row + place - work.start for place in _scored_places(work)]
        placed.append(Placed(work, row, scores, len(wanted)))
        if work.newest:
            wanted += range(row + work.count - 1, len(token))
    slots = [work.sequence.slot for work in works]
    batch = StepBatch.of(token, [work.start for work in works], counts, table_SM[slots], wanted)
    return batch, placed


def choose(placed: Seq[Placed], logits_RV: Tensor, params: Rows) -> Picked | None:
    """A token after each newest one and after each draft, in that order; `params` are by slot. None: no such rows."""
    slots, drawn, rows = list[int](), list[int](), list[int]()
    edits: list[Edit] = []
    for each in placed:
        work, sequence = each.work, each.work.sequence
        if not work.newest:
            continue
        if sequence.edited:
            edits += _edits(work, len(rows))
        count = 1 + len(work.drafts)
        generated = sequence.generated
        slots += [sequence.slot] * count
        drawn += range(generated, generated + count)
        rows += range(each.choices, each.choices + count)
    if not rows:
        return None
    chosen = params.select(np.array(slots))
    chosen.drawn[:] = drawn
    if len(rows) < len(logits_RV):
        logits_RV = logits_RV[torch.tensor(rows, device=logits_RV.device)]
    return pick(logits_RV, chosen, edits)


def score_prompt(placed: Placed, logits_RV: Tensor) -> None:
    """Append the log-probabilities of the prompt tokens that this piece predicts, where the request wants them."""
    sequence = placed.work.sequence
    wanted = sequence.request.params.prompt_logprobs
    if wanted is None:
        return
    places = _scored_places(placed.work)
    if not places:
        return
    logprobs_RV = logits_RV[placed.scores : placed.choices].log_softmax(-1)
    next_R = torch.tensor(sequence.tokens[places[0] + 1 : places.stop + 1], device=logits_RV.device)
    own = logprobs_RV.gather(-1, next_R[:, None])[:, 0].tolist()
    values, ids = logprobs_RV.topk(min(wanted, logprobs_RV.shape[-1]), dim=-1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    for logprob, (top_ids, top_values) in zip(own, tops, strict=True):
        sequence.prompt_logprobs.append(PromptLogprob(logprob, list(zip(top_ids, top_values, strict=True))))


def top_of(picked: Picked, row: int, count: int) -> TopLogprobs | None:
    """The likeliest `count` tokens of a row; None for 0."""
    if not count:
        return None
    assert picked.top is not None
    ids, values = picked.top
    return list(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))


def _scored_places(work: Work) -> range:
    """Places whose logits score the prompt token behind them, without those scored before a preemption."""
    sequence = work.sequence
    return range(
        max(work.start, len(sequence.prompt_logprobs)), min(work.start + work.count, sequence.prompt_length - 1)
    )


def _edits(work: Work, row: int) -> list[Edit]:
    """One for each row of a request that has bias, penalties or a constraint, as if its drafts were its tokens."""
    sequence = work.sequence
    prompt = sequence.tokens[: sequence.prompt_length]
    output = sequence.tokens[sequence.prompt_length :]
    edits = []
    for depth, mask in enumerate(_masks(sequence, work.drafts)):
        known = [*output, *work.drafts[:depth]]
        edits.append(Edit(row + depth, sequence.request.params, prompt, known, mask, sequence.stop_ids))
    return edits


def _masks(sequence: Sequence, drafts: Seq[int]) -> list[Tensor | None]:
    """What the constraint allows after the newest token and after each draft that it would allow itself."""
    constraint = sequence.constraint
    if constraint is None:
        return [None] * (1 + len(drafts))
    masks = [constraint.mask()]
    for draft in drafts:
        mask = masks[-1]
        if draft in sequence.stop_ids or (mask is not None and not bool(mask[draft])):
            # it cannot be chosen, or ends the request: nothing behind it will be looked at
            break
        constraint.accept(draft)
        masks.append(constraint.mask())
    constraint.rollback(len(masks) - 1)
    return masks
