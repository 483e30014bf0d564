"""What the engine is asked for and what it answers: parameters, requests, events, completions.

A request's tokens are a pure function of (weights, prompt, params): never of what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from glmctl.errors import GlmctlError

FinishReason = Literal["stop", "length", "aborted"]

MAX_TOP_LOGPROBS = 20
TopLogprobs = list[tuple[int, float]]
"""(token id, log-probability) of the likeliest tokens, best first"""
TokenBytes = Callable[[int], bytes]
"""the bytes of a token's text; a text is the concatenation of its tokens' bytes"""


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
    """How one request is sampled. Raises GlmctlError (usage) naming the field that is out of range.

    A token is chosen from the model's logits in this order: constraint and `min_tokens` forbid, `logit_bias` adds,
    penalties, temperature, `top_k`, `top_p`, `min_p`.
    """

    max_tokens: int = 256
    """most tokens to generate, the stop token counted"""
    min_tokens: int = 0
    """until so many are generated, stop ids cannot be chosen and stop strings do not count"""
    temperature: float = 1.0
    """0 = greedy (largest logit, ties to the lowest id)"""
    top_p: float = 1.0
    """keep the likeliest tokens up to and including the one that reaches this mass; 1 = all"""
    top_k: int = 0
    """keep this many likeliest tokens; 0 = all"""
    min_p: float = 0.0
    """drop tokens less likely than this share of the likeliest one; 0 = none"""
    presence_penalty: float = 0.0
    """taken off the logit of every token that was generated before, -2 to 2 (OpenAI)"""
    frequency_penalty: float = 0.0
    """taken off as often as the token was generated, -2 to 2 (OpenAI)"""
    repetition_penalty: float = 1.0
    """logits of tokens in prompt or output are divided by it, negative ones multiplied (Keskar et al. 2019, eq. 1.2)"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to the logits of these ids, -100 to 100"""
    stop: tuple[str, ...] = ()
    """generation ends with the token that completes one of these in the text; that token is part of the output"""
    stop_token_ids: tuple[int, ...] = ()
    """generation ends after any of these (the model's end tokens among them); it is part of the output"""
    ignore_eos: bool = False
    """go on whatever `stop_token_ids` says"""
    seed: int = 0
    """names this request's own stream of uniform numbers"""
    logprobs: bool = False
    """report the log-probability of each generated token"""
    top_logprobs: int = 0
    """how many alternatives to report with each token; needs `logprobs`"""
    prompt_logprobs: int | None = None
    """report the log-probability of each prompt token but the first, with so many alternatives; None = none"""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise GlmctlError(f"{name}: {getattr(self, name)!r} given, expected {expected}")

        def within(name: str, low: float, high: float) -> None:
            need(low <= getattr(self, name) <= high, name, f"a number from {low:g} to {high:g}")

        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"0 to max_tokens, {self.max_tokens}")
        need(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number of at least 0")
        need(0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        need(self.top_k >= 0, "top_k", "at least 0")
        need(0 <= self.min_p < 1, "min_p", "a number of at least 0 and under 1")
        within("presence_penalty", -2, 2)
        within("frequency_penalty", -2, 2)
        need(0 < self.repetition_penalty <= 10, "repetition_penalty", "a number above 0 and at most 10")
        need(all(-100 <= bias <= 100 for bias in self.logit_bias.values()), "logit_bias", "numbers from -100 to 100")
        need("" not in self.stop, "stop", "strings that are not empty")
        within("top_logprobs", 0, MAX_TOP_LOGPROBS)
        need(self.logprobs or not self.top_logprobs, "top_logprobs", "0 without logprobs")
        if self.prompt_logprobs is not None:
            within("prompt_logprobs", 0, MAX_TOP_LOGPROBS)

    @property
    def edits(self) -> bool:
        """Whether anything but temperature and truncation lies between the model's logits and the choice."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.min_tokens
        )


@dataclass
class Request:
    """A prompt (token ids) to continue. `id` is unique among the requests in the engine.

    Several samples of one prompt are several requests with seeds of their own; the prompt is computed once.
    """

    id: str
    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
    """what may be generated; the engine works on `constraint.fresh()`"""


class PromptLogprob(NamedTuple):
    """How likely a prompt token was."""

    logprob: float
    top: TopLogprobs


@dataclass
class Completion:
    """A finished request.

    `tokens` ends in what stopped it when `finish_reason` is "stop": `matched_stop` is the stop id, or the stop
    string that the last token completed (the text is for the caller to cut). `logprobs[i]`, when asked for, is
    log p(tokens[i]) in nats under the temperature-scaled softmax of the model's own logits, before constraint, bias,
    penalties and truncation (temperature 1 for a greedy request), so that a trainer can recompute it;
    `weight_version[i]` names the weights that produced it. `prompt_logprobs[i]` is of prompt token i + 1, at
    temperature 1.
    """

    id: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: list[int]
    matched_stop: str | int | None = None
    prompt_logprobs: list[PromptLogprob] | None = None


class Event(NamedTuple):
    """One generated token. `finish_reason` and `completion` are set on the last one of a request."""

    id: str
    token: int
    logprob: float | None
    """None unless the request asked for it"""
    finish_reason: FinishReason | None
    weight_version: int
    top_logprobs: TopLogprobs | None
    completion: Completion | None


def check_prompt(prompt: Sequence[int], vocab_size: int, max_length: int) -> None:
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
