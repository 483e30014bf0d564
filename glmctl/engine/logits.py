"""What a request's own history, bias and constraint do to its logits before a token is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmctl.engine.request import SamplingParams

LAST_RESORT = 1e9
"""taken off the logits of stop ids under `min_tokens`: finite, because a finished grammar may allow nothing else"""


@dataclass(frozen=True)
class Edit:
    """How one row of logits is to be changed."""

    row: int
    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    """generated before this row, drafts included"""
    mask: Tensor | None
    """bool [V], True = allowed"""
    stop_ids: frozenset[int]


def edited(logits_RV: Tensor, edits: Sequence[Edit]) -> Tensor:
    """The logits that tokens are chosen from; a copy, as the model's own are still needed. fp32 [R, V]."""
    logits_RV = logits_RV.clone()
    for edit in edits:
        _forbid(logits_RV[edit.row], edit)
        if edit.params.logit_bias:
            _bias(logits_RV[edit.row], edit.params)
        _penalise(logits_RV[edit.row], edit)
    return logits_RV


def _forbid(logits_V: Tensor, edit: Edit) -> None:
    if edit.mask is not None:
        logits_V.masked_fill_(~edit.mask.to(logits_V.device), float("-inf"))
    if len(edit.output) < edit.params.min_tokens and edit.stop_ids:
        logits_V[list(edit.stop_ids)] -= LAST_RESORT


def _bias(logits_V: Tensor, params: SamplingParams) -> None:
    ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
    logits_V[ids] += torch.tensor(list(params.logit_bias.values()), device=logits_V.device)


def _penalise(logits_V: Tensor, edit: Edit) -> None:
    """Repetition over prompt and output first, then frequency and presence over the output."""
    params, device = edit.params, logits_V.device
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array([*edit.prompt, *edit.output], np.int64))).to(device)
        old = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(old < 0, old * penalty, old / penalty)
    if (params.presence_penalty or params.frequency_penalty) and edit.output:
        seen_n, count_n = np.unique(np.array(edit.output, np.int64), return_counts=True)
        taken = params.presence_penalty + params.frequency_penalty * count_n
        logits_V[torch.from_numpy(seen_n).to(device)] -= torch.from_numpy(taken.astype(np.float32)).to(device)
