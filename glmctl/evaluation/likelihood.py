"""Log-likelihood of given continuations: one forward over right-padded rows, logits only where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from glmctl.errors import GlmctlError
from glmctl.model.network import GlmMoe

Score = tuple[float, bool]
"""log-likelihood in nats, and whether every token was the likeliest one"""

LOGITS_AT_ONCE = 32 * 1024 * 1024
"""numbers (128 MiB of fp32) that one block of logits may hold"""


@torch.inference_mode()
def score_continuations(
    model: GlmMoe,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int,
    batch_tokens: int = 8192,
    done: Callable[[list[tuple[int, Score]]], None] = lambda scored: None,
) -> list[Score]:
    """For each (context, continuation) of token ids: log p(continuation | context), and whether it is greedy.

    The context must not be empty (give it the end-of-text token). What does not fit `max_length` is cut from the
    left, as lm-eval does. Equal inputs are computed once: choices of one token each cost one row. An empty
    continuation has log-likelihood 0 and is greedy. `done` is called after every batch with the places it scored.
    GlmctlError when a continuation alone exceeds `max_length`.
    """
    results: list[Score] = [(0.0, True)] * len(pairs)
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        assert context, "a continuation is conditioned on at least one token"
        if len(continuation) > max_length:
            raise GlmctlError(f"a continuation of {len(continuation)} tokens exceeds the context of {max_length}")
        if continuation:
            whole = (context + continuation)[-(max_length + 1) : -1]
            rows.setdefault(tuple(whole), []).append(index)
    for batch in _batches(sorted(rows, key=lambda row: (-len(row), row)), batch_tokens):
        wanted = [(place, index) for place, row in enumerate(batch) for index in rows[row]]
        targets = [pairs[index][1] for _, index in wanted]
        logprobs_N, greedy_N = _score_rows(model, batch, [place for place, _ in wanted], targets)
        start = 0
        for (_, index), target in zip(wanted, targets, strict=True):
            stop = start + len(target)
            results[index] = (float(logprobs_N[start:stop].double().sum()), bool(greedy_N[start:stop].all()))
            start = stop
        done([(index, results[index]) for _, index in wanted])
    return results


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Runs of rows (longest first) of at most `batch_tokens` tokens with their padding, at least one row each."""
    start = 0
    while start < len(rows):
        count = max(batch_tokens // len(rows[start]), 1)
        yield rows[start : start + count]
        start += count


def _score_rows(
    model: GlmMoe, rows: Sequence[tuple[int, ...]], places: list[int], targets: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Log-prob and is-argmax of every target token, flat; `targets[i]` ends one beyond the end of `rows[places[i]]`."""
    longest = len(rows[0])
    # causal attention never sees the padding on the right; its token only has to be in the vocabulary
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens_BT[place, : len(row)] = torch.tensor(row)
    hidden_BTD = model(tokens_BT.to(model.device))
    row_N = torch.tensor([p for p, target in zip(places, targets, strict=True) for _ in target])
    position_N = torch.tensor(
        [
            position
            for place, target in zip(places, targets, strict=True)
            for position in range(len(rows[place]) - len(target), len(rows[place]))
        ]
    )
    target_N = torch.tensor([token for target in targets for token in target])
    hidden_ND = hidden_BTD[row_N.to(model.device), position_N.to(model.device)]
    chunk = max(LOGITS_AT_ONCE // model.config.vocab_size, 1)
    logprobs, greedy = [], []
    for hidden_CD, target_C in zip(
        torch.split(hidden_ND, chunk), torch.split(target_N.to(model.device), chunk), strict=True
    ):
        logits_CV = model.logits(hidden_CD)
        logprobs.append(logits_CV.log_softmax(-1).gather(1, target_C[:, None])[:, 0])
        greedy.append(logits_CV.argmax(-1) == target_C)
    return torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()
