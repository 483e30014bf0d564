"""Rejection filters: each refuses its crafted case and only that, in the report's order."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmctl.distill.filters import FILTERS, filter_samples, first_rejection, is_repetitive
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def sample(**changes) -> Trajectory:
    """A verified, well-formed answer with reasoning."""
    made = random.Random(0).sample(range(100), 20)
    good = Trajectory(
        "p",
        "arithmetic",
        0,
        0,
        tokens=[1, 2, 3, *made],
        loss_mask=[0] * 3 + [1] * 20,
        logprobs=[0.0] * 23,
        reward=1.0,
        stop_reason=StopReason.ANSWERED,
        well_formed=True,
        messages=[
            {"role": "user", "content": "?"},
            {"role": "assistant", "reasoning_content": "because", "content": "5"},
        ],
    )
    return dataclasses.replace(good, **changes)


def answer(**changes) -> list[dict]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "5", **changes}]


CASES = {
    "not_judged": sample(reward=None, stop_reason=StopReason.INFRASTRUCTURE, well_formed=False),
    "repetitive": sample(tokens=[1, 2, 3] + [7, 8, 9, 10] * 5),
    "too_short": sample(tokens=[1, 2, 3, 4, 5], loss_mask=[0, 0, 0, 1, 1]),
    "truncated": sample(stop_reason=StopReason.TRUNCATED, reward=0.0, well_formed=False),
    "malformed_reasoning": sample(messages=answer()),
    "wrong_answer": sample(reward=0.0),
    "tool_protocol": sample(tools=TOOLS, stop_reason=StopReason.MALFORMED, reward=0.0),
    "terminal_state": sample(tools=TOOLS, stop_reason=StopReason.TURNS_EXHAUSTED, reward=0.0),
}


def test_there_is_a_case_for_every_filter_and_the_order_is_the_reports() -> None:
    assert list(CASES) == list(FILTERS)


@pytest.mark.parametrize("name", CASES)
def test_each_filter_refuses_its_case(name: str) -> None:
    assert first_rejection(CASES[name], min_tokens=4) == name


def test_good_samples_pass() -> None:
    for good in (sample(), sample(tools=TOOLS), sample(enable_thinking=False, messages=answer())):
        assert first_rejection(good, min_tokens=20) is None


def test_what_makes_reasoning_malformed() -> None:
    for bad in (
        sample(well_formed=False, reward=0.0, stop_reason=StopReason.MALFORMED),
        sample(messages=answer(reasoning_content=" ")),
        sample(messages=[*answer(reasoning_content="x"), *answer()]),
    ):
        assert first_rejection(bad, min_tokens=4) == "malformed_reasoning"


def test_a_wrong_final_answer_after_good_tool_calls_misses_the_terminal_state() -> None:
    assert first_rejection(sample(tools=TOOLS, reward=0.0), min_tokens=4) == "terminal_state"


def test_counts_and_one_example_of_each_are_kept() -> None:
    first = dataclasses.replace(CASES["wrong_answer"], problem_id="first")
    kept, rejections = filter_samples([first, sample(), *CASES.values()], min_tokens=4)
    assert len(kept) == 1
    assert rejections.counts == {"wrong_answer": 2} | {name: 1 for name in CASES if name != "wrong_answer"}
    row = json.loads(json.dumps(rejections.to_row()))
    assert row["wrong_answer"]["count"] == 2
    assert row["wrong_answer"]["example"]["problem_id"] == "first"
    assert sum(entry["count"] for entry in row.values()) + len(kept) == 2 + len(CASES)


def test_repetition_inside_the_prompt_is_not_the_models() -> None:
    one = sample()
    long_prompt = [5] * 50
    one = dataclasses.replace(one, tokens=long_prompt + one.tokens[3:], loss_mask=[0] * 50 + [1] * 20)
    assert first_rejection(one, min_tokens=4) is None


def test_repetition_is_not_looked_for_across_turns() -> None:
    """The same short call in four turns is a bad plan, not a loop of the sampler."""
    one = sample(tokens=[0, *[1, 2, 3, 4, 9] * 4], loss_mask=[0, *([1] * 4 + [0]) * 4])
    assert first_rejection(one, min_tokens=4) is None


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([1] * 16, True),
        ([1] * 15, False),
        ([1, 2] * 8, True),
        ([1, 2] * 7, False),
        (list(range(10)) * 4, True),
        (list(range(10)) * 3, False),
        ([5, 6, *([1, 2, 3, 4] * 4), 7, 8], True),
        (list(range(64)) * 4, True),
        ([], False),
    ],
)
def test_a_loop_is_four_times_the_same_over_sixteen_tokens(tokens: list[int], loop: bool) -> None:
    assert is_repetitive(tokens) is loop


@given(st.lists(st.integers(0, 2), max_size=80))
def test_the_loop_detector_agrees_with_its_definition(tokens: list[int]) -> None:
    n = len(tokens)
    naive = any(
        n >= start + span and all(tokens[i] == tokens[i - period] for i in range(start + period, start + span))
        for period in range(1, min(64, n // 4) + 1)
        for span in [max(4 * period, 16)]
        for start in range(n)
    )
    assert is_repetitive(tokens) is naive
