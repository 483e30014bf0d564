"""Rejection filters: each refuses its crafted case and only that, in the report's order."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import styled
from glmctl.distill.filters import FILTERS, Judge, filter_samples, is_repetitive
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


@pytest.fixture(scope="module")
def judge(tiny_tokenizer: Tokenizer) -> Judge:
    """A reward model that only dislikes the answer "nonsense"."""

    def scorer(samples):
        return [-1.0 if s.messages[-1]["content"] == "nonsense" else 1.0 for s in samples]

    return Judge(ChatTemplate(tiny_tokenizer), min_tokens=4, scorer=scorer)


def wrote(judge: Judge, text: str, closer: str = "<|user|>", **changes) -> Trajectory:
    """A sample whose only turn is `text` and which the episode has found malformed."""
    tokenizer = judge.template.tokenizer
    parts = re.split(r"(<[/|]?[a-z_|]+>)", text)
    made = [t for p in parts for t in ([tokenizer.id(p)] if p in tokenizer.added_tokens else tokenizer.encode_plain(p))]
    made.append(tokenizer.id(closer))
    malformed = {"stop_reason": StopReason.MALFORMED, "well_formed": False, "reward": 0.0, "messages": answer()[:1]}
    return sample(**{"tokens": [1, *made], "loss_mask": [0] + [1] * len(made), **malformed, **changes})


def broken_call(judge: Judge) -> Trajectory:
    text = "\n<think>use it</think>\n<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>"
    return wrote(judge, text, "<|observation|>", tools=TOOLS)


CASES = {
    "not_judged": lambda judge: sample(reward=None, stop_reason=StopReason.INFRASTRUCTURE, well_formed=False),
    "repetitive": lambda judge: sample(tokens=[1, 2, 3] + [7, 8, 9, 10] * 5),
    "too_short": lambda judge: sample(tokens=[1, 2, 3, 4, 5], loss_mask=[0, 0, 0, 1, 1]),
    "truncated": lambda judge: sample(stop_reason=StopReason.TRUNCATED, reward=0.0, well_formed=False),
    "malformed_reasoning": lambda judge: wrote(judge, "\n<think>never closed, and then what"),
    "wrong_answer": lambda judge: sample(reward=0.0),
    "low_reward": lambda judge: sample(messages=answer(reasoning_content="x", content="nonsense")),
    "tool_protocol": broken_call,
    "terminal_state": lambda judge: sample(tools=TOOLS, stop_reason=StopReason.TURNS_EXHAUSTED, reward=0.0),
}


def refused_by(one: Trajectory, judge: Judge) -> list[str]:
    """Every filter that refuses the sample, each asked alone."""
    return [name for name, refuses in FILTERS.items() if refuses([one], judge) == [True]]


def test_there_is_a_case_for_every_filter_and_the_order_is_the_reports() -> None:
    assert list(CASES) == list(FILTERS)


@pytest.mark.parametrize("name", CASES)
def test_each_filter_refuses_its_case_and_only_it(judge: Judge, name: str) -> None:
    assert refused_by(CASES[name](judge), judge) == [name]


def test_good_samples_pass_every_filter(judge: Judge) -> None:
    for good in (sample(), sample(tools=TOOLS), sample(enable_thinking=False, messages=answer())):
        assert refused_by(good, dataclasses.replace(judge, min_tokens=20)) == []


def test_what_makes_reasoning_malformed(judge: Judge) -> None:
    for bad in (
        wrote(judge, "\n5 is what comes out"),
        wrote(judge, "\n<think>x</think>\n5</think>"),
        # closed as if it had called a tool
        wrote(judge, "\n<think>x</think>\n5", "<|observation|>"),
        # the thought before the call is what is broken
        wrote(judge, "\n<think>x<think>\n<tool_call>f</tool_call>", tools=TOOLS),
        sample(messages=answer()),
        sample(messages=answer(reasoning_content=" ")),
        sample(messages=[*answer(reasoning_content="x"), *answer()]),
    ):
        assert refused_by(bad, judge) == ["malformed_reasoning"]


def test_what_breaks_the_tool_protocol(judge: Judge) -> None:
    for bad in (
        wrote(judge, "\n<think>x</think>\n<tool_call>f\n", "<|observation|>", tools=TOOLS),
        # a call after which the model hands over to the user
        wrote(judge, "\n<think>x</think>\n<tool_call>f\n</tool_call>", tools=TOOLS),
        # the environment refused the call: an unknown tool, a missing argument
        sample(tools=TOOLS, stop_reason=StopReason.MALFORMED, reward=0.0),
    ):
        assert refused_by(bad, judge) == ["tool_protocol"]


def test_a_call_that_the_reasoning_quotes_is_no_fault_of_the_reasoning(judge: Judge) -> None:
    quoted = "\n<think>so I write <tool_call>f</tool_call> now</think>\n"
    bad_call = wrote(judge, quoted + "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>", "<|observation|>", tools=TOOLS)
    assert refused_by(bad_call, judge) == ["tool_protocol"]
    assert refused_by(wrote(judge, quoted.removesuffix("</think>\n"), tools=TOOLS), judge) == ["malformed_reasoning"]
    as_json = dataclasses.replace(judge, template=ChatTemplate(judge.template.tokenizer, styled("json")))
    bad_json = wrote(judge, quoted + "<tool_call>{}</tool_call>", "<|observation|>", tools=TOOLS)
    assert refused_by(bad_json, as_json) == ["tool_protocol"]


def test_a_wrong_final_answer_after_good_tool_calls_misses_the_terminal_state(judge: Judge) -> None:
    assert refused_by(sample(tools=TOOLS, reward=0.0), judge) == ["terminal_state"]


def test_without_a_reward_model_nothing_is_refused_by_it(judge: Judge) -> None:
    one = CASES["low_reward"](judge)
    assert refused_by(one, dataclasses.replace(judge, scorer=None)) == []
    assert refused_by(one, dataclasses.replace(judge, min_score=-2.0)) == []


def test_counts_and_one_example_of_each_are_kept(judge: Judge) -> None:
    cases = {name: make(judge) for name, make in CASES.items()}
    first = dataclasses.replace(cases["wrong_answer"], problem_id="first")
    kept, rejections = filter_samples([first, sample(), *cases.values()], judge)
    assert kept == [sample()]
    assert rejections.counts == {"wrong_answer": 2} | {name: 1 for name in CASES if name != "wrong_answer"}
    row = json.loads(json.dumps(rejections.to_row()))
    assert row["wrong_answer"]["count"] == 2
    assert row["wrong_answer"]["example"]["problem_id"] == "first"
    assert "never closed" in row["malformed_reasoning"]["example"]["reply"]
    assert sum(entry["count"] for entry in row.values()) + len(kept) == 2 + len(CASES)


def test_a_sample_with_several_faults_counts_under_the_first(judge: Judge) -> None:
    loop = sample(tokens=[1, 2, 3] + [7, 8, 9, 10] * 5, stop_reason=StopReason.TRUNCATED, reward=0.0)
    assert filter_samples([loop], judge)[1].counts == {"repetitive": 1}


def test_repetition_inside_the_prompt_is_not_the_models(judge: Judge) -> None:
    one = sample()
    long_prompt = [5] * 50
    one = dataclasses.replace(one, tokens=long_prompt + one.tokens[3:], loss_mask=[0] * 50 + [1] * 20)
    assert refused_by(one, judge) == []


def test_repetition_is_not_looked_for_across_turns(judge: Judge) -> None:
    """The same short call in four turns is a bad plan, not a loop of the sampler."""
    one = sample(tokens=[0, *[1, 2, 3, 4, 9] * 4], loss_mask=[0, *([1] * 4 + [0]) * 4])
    assert refused_by(one, judge) == []


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
