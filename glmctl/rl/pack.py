"""Trajectories packed into rows, with flat indices of the tokens the objective is about.

Legend: B rows, T tokens a row, N generated tokens of the micro-batch, M targets of the multi-token-prediction layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glmctl.data.packing import best_fit
from glmctl.rl.episode import Trajectory

ROW_TOKENS = 512
"""rows grow to this (or to the longest trajectory) when trajectories are short; longer rows cost attention, not less
padding"""


_FLAT = ("at", "target", "logp", "advantage", "weight", "sequence", "fresh")


@dataclass(frozen=True)
class Weighted:
    """A trajectory with its advantage and the weight of each of its tokens in the loss."""

    trajectory: Trajectory
    advantage: float
    weight: float
    fresh: bool = True
    """made by the very weights that are about to be trained, so that its ratio must be 1"""


@dataclass(frozen=True)
class PackedRollouts:
    """One micro-batch. `at_N` indexes the flattened hidden states [B*T] that predict the N generated tokens."""

    tokens_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    """-1 on padding"""
    at_N: Tensor
    target_N: Tensor
    behaviour_logp_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    sequence_N: Tensor
    """index of the token's trajectory in this micro-batch, counted from 0"""
    fresh_N: Tensor
    """bool: see `Weighted.fresh`"""
    next_tokens_BT: Tensor
    """t_{i+1} of the same trajectory, or 0"""
    mtp_at_M: Tensor
    """where a hidden state and its next token predict a generated token two places on"""
    mtp_target_M: Tensor

    def to(self, device: torch.device | str) -> PackedRollouts:
        """The same on `device`."""
        return PackedRollouts(**{name: value.to(device) for name, value in vars(self).items()})


def pack(rollouts: Sequence[Weighted], micro_tokens: int | None) -> list[PackedRollouts]:
    """All of `rollouts` in micro-batches of at most `micro_tokens` tokens, padding counted (None: one micro-batch).

    Best-fit decreasing, deterministic. A row is at least as long as the longest trajectory, and a micro-batch at
    least one row, whatever `micro_tokens` says.
    """
    lengths = [len(one.trajectory.tokens) for one in rollouts]
    width = max(*lengths, min(ROW_TOKENS, sum(lengths))) if len(lengths) > 1 else lengths[0]
    rows = best_fit(lengths, width)
    per_batch = len(rows) if micro_tokens is None else max(1, micro_tokens // width)
    chunks = [rows[at : at + per_batch] for at in range(0, len(rows), per_batch)]
    return [_pack_rows([[rollouts[i] for i in row] for row in chunk], width) for chunk in chunks]


def _pack_rows(rows: Sequence[Sequence[Weighted]], width: int) -> PackedRollouts:
    tokens, positions, following = (np.zeros((len(rows), width), np.int64) for _ in range(3))
    documents = np.full((len(rows), width), -1, np.int64)
    flat: dict[str, list[np.ndarray]] = {name: [] for name in _FLAT}
    mtp_at, mtp_target = [], []
    trajectories = 0
    for row, members in enumerate(rows):
        start = 0
        for document, one in enumerate(members):
            ids = np.asarray(one.trajectory.tokens, np.int64)
            mask = np.asarray(one.trajectory.loss_mask, bool)
            here = slice(start, start + len(ids))
            tokens[row, here] = ids
            positions[row, here] = np.arange(len(ids))
            documents[row, here] = document
            following[row, start : start + len(ids) - 1] = ids[1:]
            # the hidden state one place before a token predicts it; the first token is never the model's
            made = np.flatnonzero(mask)
            assert made.size == 0 or made[0] > 0
            flat["at"].append(row * width + start + made - 1)
            flat["target"].append(ids[made])
            flat["logp"].append(np.asarray(one.trajectory.logprobs, np.float32)[made])
            flat["advantage"].append(np.full(made.size, one.advantage, np.float32))
            flat["weight"].append(np.full(made.size, one.weight, np.float32))
            flat["sequence"].append(np.full(made.size, trajectories, np.int64))
            flat["fresh"].append(np.full(made.size, one.fresh, bool))
            trajectories += 1
            second = made[made > 1]
            mtp_at.append(row * width + start + second - 2)
            mtp_target.append(ids[second])
            start += len(ids)
    return PackedRollouts(
        tokens_BT=torch.from_numpy(tokens),
        positions_BT=torch.from_numpy(positions),
        documents_BT=torch.from_numpy(documents),
        at_N=_join(flat["at"]),
        target_N=_join(flat["target"]),
        behaviour_logp_N=_join(flat["logp"]),
        advantage_N=_join(flat["advantage"]),
        weight_N=_join(flat["weight"]),
        sequence_N=_join(flat["sequence"]),
        fresh_N=_join(flat["fresh"]),
        next_tokens_BT=torch.from_numpy(following),
        mtp_at_M=_join(mtp_at),
        mtp_target_M=_join(mtp_target),
    )


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))
