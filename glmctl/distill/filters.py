"""Rejection sampling: what of the experts' samples may be taught (GLM-4.5 report section 3.1, spec section 3.1).

In the report's order: (1) repetitive, too short, truncated, malformed reasoning; (2) verified answers; (3) a reward
model where the recipe names one; (4) tool use: protocol obeyed, terminal state reached. A sample is counted under the
first filter that refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.recipe.schema import RewardFilter
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.score import thinks
from glmctl.run.directory import resolve_model
from glmctl.training.reward import load_reward_model, score_conversations

REPEATED_TIMES = 4
"""a phrase said this often in a row is a loop"""
REPEATED_TOKENS = 16
"""... unless all of it is shorter than this many tokens (zeros in a number, a ruler of dashes)"""
LONGEST_PHRASE = 64
"""tokens; the longest phrase that is looked for"""
SHOWN_CHARACTERS = 2000
"""of an example's text: its beginning and its end"""

Scorer = Callable[[Sequence[Trajectory]], Sequence[float]]
"""a reward model: one number a sample, higher is better"""


@dataclass(frozen=True)
class Judge:
    """What the filters need besides the sample."""

    template: ChatTemplate
    """the one that the samples' tokens are of"""
    min_tokens: int = 0
    scorer: Scorer | None = None
    min_score: float = 0.0


def reward_scorer(spec: RewardFilter, device: torch.device) -> Scorer:
    """A trained reward model as a scorer. RecipeError or DataError when it is not there, or is none."""
    folder = resolve_model(spec.model)
    model, template = load_reward_model(folder, device=device), ChatTemplate.load(folder)

    def scored(samples: Sequence[Trajectory]) -> list[float]:
        talks = [Conversation(one.messages, one.tools, one.enable_thinking) for one in samples]
        return score_conversations(model, template, talks)

    return scored


@dataclass
class Rejections:
    """How many samples each filter refused, and one example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """JSON-able: per filter the count and the example's problem, detail, question and text."""
        return {name: {"count": count, "example": self.examples[name]} for name, count in self.counts.items()}


def filter_samples(samples: Sequence[Trajectory], judge: Judge) -> tuple[list[Trajectory], Rejections]:
    """The samples that pass every filter, in order, and what became of the rest."""
    kept, rejections = list(samples), Rejections()
    for name, refuses in FILTERS.items():
        verdicts = refuses(kept, judge)
        refused = [one for one, bad in zip(kept, verdicts, strict=True) if bad]
        if refused:
            rejections.counts[name] = len(refused)
            rejections.examples[name] = _example(refused[0], judge.template)
        kept = [one for one, bad in zip(kept, verdicts, strict=True) if not bad]
    return kept, rejections


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


def made_turns(sample: Trajectory) -> list[list[int]]:
    """The tokens of each stretch that the model wrote."""
    pairs = zip(sample.tokens, sample.loss_mask, strict=True)
    return [[token for token, _ in turn] for made, turn in groupby(pairs, key=lambda pair: pair[1]) if made]


def _example(sample: Trajectory, template: ChatTemplate) -> dict[str, Any]:
    text = template.tokenizer.decode([token for turn in made_turns(sample) for token in turn])
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    question = next((str(m["content"]) for m in sample.messages if m["role"] == "user"), "")
    return {
        "problem_id": sample.problem_id,
        "sample": sample.sample,
        "stop_reason": sample.stop_reason,
        "detail": sample.detail,
        "prompt": question,
        "reply": text,
    }


# ----------------------------------------------------------------------------- the filters


def _not_judged(sample: Trajectory, judge: Judge) -> bool:
    return sample.reward is None


def _repetitive(sample: Trajectory, judge: Judge) -> bool:
    return any(is_repetitive(turn) for turn in made_turns(sample))


def _too_short(sample: Trajectory, judge: Judge) -> bool:
    return sample.generated_tokens < judge.min_tokens


def _truncated(sample: Trajectory, judge: Judge) -> bool:
    return sample.stop_reason is StopReason.TRUNCATED


def _malformed_reasoning(sample: Trajectory, judge: Judge) -> bool:
    if _unparsed(sample):
        return not _reasoned_well(sample, judge.template)
    return sample.enable_thinking and sample.well_formed and not thinks(sample)


def _wrong_answer(sample: Trajectory, judge: Judge) -> bool:
    return not sample.tools and sample.reward != 1.0 and sample.stop_reason is StopReason.ANSWERED


def _tool_protocol(sample: Trajectory, judge: Judge) -> bool:
    refused = sample.stop_reason is StopReason.MALFORMED
    return refused and (not _unparsed(sample) or _reasoned_well(sample, judge.template))


def _terminal_state(sample: Trajectory, judge: Judge) -> bool:
    answered = sample.stop_reason is StopReason.ANSWERED
    return sample.stop_reason is StopReason.TURNS_EXHAUSTED or (
        answered and bool(sample.tools) and sample.reward != 1.0
    )


def _unparsed(sample: Trajectory) -> bool:
    """Refused by the parser; what the environment refused had parsed."""
    return sample.stop_reason is StopReason.MALFORMED and not sample.well_formed


def _reasoned_well(sample: Trajectory, template: ChatTemplate) -> bool:
    """Whether the turn that the parser refused is in order up to a tool call, so that the fault is the call's."""
    last = made_turns(sample)[-1:]
    text = template.tokenizer.decode(last[0]) if last else ""
    parser = template.stream_parser(sample.tools, thinking=sample.enable_thinking)
    before, *quoted = text.split("<tool_call>")
    parser.feed(before)
    for after in quoted:
        parser.feed("<tool_call>")
        if parser.called:
            return parser.parsed.well_formed
        parser.feed(after)
    return False


def _low_reward(samples: Sequence[Trajectory], judge: Judge) -> list[bool]:
    # what did not parse has no last message to judge, and a filter of its own
    judged = [one for one in samples if one.well_formed]
    if judge.scorer is None or not judged:
        return [False] * len(samples)
    low = {id(one): score < judge.min_score for one, score in zip(judged, judge.scorer(judged), strict=True)}
    return [low.get(id(one), False) for one in samples]


def _each(refuses: Callable[[Trajectory, Judge], bool]) -> Callable[[Sequence[Trajectory], Judge], list[bool]]:
    return lambda samples, judge: [refuses(one, judge) for one in samples]


FILTERS: dict[str, Callable[[Sequence[Trajectory], Judge], list[bool]]] = {
    "not_judged": _each(_not_judged),
    "repetitive": _each(_repetitive),
    "too_short": _each(_too_short),
    "truncated": _each(_truncated),
    "malformed_reasoning": _each(_malformed_reasoning),
    "wrong_answer": _each(_wrong_answer),
    "low_reward": _low_reward,
    "tool_protocol": _each(_tool_protocol),
    "terminal_state": _each(_terminal_state),
}
