"""Tasks: their own environment verifies their own demonstrations, and nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.conversations import conversation_of
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import ArithmeticTask, ProblemsRecipe, ToolUseTask
from glmctl.rl import problems
from glmctl.rl.environment import InfrastructureFailure, Problem, StopReason, Transition, read_problems
from glmctl.rl.tasks import arithmetic, demonstrate, environment, tool_use
from glmctl.run.directory import Run

SPECS = {
    "arithmetic": ArithmeticTask(terms=(2, 4), operators="+-*"),
    "tool_use": ToolUseTask(),
}


def make(task: str, count: int, seed: int = 0) -> list[Problem]:
    module = {"arithmetic": arithmetic, "tool_use": tool_use}[task]
    return module.generate(SPECS[task], count, random.Random(seed))


def replay(problem: Problem, messages: list[dict]) -> Transition:
    """Feed the assistant turns to a fresh environment and check that it answers with the demonstration's results."""
    episode = environment(problem)
    opening, _ = episode.reset()
    assert messages[: len(opening)] == opening
    at = len(opening)
    while True:
        transition = episode.step(messages[at])
        if transition.done:
            assert at == len(messages) - 1
            return transition
        assert messages[at + 1 : at + 1 + len(transition.messages)] == transition.messages
        at += 1 + len(transition.messages)


def answer(content: str) -> dict:
    return {"role": "assistant", "content": content}


def call(name: str, /, **arguments: object) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("task", SPECS)
def test_every_demonstration_earns_reward_one(task: str) -> None:
    for problem in make(task, 400):
        demonstration = demonstrate(problem)
        assert replay(problem, demonstration.messages).reward == 1.0
        # every model turn shows reasoning, and the row is one that the reader of conversations accepts
        assert all(m["reasoning_content"] for m in demonstration.messages if m["role"] == "assistant")
        assert conversation_of(demonstration.row()) == demonstration


@pytest.mark.parametrize("task", SPECS)
def test_generation_is_a_function_of_the_seed_with_distinct_prompts(task: str) -> None:
    first, again, other = make(task, 200, 1), make(task, 200, 1), make(task, 200, 2)
    assert first == again
    assert first != other
    assert len({p.prompt for p in first}) == len({p.id for p in first}) == 200


def test_arithmetic_is_worked_left_to_right_and_agrees_with_python() -> None:
    assert arithmetic.work("34+57-12") == (["34+57=91", "91-12=79"], 79)
    assert arithmetic.work("3-9-4") == (["3-9=-6", "-6-4=-10"], -10)
    for problem in make("arithmetic", 500):
        expression = problem.prompt.removeprefix("Compute ").removesuffix(".")
        assert eval(expression) == problem.answer
        assert "*" not in expression or len(arithmetic.work(expression)[0]) == 1


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        ("79", 1.0), (" 79.\n", 1.0), ("+79", 1.0), ("80", 0.0), ("-79", 0.0), ("79.0", 0.0), ("79..", 0.0),
        ("", 0.0), ("The answer is 79", 0.0), ("79 80", 0.0), ("7 9", 0.0), ("79e0", 0.0), ("7_9", 0.0),
        ("\u0667\u0669", 0.0), ("9" * 5000, 0.0),
    ],
)  # fmt: skip
def test_arithmetic_answers_are_verified_exactly(content: str, reward: float) -> None:
    problem = Problem("arithmetic/34+57-12", "arithmetic", "Compute 34+57-12.", 79)
    transition = environment(problem).step(answer(content))
    assert (transition.reward, transition.done, transition.stop) == (reward, True, StopReason.ANSWERED)


def test_a_tool_call_where_no_tools_are_offered_is_malformed() -> None:
    transition = environment(make("arithmetic", 1)[0]).step(call("stock", item="47", shop="3"))
    assert (transition.reward, transition.stop) == (0.0, StopReason.MALFORMED)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_wrong_final_answers_earn_nothing(seed: int) -> None:
    for task in SPECS:
        problem = make(task, 1, seed)[0]
        demonstration = demonstrate(problem)
        wrong = [*demonstration.messages[:-1], answer(str(problem.answer + 1))]
        assert replay(problem, wrong).reward == 0.0


def test_a_right_answer_without_the_lookups_earns_nothing() -> None:
    """The terminal state is part of the reward: a lucky guess did not complete the task."""
    for problem in make("tool_use", 50):
        episode = environment(problem)
        episode.reset()
        assert episode.step(answer(str(problem.answer))).reward == 0.0


def test_other_lookups_do_not_stand_in_for_the_needed_ones() -> None:
    problem = next(p for p in make("tool_use", 50) if p.state["kind"] == "stock")
    other = next(shop for shop in tool_use.CODES if shop != problem.state["shop"])
    episode = environment(problem)
    episode.reset()
    assert not episode.step(call("stock", item=problem.state["item"], shop=other, day=problem.state["day"])).done
    assert episode.step(answer(str(problem.answer))).reward == 0.0


@pytest.mark.parametrize(
    "turn",
    [
        call("stok", item="4", shop="3", day="1"),
        call("stock", item="4", day="1"),
        call("stock", item="4", shop="3", day="1", when="now"),
        call("stock", item="4", shop=3, day="1"),
        call("price", item="4", shop="3", count="3"),
        call("price", item="4", shop="3", count=True),
        call("price", item="4", shop="3", count=3.0),
        call("shop"),
        {**call("shop"), "tool_calls": [{"function": {"name": "shop", "arguments": ["Ann"]}}]},
    ],
)
def test_a_call_that_breaks_the_protocol_halts_with_reward_zero(turn: dict) -> None:
    """Spec section 3.4: bad tool format halts the rollout with reward 0."""
    episode = environment(make("tool_use", 1)[0])
    episode.reset()
    transition = episode.step(turn)
    assert (transition.done, transition.reward, transition.stop) == (True, 0.0, StopReason.MALFORMED)


def test_parallel_calls_are_answered_in_order_and_one_bad_call_halts_them_all() -> None:
    problem = make("tool_use", 1)[0]
    both = call("shop", owner="2")
    both["tool_calls"] += call("price", item="4", shop="3", count=2)["tool_calls"]
    episode = environment(problem)
    episode.reset()
    transition = episode.step(both)
    assert [m["role"] for m in transition.messages] == ["tool", "tool"]
    assert transition.messages[0]["content"] in tool_use.CODES
    both["tool_calls"] += call("nothing")["tool_calls"]
    assert episode.step(both).stop is StopReason.MALFORMED


def test_unknown_values_are_an_observation_not_an_end() -> None:
    episode = environment(make("tool_use", 1)[0])
    episode.reset()
    for turn in (
        call("stock", item="unicorn", shop="3", day="1"),
        call("price", item="4", shop="3", count=10**30),
        call("shop", owner="?"),
    ):
        transition = episode.step(turn)
        assert not transition.done
        assert transition.messages[0]["content"].startswith("error")


def test_answers_depend_on_the_hidden_seed() -> None:
    """The same question has many answers, so it cannot be answered by heart."""
    problem = next(p for p in make("tool_use", 50) if p.state["kind"] == "local")
    answers = set()
    for seed in range(20):
        twin = Problem(problem.id, problem.task, problem.prompt, 0, {**problem.state, "seed": seed})
        answers.add(demonstrate(twin).messages[-1]["content"])
    assert len(answers) > 5


def test_the_whole_space_can_be_asked_for_and_not_one_more() -> None:
    spec = ArithmeticTask(terms=(2, 2), max_value=3, operators="+-")
    everything = arithmetic.generate(spec, 32, random.Random(0))
    assert len({p.prompt for p in everything}) == 32
    with pytest.raises(RecipeError, match="32 different expressions"):
        arithmetic.generate(spec, 33, random.Random(0))
    with pytest.raises(RecipeError, match="at most"):
        tool_use.generate(ToolUseTask(max_value=5), 10_000, random.Random(0))


def test_products_of_three_terms_are_refused() -> None:
    with pytest.raises(RecipeError, match="two-term"):
        arithmetic.generate(ArithmeticTask(terms=(2, 3), operators="*"), 1, random.Random(0))


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "1", 1e9, None, 1])
def test_a_reward_that_is_no_reward_is_a_failure_of_the_environment(reward: object) -> None:
    with pytest.raises(InfrastructureFailure):
        Transition([], reward, True, StopReason.ANSWERED)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: a problem is a JSON object"),
        ('{"id": "a", "task": "arithmetic", "prompt": "p"}', ":2: 'answer' must be int"),
        ('{"id": "a", "task": "arithmetic", "prompt": "p", "answer": true}', ":2: 'answer' must be int"),
        ('{"id": "a", "task": "t", "prompt": "p", "answer": 1, "state": 3}', ":2: 'state' must be an object"),
    ],
)
def test_a_damaged_problem_file_is_named_with_its_line(tmp_path, line: str, what: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "a", "task": "arithmetic", "prompt": "p", "answer": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=what):
        read_problems(path)


def test_a_tool_use_problem_without_its_state_is_bad_data() -> None:
    with pytest.raises(DataError, match="state"):
        environment(Problem("x", "tool_use", "Stock of item 4 shop 3 day 1?", 1, {"kind": "stock", "seed": 1}))


@pytest.mark.parametrize("task", SPECS)
def test_the_stage_writes_disjoint_files_reproducibly(tmp_path, task: str) -> None:
    recipe = ProblemsRecipe(name="p", task=SPECS[task], train=120, heldout=40, cold_start=50, seed=3)
    contents = []
    for name in ("a", "b"):
        with Run.open(recipe, tmp_path / name) as run:
            summary = problems.run(recipe, run)
        files = {p.name: p.read_bytes() for p in sorted((tmp_path / name / "export").glob("*.jsonl"))}
        contents.append(files)
    assert contents[0] == contents[1]
    assert (summary["train"], summary["heldout"], summary["cold_start"]) == (120, 40, 50)
    train = read_problems(tmp_path / "a" / "export" / "train.jsonl")
    heldout = read_problems(tmp_path / "a" / "export" / "heldout.jsonl")
    assert (len(train), len(heldout)) == (120, 40)
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert [environment(p).reset()[0] for p in train]
