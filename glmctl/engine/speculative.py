"""Speculative decoding with the MTP layer, one draft a step, exact by construction.

The model sees the newest token and its draft in one pass. Its own choice after the newest token (the sampler's, with
the request's own random number) is always what is emitted; the draft only decides whether the second place of the
pass is of use: accepted iff it is that very choice. So the tokens are those of plain decoding, greedy or sampled, up
to the rounding of a two-token instead of a one-token pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glmctl.engine.compact import CompactRunner
from glmctl.engine.sampler import I64, Picked, pick


@dataclass
class Verified:
    """One or two tokens for each row."""

    picked: Picked
    """2 x rows: place 2 r follows the newest token of row r, place 2 r + 1 its draft"""
    tokens: I64
    """[rows, 2], the same ids"""
    accepted: I64
    """[rows], 1 where the draft was right and the second token holds"""


def verify_and_redraft(runner: CompactRunner, rows: int) -> Verified:
    """One step over rows 0..rows-1: verify the drafts, then draft again. Advances token, position and drawn."""
    hidden_B2D = runner.verify(rows)
    logits = runner.model.logits(hidden_B2D.flatten(0, 1))
    picked = pick(logits, runner.params[:rows].doubled())
    tokens: I64 = picked.tokens.cpu().numpy().reshape(rows, 2)
    accepted = (tokens[:, 0] == runner.draft[:rows]).astype(np.int64)
    runner.redraft(hidden_B2D, tokens, accepted, rows)
    runner.token[:rows] = tokens[np.arange(rows), accepted]
    runner.position[:rows] += 1 + accepted
    runner.params.drawn[:rows] += 1 + accepted
    return Verified(picked, tokens, accepted)
