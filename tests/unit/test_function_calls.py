"""The rewards of spec section 3.5: step-wise equality with the reference call, and end to end."""

from __future__ import annotations

import pytest

from glmctl.rl.tasks.function_calls import call_problem, end_to_end_reward, same_call, step_wise_reward

EXPECTED = {"name": "f", "arguments": {"a": 1, "b": ["x", {"c": 2.5}]}}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "g"},
        {"arguments": {"a": 1}},
        {"arguments": {"a": 2, "b": ["x", {"c": 2.5}]}},
        {"arguments": {"a": 1, "b": ["x", {"c": 2.5}], "d": None}},
        {"arguments": {"a": "1", "b": ["x", {"c": 2.5}]}},
        {"arguments": {"a": 1.0, "b": ["x", {"c": 2.5}]}},
        {"arguments": {"a": True, "b": ["x", {"c": 2.5}]}},
        {"arguments": {"a": 1, "b": [{"c": 2.5}, "x"]}},
        {"arguments": {"a": 1, "b": ["x", {"c": 2.5}, None]}},
        {"arguments": None},
    ],
)
def test_step_wise_reward_needs_name_parameters_and_every_field(change: dict) -> None:
    assert step_wise_reward(True, {**EXPECTED, **change}, EXPECTED) == 0.0


def test_step_wise_reward_of_the_reference_call_needs_the_format_too() -> None:
    reordered = {"arguments": dict(reversed(EXPECTED["arguments"].items())), "name": "f"}
    assert step_wise_reward(True, reordered, EXPECTED) == 1.0
    assert step_wise_reward(False, reordered, EXPECTED) == 0.0
    assert same_call(EXPECTED, EXPECTED)


@pytest.mark.parametrize(
    ("formats", "completed", "reward"),
    [([True, True], True, 1.0), ([True, False], True, 0.0), ([True], False, 0.0), ([], True, 1.0)],
)
def test_end_to_end_reward_is_the_conjunction(formats: list[bool], completed: bool, reward: float) -> None:
    assert end_to_end_reward(formats, completed) == reward


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("string", "3", 3),
        ("integer", 3, "3"),
        ("integer", -3, 3.5),
        ("integer", 3, True),
        ("number", 3.5, "3.5"),
        ("number", 3, float("nan")),
        ("boolean", True, 1),
        ("array", [1], {"0": 1}),
        ("object", {}, []),
        ("null", None, False),
        (["string", "null"], None, 1),
    ],
)
def test_argument_types_follow_the_schema(kind: object, good: object, bad: object) -> None:
    tool = {"name": "f", "parameters": {"properties": {"x": {"type": kind}}}}
    assert call_problem({"name": "f", "arguments": {"x": good}}, [tool]) is None
    assert "'x' must be" in str(call_problem({"name": "f", "arguments": {"x": bad}}, [tool]))


def test_optional_parameters_may_be_left_out_and_untyped_ones_hold_anything() -> None:
    schema = {"properties": {"x": {}, "y": {"type": "string"}}, "required": ["x"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert call_problem({"name": "f", "arguments": {"x": [1]}}, tools) is None
    assert "missing" in str(call_problem({"name": "f", "arguments": {"y": "a"}}, tools))
    assert "not a mapping" in str(call_problem({"name": "f", "arguments": "x"}, tools))
