"""The inference engine: continuous batching over compact cache rows, on weights that may change under way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from glmctl.engine.compact import CompactRunner
from glmctl.engine.request import Completion, Event, FinishReason, Request, Sequence, TopLogprobs, check_prompt
from glmctl.engine.sampler import Picked, pick
from glmctl.engine.scheduler import Scheduler
from glmctl.engine.speculative import verify_and_redraft
from glmctl.errors import DataError, GlmctlError
from glmctl.model.network import GlmMoe


@dataclass
class EngineStats:
    """Counters since the engine was made."""

    steps: int = 0
    """calls of `step` that had work"""
    tokens: int = 0
    """tokens generated"""
    prompt_tokens: int = 0
    """prompt tokens computed; those shared with an equal prompt are counted once"""
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of MTP drafts that were what the model chose; 0 when none were made."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Engine:
    """Generates for many requests at once; a request's tokens do not depend on the others.

    Not thread-safe: one thread owns it. The model may be one that is being trained: no graph is kept and its
    parameters are only read. Attention covers the longest active row, so memory is reserved for `max_slots` rows of
    `max_length` positions but time is not.
    """

    def __init__(
        self,
        model: GlmMoe,
        *,
        max_slots: int = 64,
        max_length: int | None = None,
        speculative: int = 0,
        prefill_tokens: int = 4096,
    ) -> None:
        """max_length: prompt plus generated tokens (default: the model's context). speculative: MTP drafts a step,
        0 or 1. prefill_tokens: most prompt tokens computed in one step, so that decoding rows keep moving.

        Raises GlmctlError (usage) when drafts are asked of a model without an MTP layer, or a number is out of range.
        """
        if speculative not in (0, 1):
            raise GlmctlError(f"speculative: {speculative} given; the MTP layer drafts 0 or 1 tokens a step")
        if speculative and model.mtp is None:
            raise GlmctlError("speculative: this model has no MTP layer (num_nextn_predict_layers is 0)")
        context = model.config.max_position_embeddings
        self.max_length = context if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise GlmctlError(f"max_length: {self.max_length} given, expected 2 to the model's context, {context}")
        if max_slots < 1 or prefill_tokens < 1:
            raise GlmctlError("max_slots and prefill_tokens must be at least 1")
        self.model = model
        self.max_slots = max_slots
        self.speculative = speculative
        self.version = 0
        self.stats = EngineStats()
        self._scheduler = Scheduler(max_slots, prefill_tokens)
        self._runner = CompactRunner(model, max_slots, self.max_length, with_mtp=bool(speculative))
        self._ids: set[str] = set()

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queue a request. GlmctlError (usage) for a prompt that does not fit, or an id that is in flight."""
        if request.id in self._ids:
            raise GlmctlError(f"request '{request.id}' is already in the engine")
        check_prompt(request.prompt, self.model.config.vocab_size, self.max_length)
        self._ids.add(request.id)
        self._scheduler.add(Sequence(request, self.max_length))

    def abort(self, request_id: str) -> Completion | None:
        """Drop a request, freeing its row at once; returns what it had generated, None when it is not in flight."""
        sequence = self._scheduler.drop_waiting(request_id)
        if sequence is None:
            row = self._scheduler.row_of(request_id)
            if row is None:
                return None
            sequence = self._scheduler.rows[row]
            self._release([row])
        self._ids.discard(request_id)
        return sequence.complete("aborted")

    @property
    def active(self) -> int:
        """Requests that hold a row."""
        return len(self._scheduler.rows)

    @property
    def waiting(self) -> int:
        """Requests that hold none yet."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._scheduler.rows or self._scheduler.waiting)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run requests to their end; completions in the order of the requests.

        Requests that were added before keep running too; their events are lost, so do not mix the two ways.
        """
        requests = list(requests)
        for request in requests:
            self.add(request)
        done: dict[str, Completion] = {}
        while len(done) < len(requests):
            for event in self.step():
                if event.completion is not None:
                    done[event.id] = event.completion
        return [done[request.id] for request in requests]

    def load_weights(self, version: int, source: GlmMoe | None = None) -> None:
        """Name the weights `version` from the next token on, after copying them from `source` when given.

        `source` None, or the engine's own model, means the weights were changed in place. Requests in flight go on:
        their cached keys stay those of the older weights, and every token records the version that chose it.
        GlmctlError (usage) when the source has another config.
        """
        if source is not None and source is not self.model:
            if source.config != self.model.config:
                raise GlmctlError("load_weights: the source model has another shape than the engine's")
            with torch.no_grad():
                self.model.load_state_dict(source.state_dict(), strict=True)
        self.version = version

    # ------------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Prefill what was admitted, then advance every row by one token (or two). Empty when there is no work.

        Raises DataError when the model's logits are not finite.
        """
        if not self.has_work:
            return []
        self.stats.steps += 1
        events: list[Event] = []
        self._prefill(events)
        rows = self._scheduler.decoding
        if not rows:
            return events
        if self.speculative:
            self._decode_with_drafts(rows, events)
        else:
            picked = pick(self.model.logits(self._runner.decode(rows)), self._runner.params[:rows])
            self._runner.position[:rows] += 1
            self._take_first(picked, 0, events)
        return events

    def _prefill(self, events: list[Event]) -> None:
        admission = self._scheduler.admit()
        runner, rows = self._runner, self._scheduler.rows
        first_row = None
        hidden_parts = []
        for group in admission.groups:
            for offset, sequence in enumerate(group.leaders):
                if group.start == 0:
                    runner.put(group.first_row + offset, sequence)
            hidden_BD = runner.prefill(group)
            self.stats.prompt_tokens += sum(group.ends) - group.start * len(group.ends)
            if group.complete:
                first_row = group.first_row if first_row is None else first_row
                hidden_parts.append(hidden_BD)
        if first_row is None:
            return
        hidden_ND = torch.cat(hidden_parts)
        for source, target, sequence in admission.copies:
            runner.put(target, sequence)
            runner.copy_prompt(source, target)
        if admission.copies:
            index = [*range(len(hidden_ND)), *(source - first_row for source, _, _ in admission.copies)]
            hidden_ND = hidden_ND[index]
        fresh = slice(first_row, first_row + len(hidden_ND))
        assert fresh.stop == len(rows)
        picked = pick(self.model.logits(hidden_ND), runner.params[fresh])
        if self.speculative:
            runner.token[fresh] = picked.tokens.cpu().numpy()
            runner.drafts(hidden_ND, fresh)
        self._take_first(picked, first_row, events)

    def _take_first(self, picked: Picked, first_row: int, events: list[Event]) -> None:
        """Hand one picked token to each row from `first_row` on."""
        count = len(picked.tokens)
        rows = slice(first_row, first_row + count)
        tokens = picked.tokens.cpu().numpy()
        self._runner.token[rows] = tokens
        self._runner.params.drawn[rows] += 1
        logprobs = _finite(picked)
        finished = []
        for offset, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs, strict=True)):
            if self._push(first_row + offset, token, logprob, picked, offset, events):
                finished.append(first_row + offset)
        self._release(finished)

    def _decode_with_drafts(self, rows: int, events: list[Event]) -> None:
        verified = verify_and_redraft(self._runner, rows)
        self.stats.drafted += rows
        self.stats.accepted += int(verified.accepted.sum())
        logprobs = _finite(verified.picked)
        tokens, accepted = verified.tokens.tolist(), verified.accepted.tolist()
        finished = []
        for row in range(rows):
            for place in range(1 + accepted[row]):
                index = 2 * row + place
                if self._push(row, tokens[row][place], logprobs[index], verified.picked, index, events):
                    finished.append(row)
                    break
        self._release(finished)

    def _push(
        self, row: int, token: int, logprob: float, picked: Picked, index: int, events: list[Event]
    ) -> FinishReason | None:
        sequence = self._scheduler.rows[row]
        reason = sequence.push(token, logprob, self.version)
        completion = None
        if reason is not None:
            completion = sequence.complete(reason)
            self._ids.discard(sequence.request.id)
        wanted = sequence.request.params.top_logprobs
        top = _top(picked, index, wanted) if wanted else None
        events.append(Event(sequence.request.id, token, logprob, reason, self.version, top, completion))
        self.stats.tokens += 1
        return reason

    def _release(self, rows: list[int]) -> None:
        """Free rows; from the last to the first, so that a row that moves up is never one still to be freed."""
        for row in reversed(rows):
            for source, target in self._scheduler.remove(row):
                self._runner.move(source, target)


def _finite(picked: Picked) -> list[float]:
    logprobs: list[float] = picked.logprobs.tolist()
    if not math.isfinite(sum(logprobs)):
        raise DataError("the model's logits are not finite; its weights are damaged or training diverged")
    return logprobs


def _top(picked: Picked, index: int, count: int) -> TopLogprobs:
    assert picked.top is not None
    ids, values = picked.top
    return list(zip(ids[index, :count].tolist(), values[index, :count].tolist(), strict=True))
