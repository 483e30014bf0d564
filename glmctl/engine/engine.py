"""The inference engine: continuous batching over paged keys and values, on weights that may change under way."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glmctl.engine.blocks import BlockManager
from glmctl.engine.cache import BLOCK_SIZE, PagedCache
from glmctl.engine.draft_control import DraftControl, Timed
from glmctl.engine.draft_vocabulary import DraftVocabulary
from glmctl.engine.request import Completion, Event, Request, TokenBytes, check_prompt
from glmctl.engine.runners import MakeRunner, automatic
from glmctl.engine.sampler import Picked, Rows
from glmctl.engine.scheduler import Plan, Scheduler, Work
from glmctl.engine.sequence import Sequence
from glmctl.engine.speculative import MAX_DRAFTS, Computed, Drafter
from glmctl.engine.step import Placed, choose, lay_out, score_prompt, top_of
from glmctl.errors import DataError, GlmctlError
from glmctl.kernels.all_finite import all_finite
from glmctl.model.network import GlmMoe

CACHE_BYTES = 4 << 30
"""most memory for keys and values unless `kv_blocks` says otherwise"""


@dataclass
class EngineStats:
    """Counters since the engine was made."""

    steps: int = 0
    """calls of `step` that had work"""
    tokens: int = 0
    """tokens generated"""
    prompt_tokens: int = 0
    """prompt tokens computed, again after a preemption too; those found in the cache are not counted"""
    reused_tokens: int = 0
    """prompt tokens found in the cache"""
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    """passes of one request that had drafts"""
    accepted_at: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    """how often the first, second, third draft of a pass was accepted"""

    @property
    def acceptance(self) -> float:
        """Share of MTP drafts that were what the model chose; 0 when none were made."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens a pass with drafts emits on average, 1 to 1 + drafts; 0 when none were made."""
        return 1 + self.accepted / self.verified if self.verified else 0.0


class Engine:
    """Generates for many requests at once; a request's tokens do not depend on the others.

    Not thread-safe: one thread owns it. The model may be one that is being trained: no graph is kept and its
    parameters are only read. Memory for keys and values is `kv_blocks` blocks of 16 places, whatever is asked for:
    when they run out, the youngest request is preempted and computed again later.
    """

    def __init__(
        self,
        model: GlmMoe,
        *,
        max_slots: int = 64,
        max_length: int | None = None,
        speculative: int = 0,
        adaptive: bool = False,
        prefill_tokens: int = 4096,
        kv_blocks: int | None = None,
        token_bytes: TokenBytes | None = None,
        runner: MakeRunner = automatic,
    ) -> None:
        """max_length: prompt plus generated tokens (default: the model's context). speculative: MTP drafts a step,
        0 to 3. adaptive: switch drafts off while they are measured to lose. prefill_tokens: most prompt tokens computed
        in one step, so that decoding requests keep moving. kv_blocks: default room for `max_slots` requests of
        `max_length`, but no more than 4 GiB. token_bytes: needed by requests with stop strings. runner: who computes
        (`engine.runners`; the default is native code for an fp32 model on a CPU).

        Raises GlmctlError (usage) when drafts are asked of a model without an MTP layer, or a number is out of range.
        """
        if not 0 <= speculative <= MAX_DRAFTS:
            raise GlmctlError(f"speculative: {speculative} given; the MTP layer drafts 0 to {MAX_DRAFTS} tokens a step")
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
        self.token_bytes = token_bytes
        self.version = 0
        self.stats = EngineStats()
        layers = model.config.num_hidden_layers + bool(speculative)
        blocks = 1 + _blocks(model, layers, max_slots, self.max_length, kv_blocks)
        cache = PagedCache(model.config, blocks, layers=layers, device=model.device, dtype=model.dtype)
        self._runner = runner(model, cache)
        self._scheduler = Scheduler(
            BlockManager(blocks),
            block_size=BLOCK_SIZE,
            max_slots=max_slots,
            max_length=self.max_length,
            prefill_tokens=prefill_tokens,
            lookahead=speculative,
        )
        self._vocabulary = DraftVocabulary(model.config.vocab_size)
        self._drafter: Drafter | None = None
        if speculative:
            tail_BD = torch.zeros(blocks, model.config.hidden_size, dtype=model.dtype, device=model.device)
            self._drafter = Drafter(self._runner, self._scheduler.table_SM, tail_BD, BLOCK_SIZE, speculative)
        self._control = DraftControl() if speculative and adaptive else None
        self._params = Rows.empty(max_slots)
        self._inside: dict[str, Sequence] = {}

    # ------------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queue a request.

        GlmctlError (usage) for a prompt that does not fit, an id that is in flight, or stop strings without
        `token_bytes`.
        """
        if request.id in self._inside:
            raise GlmctlError(f"request '{request.id}' is already in the engine")
        if request.params.stop and self.token_bytes is None:
            raise GlmctlError("stop: this engine does not know the tokens' text; give it `token_bytes`")
        vocab = self.model.config.vocab_size
        check_prompt(request.prompt, vocab, self.max_length)
        named = [*request.params.logit_bias, *request.params.stop_token_ids]
        if named and not 0 <= min(named) <= max(named) < vocab:
            raise GlmctlError(f"logit_bias and stop_token_ids must name tokens of the vocabulary of {vocab}")
        sequence = self._inside[request.id] = Sequence(request, self.max_length)
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> Completion | None:
        """Drop a request, freeing its blocks at once; returns what it had generated, None when it is not in flight."""
        sequence = self._inside.pop(request_id, None)
        if sequence is None:
            return None
        self._scheduler.remove(sequence)
        return sequence.complete("aborted")

    @property
    def active(self) -> int:
        """Requests that hold blocks."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that hold none, new or preempted."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._inside)

    @property
    def kv_blocks(self) -> tuple[int, int]:
        """Blocks in use, and all there are. Blocks that only wait for somebody to share them are not in use."""
        blocks = self._scheduler.blocks
        return blocks.total - blocks.free, blocks.total

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
        their cached keys stay those of the older weights (a preempted one is computed again with the new), and every
        token records the version that chose it. Nothing that older weights computed is shared with later requests.
        GlmctlError (usage) when the source has another config.
        """
        if source is not None and source is not self.model:
            if source.config != self.model.config:
                raise GlmctlError("load_weights: the source model has another shape than the engine's")
            with torch.no_grad():
                self.model.load_state_dict(source.state_dict(), strict=True)
        self.version = version
        # counted, not named by the version: one version may be loaded twice with different weights
        self._scheduler.weights += 1
        self._runner.refresh_weights()

    # ------------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one piece of each request that runs, and give one token, or more with accepted drafts, to each whose
        tokens are all computed. Empty when there is no work.

        Raises DataError when the model's logits are not finite.
        """
        if not self._inside:
            return []
        began = time.perf_counter()
        probing = self._control is not None and self._control.probing
        if probing:
            self._withhold_drafts()
        plan = self._scheduler.schedule()
        for sequence in plan.admitted:
            self._params.put(sequence.slot, sequence.request.params)
        try:
            events, advanced = self._compute(plan)
        except BaseException:
            # blocks were named for content that was perhaps never computed
            self._scheduler.blocks.forget()
            raise
        if self._control is not None:
            ended = advanced if probing else time.perf_counter()
            self._judge_drafts(self._control, plan, Timed(len(plan.works), len(events), ended - began), probing)
        return events

    def _compute(self, plan: Plan) -> tuple[list[Event], float]:
        """The step's events, and when its tokens were known: what follows is the MTP layer's work."""
        batch, placed = lay_out(plan.works, self._scheduler.table_SM)
        out = self._runner.step(batch)
        if not all_finite(out.logits_RV):
            raise DataError("the model's logits are not finite; its weights are damaged or training diverged")
        events: list[Event] = []
        picked = choose(placed, out.logits_RV, self._params)
        pieces = self._advance(placed, out.logits_RV, picked, events)
        advanced = time.perf_counter()
        if self._drafter is not None and pieces:
            self._drafter.remember(batch, out.hidden_ND)
            self.stats.drafted += self._drafter.follow(pieces, out.hidden_ND)
        for event in events:
            if event.finish_reason is not None:
                ended = self._inside.pop(event.id)
                self._scheduler.remove(ended)
                if self._drafter is not None and self._vocabulary.see(ended.tokens):
                    self._drafter.limit(self._vocabulary.chosen())
        self.stats.steps += 1
        self.stats.tokens += len(events)
        self.stats.reused_tokens = self._scheduler.reused
        self.stats.preemptions = self._scheduler.preemptions
        return events, advanced

    def _advance(
        self, placed: list[Placed], logits_RV: Tensor, picked: Picked | None, events: list[Event]
    ) -> list[Computed]:
        """Give every sequence what the step found out about it; the pieces of those for whom the MTP layer goes on."""
        tokens: list[int] = [] if picked is None else picked.tokens.tolist()
        logprobs: list[float] | None = None
        if picked is not None and picked.logprobs is not None:
            logprobs = picked.logprobs.tolist()
        pieces = []
        row = 0
        for each in placed:
            work, sequence = each.work, each.work.sequence
            score_prompt(each, logits_RV)
            end = work.start + work.count
            self.stats.prompt_tokens += max(0, min(end, sequence.prompt_length) - work.start)
            if work.newest:
                assert picked is not None
                end += self._emit(work, row, tokens, logprobs, picked, events) - 1
                row += 1 + len(work.drafts)
            sequence.computed = end
            if sequence.drafting:
                pieces.append(Computed(work, each.row, end))
        return pieces

    def _emit(
        self,
        work: Work,
        row: int,
        tokens: list[int],
        logprobs: list[float] | None,
        picked: Picked,
        events: list[Event],
    ) -> int:
        """Push the tokens that hold, from `row` of the choices on: one, and one more for each right draft. How many."""
        sequence, drafts = work.sequence, work.drafts
        request, params = sequence.request, sequence.request.params
        emitted = 0
        for draft in (*drafts, None):
            at = row + emitted
            token = tokens[at]
            logprob = logprobs[at] if logprobs is not None and params.logprobs else None
            emitted += 1
            sequence.push(token, logprob, self.version, self.token_bytes)
            reason = sequence.finished
            completion = None if reason is None else sequence.complete(reason)
            top = top_of(picked, at, params.top_logprobs)
            events.append(Event(request.id, token, logprob, reason, self.version, top, completion))
            if reason is not None or token != draft:
                break
        sequence.drafts = []
        if drafts:
            self.stats.verified += 1
            self.stats.accepted += emitted - 1
            for depth in range(emitted - 1):
                self.stats.accepted_at[depth] += 1
        return emitted

    def _withhold_drafts(self) -> None:
        for sequence in self._scheduler.running:
            sequence.drafts = []

    def _judge_drafts(self, control: DraftControl, plan: Plan, timed: Timed, probing: bool) -> None:
        """Let the control see a step that is typical for decoding, and follow what it decides."""
        if not control.drafting:
            control.rested()
        elif all(work.count == 1 and work.newest and work.sequence.drafting for work in plan.works) and (
            # at the end of their answers requests have no drafts either: such steps say nothing
            probing != any(work.drafts for work in plan.works)
        ):
            control.timed(timed, plain=probing)
        self._scheduler.drafting = control.drafting
        if not control.drafting:
            self._withhold_drafts()
            for sequence in self._scheduler.running:
                # from here on the MTP layer's part of their blocks is missing
                sequence.shares = sequence.shares and not sequence.drafting
                sequence.drafting = False


def _blocks(model: GlmMoe, layers: int, max_slots: int, max_length: int, asked: int | None) -> int:
    """How many blocks the cache gets. GlmctlError (usage) when a request of `max_length` would not fit."""
    one = -(-max_length // BLOCK_SIZE)
    if asked is not None:
        if asked < one:
            raise GlmctlError(f"kv_blocks: {asked} given; one request of {max_length} tokens needs {one}")
        return asked
    affordable = CACHE_BYTES // PagedCache.bytes_per_block(model.config, layers, BLOCK_SIZE, model.dtype)
    return max(one, min(max_slots * one, affordable))
