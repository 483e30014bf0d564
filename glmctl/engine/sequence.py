"""A request on its way through the engine."""

from __future__ import annotations

from glmctl.engine.request import (
    Completion,
    FinishReason,
    PromptLogprob,
    Request,
    TokenBytes,
)


class Sequence:
    """What is known of one request: its tokens, how many of them are in the cache, and in which blocks."""

    __slots__ = (
        "_tail",
        "_tail_length",
        "blocks",
        "chain",
        "computed",
        "constraint",
        "drafting",
        "drafts",
        "edited",
        "finished",
        "limit",
        "logprobs",
        "matched",
        "mtp_filled",
        "prompt_length",
        "prompt_logprobs",
        "request",
        "root",
        "shares",
        "slot",
        "stop_ids",
        "tokens",
        "versions",
    )

    def __init__(self, request: Request, max_length: int) -> None:
        params = request.params
        self.request = request
        self.tokens = list(request.prompt)
        """prompt and what was generated"""
        self.prompt_length = len(request.prompt)
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.prompt_logprobs: list[PromptLogprob] = []
        self.limit = self.prompt_length + min(params.max_tokens, max_length - self.prompt_length)
        """most tokens, the prompt's included"""
        self.stop_ids: frozenset[int] = frozenset() if params.ignore_eos else frozenset(params.stop_token_ids)
        self.constraint = request.constraint.fresh() if request.constraint is not None else None
        self.edited = self.constraint is not None or params.edits
        """whether anything changes its logits before a token is chosen"""
        self.finished: FinishReason | None = None
        self.matched: str | int | None = None
        self._tail = b""
        self._tail_length = max((len(stop.encode()) for stop in params.stop), default=0) - 1
        # ---- what the cache holds; all of it is given up when the sequence is preempted
        self.slot = -1
        self.computed = 0
        """tokens whose keys and values are cached"""
        self.blocks: list[int] = []
        self.root = b""
        self.chain: list[bytes] = []
        """names of the first blocks, those that are full; the first is chained to `root`"""
        self.shares = True
        """whether the blocks it fills may be shared"""
        self.drafting = False
        """whether the MTP layer's cache is kept for it"""
        self.mtp_filled = 1
        """places of the MTP layer that are cached (its place 0 does not exist)"""
        self.drafts: list[int] = []
        """what the MTP layer expects to follow the newest token"""

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    def push(self, token: int, logprob: float | None, version: int, token_bytes: TokenBytes | None) -> bool:
        """Append one generated token; says whether it was the last (`finished` then tells why)."""
        self.tokens.append(token)
        self.versions.append(version)
        if logprob is not None:
            self.logprobs.append(logprob)
        params = self.request.params
        if token in self.stop_ids:
            self.finished, self.matched = "stop", token
        elif params.stop and self._completes_stop(token, token_bytes):
            self.finished = "stop"
        elif len(self.tokens) >= self.limit:
            self.finished = "length"
        elif self.constraint is not None:
            self.constraint.accept(token)
        return self.finished is not None

    def complete(self, reason: FinishReason) -> Completion:
        """The result so far, closed with `reason`."""
        return Completion(
            id=self.request.id,
            prompt=self.request.prompt,
            tokens=self.tokens[self.prompt_length :],
            logprobs=self.logprobs,
            finish_reason=reason,
            weight_version=self.versions,
            matched_stop=self.matched,
            prompt_logprobs=self.prompt_logprobs if self.request.params.prompt_logprobs is not None else None,
        )

    def _completes_stop(self, token: int, token_bytes: TokenBytes | None) -> bool:
        """Whether the newest token completed a stop string, however many tokens it began before."""
        assert token_bytes is not None
        text = self._tail + token_bytes(token)
        self._tail = text[-self._tail_length :] if self._tail_length else b""
        params = self.request.params
        if self.generated < params.min_tokens:
            return False
        found = [(text.find(stop.encode()), stop) for stop in params.stop if stop.encode() in text]
        if found:
            self.matched = min(found)[1]
        return bool(found)
