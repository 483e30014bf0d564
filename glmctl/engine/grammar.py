"""Grammars as a constraint on tokens, through llguidance: which token may come next, in time linear in the text.

A grammar is Lark with llguidance's additions (`%json` for schemas, `<[id]>` for special tokens). Compiling is bounded
by fuel, not by the clock: the limits below make the worst grammar fail instead of holding a core for seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import llguidance
import numpy as np
import torch
from torch import Tensor

from glmctl.errors import GlmctlError

_KEPT = 64
# llguidance's own defaults take 3 s over a pattern of 30 nested repetitions
_LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=50_000)


class GrammarError(GlmctlError):
    """A grammar that cannot be compiled; the message is for whoever wrote it."""


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special: Iterable[int], eos: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = list(special)
        self.eos_token_id = eos
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class GrammarCompiler:
    """Grammars for one vocabulary. Keeps the last 64 compiled ones. Not thread-safe: give it a thread of its own."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        special: Iterable[int],
        eos_ids: Sequence[int],
        encode: Callable[[str], list[int]],
        vocab_size: int,
    ) -> None:
        """tokens: the bytes of each id; ids from there to `vocab_size` (padding) are never allowed. special: ids that
        a grammar must name to allow. eos_ids: what may end an answer. encode: text to ids, no specials."""
        assert len(tokens) <= vocab_size
        padding = [b"<|padding %d|>" % index for index in range(len(tokens), vocab_size)]
        special = [*special, *range(len(tokens), vocab_size)]
        vocabulary = _Vocabulary([*tokens, *padding], special, eos_ids[0], encode)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), n_vocab=vocab_size, eos_token=list(eos_ids)
        )
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._vocab_size = vocab_size
        self._ends_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._ends_V[list(eos_ids)] = True

    def compile(self, lark: str, *, after: int | None = None) -> GrammarConstraint:
        """The constraint of a grammar. after: it starts behind this token (`</think>`); before it, only the end of
        the answer is forbidden. GrammarError when the grammar is wrong, too large, or nothing satisfies it."""
        matcher = self._compiled.get(lark)
        if matcher is None:
            matcher = llguidance.LLMatcher(
                self._tokenizer, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0, limits=_LIMITS
            )
            # the first mask builds the start of the lexer: a cost of compiling, not of the first token
            probe = matcher.deep_copy()
            if not probe.is_error():
                probe.compute_bitmask()
            if probe.is_error() or probe.is_stopped():
                raise GrammarError(_first_line(probe.get_error()) or "nothing can satisfy it")
            self._compiled[lark] = matcher
        self._compiled.move_to_end(lark)
        while len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return GrammarConstraint(matcher, self._ends_V, after, _Report())


class _Report:
    """What every copy of a constraint tells whoever made the first."""

    problem: str | None = None


class GrammarConstraint:
    """A `Constraint` (see `engine.request`). Two phases: up to and with the token `after`, and the grammar's."""

    def __init__(self, compiled: llguidance.LLMatcher, ends_V: Tensor, after: int | None, report: _Report) -> None:
        self._compiled = compiled
        self._matcher = compiled.deep_copy()
        self._ends_V = ends_V
        self._after = after
        self._report = report
        self._before = 0
        """tokens accepted in the first phase"""
        self._closed = after is None
        self._inside = 0
        """tokens that the matcher has consumed"""
        self._beyond = 0
        """tokens after the grammar's end (`ignore_eos`)"""

    @property
    def problem(self) -> str | None:
        """What stopped the grammar half way (its limits): the answer is then cut short."""
        return self._report.problem

    def mask(self) -> Tensor | None:
        """bool [V], True = allowed, never empty."""
        if not self._closed:
            return ~self._ends_V
        if self._matcher.is_stopped() or self._beyond:
            self._note()
            return self._ends_V
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask_V = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(self._ends_V)].astype(np.bool_))
        if self._matcher.is_error() or not mask_V.any():
            self._note()
            return self._ends_V
        return mask_V

    def accept(self, token: int) -> None:
        """Advance by a token that the mask allowed."""
        if not self._closed:
            self._before += 1
            self._closed = token == self._after
        elif self._beyond or self._matcher.is_stopped():
            self._beyond += 1
        else:
            self._inside += 1
            self._matcher.consume_token(token)
            self._note()

    def rollback(self, count: int) -> None:
        """Take the last `count` accepted tokens back."""
        beyond = min(count, self._beyond)
        inside = min(count - beyond, self._inside)
        before = count - beyond - inside
        assert before <= self._before, "more tokens taken back than were accepted"
        self._beyond -= beyond
        self._inside -= inside
        if inside:
            self._matcher.rollback(inside)
        if before:
            self._before -= before
            self._closed = self._after is None

    def fresh(self) -> GrammarConstraint:
        """The same at its start."""
        return GrammarConstraint(self._compiled, self._ends_V, self._after, self._report)

    def _note(self) -> None:
        if self._matcher.is_error():
            self._report.problem = _first_line(self._matcher.get_error()) or "a limit was reached"


def _first_line(message: str) -> str:
    """Without the parser's state, which follows on further lines."""
    return message.split("\n", 1)[0][:300]
