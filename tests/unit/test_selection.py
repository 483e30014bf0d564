"""Prompt selection, response scaling, and the two-sided mixture."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill.mixture import direct, epochs, mix, repeat, thinking
from glmctl.distill.select import preferences, select
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory


def sample(prompt: str, length: int, mark: int = 0) -> Trajectory:
    tokens = [mark, *range(length)]
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "reasoning_content": "2+3=5", "content": "5"},
    ]
    return Trajectory(
        prompt,
        "arithmetic",
        0,
        mark,
        tokens=tokens,
        loss_mask=[0] + [1] * length,
        reward=1.0,
        stop_reason=StopReason.ANSWERED,
        messages=messages,
    )


def test_the_prompts_with_the_shortest_responses_go() -> None:
    """By the mean over a prompt's samples: a has 20, b 5, c 12, d 11."""
    samples = [
        *(sample("a", length, mark) for mark, length in enumerate((10, 30))),
        *(sample("b", length, mark) for mark, length in enumerate((5, 5))),
        *(sample("c", length, mark) for mark, length in enumerate((4, 20))),
        sample("d", 11),
    ]
    assert [s.problem_id for s in select(samples, hard_fraction=0.5, responses_per_prompt=4)] == ["a", "a", "c", "c"]
    assert {s.problem_id for s in select(samples, hard_fraction=0.6, responses_per_prompt=4)} == {"a", "c", "d"}
    assert select(samples, hard_fraction=1.0, responses_per_prompt=4) == samples


def test_responses_are_limited_and_copies_are_left_out() -> None:
    samples = [sample("a", 5, 0), sample("a", 5, 0), sample("a", 5, 1), sample("a", 5, 2), sample("a", 5, 3)]
    chosen = select(samples, hard_fraction=1.0, responses_per_prompt=3)
    assert [s.tokens[0] for s in chosen] == [0, 1, 2]
    assert chosen[0] is samples[0]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_the_share_of_direct_conversations_is_exact_and_reproducible(share: float, count: int) -> None:
    samples = [sample(f"p{i}", 5) for i in range(10)]
    rows = mix(samples, share, seed=4)
    assert sum(not row.enable_thinking for row in rows) == count
    assert [row.messages[0]["content"] for row in rows] == [f"p{i}" for i in range(10)]
    assert rows == mix(samples, share, seed=4)


def test_a_direct_conversation_has_the_same_answer_and_no_reasoning(tiny_tokenizer: Tokenizer) -> None:
    one = sample("Compute 2+3.", 5)
    template = ChatTemplate(tiny_tokenizer)
    texts = [
        template.render(row.messages, row.tools, enable_thinking=row.enable_thinking)
        for row in (thinking(one), direct(one))
    ]
    assert texts[0].endswith("Compute 2+3.<|assistant|>\n<think>2+3=5</think>\n5")
    assert texts[1].endswith("Compute 2+3./nothink<|assistant|>\n<think></think>\n5")
    # the trajectory itself keeps its reasoning
    assert one.messages[1]["reasoning_content"] == "2+3=5"


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 10**6), min_size=1),
    st.data(),
)
def test_a_mixture_has_its_shares_and_shows_everything_at_least_once(tokens: dict[str, int], data) -> None:
    shares = {name: data.draw(st.floats(0.01, 1.0)) for name in tokens}
    times = epochs(tokens, shares)
    assert min(times.values()) == 1.0
    total = sum(times[name] * tokens[name] for name in tokens)
    for name in tokens:
        assert times[name] * tokens[name] / total == pytest.approx(shares[name] / sum(shares.values()))


def test_without_shares_everything_is_shown_once() -> None:
    assert epochs({"a": 3, "b": 900}, {}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("times", [1.0, 1.3, 2.0, 2.55])
def test_a_part_is_repeated_as_evenly_as_it_can_be(times: float) -> None:
    rows = mix([sample(f"p{i}", 5) for i in range(20)], 0.0, seed=0)
    shown = repeat(rows, times, seed=1)
    assert len(shown) == round(20 * times)
    counts = [shown.count(row) for row in rows]
    assert max(counts) - min(counts) <= 1
    assert shown == repeat(rows, times, seed=1)
    if times == 1.0:
        assert shown == rows


def test_pairs_are_a_kept_and_a_refused_answer_of_one_prompt() -> None:
    def one(prompt: str, number: int, **changes: Any) -> Trajectory:
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"{prompt}{number}"}]
        return Trajectory(prompt, "t", 0, number, **{"messages": said, "well_formed": True, **changes})

    samples = [one("a", 0), one("a", 1), one("a", 2), one("b", 0), one("c", 0), one("c", 1, well_formed=False)]
    kept = [samples[1], samples[3], samples[4]]
    assert [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in preferences(kept, samples)] == [
        ("a1", "a0")
    ]
