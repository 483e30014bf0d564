"""Rejection sampling: what of the experts' samples may be taught (GLM-4.5 report section 3.1, spec section 3.1).

In the report's order: (1) repetitive, too short, truncated, malformed reasoning; (2) verified answers; (3) a reward
model for subjective questions, of which our tasks have none; (4) tool use: protocol obeyed, terminal state reached.
A sample is counted under the first filter that refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.score import thinks

REPEATED_TIMES = 4
"""a phrase said this often in a row is a loop"""
REPEATED_TOKENS = 16
"""... unless all of it is shorter than this many tokens (zeros in a number, a ruler of dashes)"""
LONGEST_PHRASE = 64
"""tokens; the longest phrase that is looked for"""


@dataclass
class Rejections:
    """How many samples each filter refused, and one example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Trajectory] = field(default_factory=dict)

    def add(self, name: str, sample: Trajectory) -> None:
        """Count one refused sample."""
        self.counts[name] = self.counts.get(name, 0) + 1
        self.examples.setdefault(name, sample)

    def to_row(self) -> dict[str, Any]:
        """JSON-able: per filter the count and the example's problem, detail and messages."""
        return {
            name: {
                "count": count,
                "example": {
                    "problem_id": self.examples[name].problem_id,
                    "detail": self.examples[name].detail,
                    "messages": self.examples[name].messages,
                },
            }
            for name, count in self.counts.items()
        }


def filter_samples(samples: Sequence[Trajectory], min_tokens: int) -> tuple[list[Trajectory], Rejections]:
    """The samples that pass every filter, in order, and what became of the rest."""
    kept, rejections = [], Rejections()
    for sample in samples:
        name = first_rejection(sample, min_tokens)
        if name is None:
            kept.append(sample)
        else:
            rejections.add(name, sample)
    return kept, rejections


def first_rejection(sample: Trajectory, min_tokens: int) -> str | None:
    """The name of the first filter that refuses `sample`, or None."""
    for name, refuses in FILTERS.items():
        if refuses(sample, min_tokens):
            return name
    return None


def is_repetitive(tokens: Sequence[int]) -> bool:
    """Whether some phrase of at most 64 tokens is said at least 4 times in a row, over at least 16 tokens."""
    for period in range(1, min(LONGEST_PHRASE, len(tokens) // REPEATED_TIMES) + 1):
        needed = max(REPEATED_TIMES * period, REPEATED_TOKENS) - period
        same = 0
        for i in range(period, len(tokens)):
            # `same` counts how long the text has been equal to itself `period` tokens before
            same = same + 1 if tokens[i] == tokens[i - period] else 0
            if same >= needed:
                return True
    return False


def _not_judged(sample: Trajectory, min_tokens: int) -> bool:
    return sample.reward is None


def _repetitive(sample: Trajectory, min_tokens: int) -> bool:
    turn: list[int] = []
    for token, made in zip(sample.tokens, sample.loss_mask, strict=True):
        if made:
            turn.append(token)
        elif turn:
            if is_repetitive(turn):
                return True
            turn = []
    return is_repetitive(turn)


def _too_short(sample: Trajectory, min_tokens: int) -> bool:
    return sample.generated_tokens < min_tokens


def _truncated(sample: Trajectory, min_tokens: int) -> bool:
    return sample.stop_reason is StopReason.TRUNCATED


def _malformed(sample: Trajectory, min_tokens: int) -> bool:
    return not sample.well_formed or (sample.enable_thinking and not thinks(sample))


def _wrong_answer(sample: Trajectory, min_tokens: int) -> bool:
    return not sample.tools and sample.reward != 1.0


def _tool_protocol(sample: Trajectory, min_tokens: int) -> bool:
    return sample.stop_reason is StopReason.MALFORMED


def _terminal_state(sample: Trajectory, min_tokens: int) -> bool:
    return bool(sample.tools) and sample.reward != 1.0


FILTERS: dict[str, Callable[[Trajectory, int], bool]] = {
    "not_judged": _not_judged,
    "repetitive": _repetitive,
    "too_short": _too_short,
    "truncated": _truncated,
    "malformed_reasoning": _malformed,
    "wrong_answer": _wrong_answer,
    "tool_protocol": _tool_protocol,
    "terminal_state": _terminal_state,
}
