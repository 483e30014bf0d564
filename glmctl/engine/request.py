"""What the engine is asked for and what it answers: parameters, requests, events, completions.

A request's tokens are a pure function of (weights, prompt, params): never of what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from glmctl.errors import GlmctlError

FinishReason = Literal["stop", "length", "aborted"]

MAX_TOP_LOGPROBS = 20
TopLogprobs = list[tuple[int, float]]
"""(token id, log-probability) of the likeliest tokens, best first"""


class Constraint(Protocol):
    """What a request may generate next, as a state machine over its tokens (a grammar). Used by the engine's thread."""

    def mask(self) -> Tensor | None:
        """bool [V] on the CPU, True = allowed, at least one of them; None = everything."""
        ...

    def accept(self, token: int) -> None:
        """Advance by a token that the mask allowed."""
        ...

    def rollback(self, count: int) -> None:
        """Take the last `count` accepted tokens back (drafts that were looked at)."""
        ...

    def fresh(self) -> Constraint:
        """The same constraint at its start. The engine never touches the one of a `Request`, which may be shared."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Raises GlmctlError (usage) naming the field that is out of range."""

    max_tokens: int = 256
    """most tokens to generate, the stop token counted"""
    temperature: float = 1.0
    """0 = greedy (largest logit, ties to the lowest id)"""
    top_p: float = 1.0
    """keep the likeliest tokens up to and including the one that reaches this mass; 1 = all"""
    top_k: int = 0
    """keep this many likeliest tokens; 0 = all"""
    min_p: float = 0.0
    """drop tokens less likely than this share of the likeliest one; 0 = none"""
    stop_ids: tuple[int, ...] = ()
    """generation ends after any of these; the stop token is part of the output"""
    seed: int = 0
    """names this request's own stream of uniform numbers"""
    ignore_eos: bool = False
    """generate `max_tokens` whatever `stop_ids` says"""
    top_logprobs: int = 0
    """how many alternatives to report with each token"""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise GlmctlError(f"{name}: {getattr(self, name)!r} given, expected {expected}")

        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number of at least 0")
        need(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        need(self.top_k >= 0, "top_k", "at least 0")
        need(0 <= self.min_p < 1, "min_p", "a number of at least 0 and under 1")
        need(0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", f"0 to {MAX_TOP_LOGPROBS}")


@dataclass
class Request:
    """A prompt (token ids) to continue. `id` is unique among the requests in the engine."""

    id: str
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass
class Completion:
    """A finished request.

    `tokens` ends in the stop token when `finish_reason` is "stop". `logprobs[i]` is log p(tokens[i]) in nats under
    the temperature-scaled softmax before top-k, top-p and min-p (temperature 1 for a greedy request), and
    `weight_version[i]` names the weights that produced it.
    """

    id: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: list[int]


class Event(NamedTuple):
    """One generated token. `finish_reason` and `completion` are set on the last one of a request."""

    id: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    weight_version: int
    top_logprobs: TopLogprobs | None
    completion: Completion | None


class Sequence:
    """A request on its way through the engine."""

    __slots__ = ("filled", "limit", "logprobs", "request", "stop", "tokens", "versions")

    def __init__(self, request: Request, max_length: int) -> None:
        params = request.params
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.filled = 0
        """prompt tokens already in the cache"""
        self.limit = min(params.max_tokens, max_length - len(request.prompt))
        """most tokens this request may generate"""
        self.stop: frozenset[int] = frozenset() if params.ignore_eos else frozenset(params.stop_ids)

    def push(self, token: int, logprob: float, version: int) -> FinishReason | None:
        """Append one generated token; says whether, and why, it was the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token in self.stop:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def complete(self, reason: FinishReason) -> Completion:
        """The result so far, closed with `reason`."""
        return Completion(
            self.request.id, self.request.prompt, self.tokens, self.logprobs, reason, weight_version=self.versions
        )


def check_prompt(prompt: Seq[int], vocab_size: int, max_length: int) -> None:
    """GlmctlError (usage) unless the prompt is non-empty, in the vocabulary, and leaves room for one token."""
    if not prompt:
        raise GlmctlError("the prompt is empty")
    if len(prompt) >= max_length:
        raise GlmctlError(
            f"the prompt has {len(prompt)} tokens; the context holds {max_length} and needs room for one more"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise GlmctlError(f"prompt token {bad} is not in the vocabulary of {vocab_size}")
