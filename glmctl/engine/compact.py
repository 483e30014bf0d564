"""The model, its cache, and the arrays that describe each row: everything of a step that is tensors.

B rows, T tokens of each, D hidden width, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glmctl.engine.request import Sequence
from glmctl.engine.sampler import I64, Rows
from glmctl.engine.scheduler import Prefill
from glmctl.model.cache import KVCache
from glmctl.model.network import GlmMoe


class CompactRunner:
    """Forward passes over cache rows. Calls are made under `torch.inference_mode`; no autograd graph is kept."""

    def __init__(self, model: GlmMoe, rows: int, max_length: int, *, with_mtp: bool) -> None:
        self.model = model
        self.with_mtp = with_mtp
        layers = model.config.num_hidden_layers + (1 if with_mtp else 0)
        self.cache = KVCache(model.config, rows, max_length, device=model.device, dtype=model.dtype, layers=layers)
        self.params = Rows.empty(rows)
        self.token: I64 = np.zeros(rows, np.int64)
        """newest known token of each row, not in the cache yet"""
        self.position: I64 = np.zeros(rows, np.int64)
        """its position, which is also how many positions of the row are in the cache"""
        self.draft: I64 = np.zeros(rows, np.int64)
        """what the MTP layer expects to follow `token`"""

    def put(self, row: int, sequence: Sequence) -> None:
        """Start `sequence` in `row`: its parameters, and where its first token will go."""
        self.params.put(row, sequence.request.params)
        self.position[row] = len(sequence.request.prompt)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another, as far as the cache is filled."""
        self.cache.move(source, target, int(self.position[source]))
        self.params.move(source, target)
        for array in (self.token, self.position, self.draft):
            array[target] = array[source]

    def copy_prompt(self, source: int, target: int) -> None:
        """Give `target` the cached prompt of `source`; both are freshly prefilled with the same one."""
        self.cache.move(source, target, int(self.position[source]))

    def prefill(self, prefill: Prefill) -> Tensor:
        """Put prompt pieces into the cache; returns the hidden state of each row's last piece token, [B, D].

        The MTP layer's cache is filled alongside: place i gets h_i and prompt token i + 1. The prompt's last place
        waits for the first generated token (`drafts`).
        """
        start, ends = prefill.start, prefill.ends
        length = max(ends) - start
        prompts = [seq.request.prompt for seq in prefill.leaders]
        rows = slice(prefill.first_row, prefill.first_row + len(prompts))
        tokens = np.zeros((len(prompts), length + 1), np.int64)
        for index, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
            known = prompt[start : end + 1]
            tokens[index, : len(known)] = known
        tokens_BT = self._on_device(tokens)
        positions_BT = torch.arange(start, start + length, device=self.model.device).expand(len(prompts), length)
        hidden_BTD = self.model(tokens_BT[:, :-1], positions_BT=positions_BT, cache=self.cache, rows=rows)
        if self.with_mtp:
            self._mtp(hidden_BTD, tokens_BT[:, 1:], positions_BT, rows)
        last_B = self._on_device(np.array(ends, np.int64) - start - 1)
        return _at(hidden_BTD, last_B)

    def decode(self, rows: int) -> Tensor:
        """Feed the newest token of rows 0..rows-1; returns hidden states [rows, D]."""
        tokens_B1 = self._on_device(self.token[:rows, None])
        positions_B1 = self._on_device(self.position[:rows, None])
        hidden_B1D: Tensor = self.model(tokens_B1, positions_BT=positions_B1, cache=self.cache, rows=slice(0, rows))
        return hidden_B1D[:, 0]

    def verify(self, rows: int) -> Tensor:
        """Feed the newest token and its draft, in one pass; returns hidden states [rows, 2, D].

        Where the draft turns out wrong, its place in the cache is simply written again: nothing beyond a query's
        position is ever seen.
        """
        tokens_B2 = self._on_device(np.stack([self.token[:rows], self.draft[:rows]], axis=1))
        positions_B2 = self._two_positions(rows)
        result: Tensor = self.model(tokens_B2, positions_BT=positions_B2, cache=self.cache, rows=slice(0, rows))
        return result

    def drafts(self, hidden_BD: Tensor, rows: slice) -> None:
        """First drafts of freshly prefilled rows, from h of the last prompt place and the first generated token."""
        tokens_B1 = self._on_device(self.token[rows, None])
        positions_B1 = self._on_device(self.position[rows, None] - 1)
        hidden_B1D = self._mtp(hidden_BD[:, None], tokens_B1, positions_B1, rows)
        self.draft[rows] = self.model.logits(hidden_B1D[:, 0]).argmax(-1).cpu().numpy()

    def redraft(self, hidden_B2D: Tensor, next_tokens: I64, accepted: I64, rows: int) -> None:
        """New drafts after a verification: from its first place, or its second where the draft was accepted.

        hidden [rows, 2, D] is what `verify` returned, next_tokens [rows, 2] what really followed each of its two
        places; `position` is still that of before the step.
        """
        positions_B2 = self._two_positions(rows)
        hidden_B2D = self._mtp(hidden_B2D, self._on_device(next_tokens), positions_B2, slice(0, rows))
        place_B = self._on_device(accepted)
        self.draft[:rows] = self.model.logits(_at(hidden_B2D, place_B)).argmax(-1).cpu().numpy()

    def _mtp(self, hidden_BTD: Tensor, next_BT: Tensor, positions_BT: Tensor, rows: slice) -> Tensor:
        assert self.model.mtp is not None
        result: Tensor = self.model.mtp(hidden_BTD, next_BT, positions_BT=positions_BT, cache=self.cache, rows=rows)
        return result

    def _two_positions(self, rows: int) -> Tensor:
        first = self.position[:rows]
        return self._on_device(np.stack([first, first + 1], axis=1))

    def _on_device(self, array: I64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)


def _at(hidden_BTD: Tensor, place_B: Tensor) -> Tensor:
    """One place of each row: [B, D]."""
    return hidden_BTD[torch.arange(len(place_B), device=place_B.device), place_B]
