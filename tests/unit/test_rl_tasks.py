"""The tasks beside arithmetic and tools: every demonstration earns 1, something else 0, faults of judges are masked."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import (
    AlgebraTask,
    ArithmeticTask,
    CodeTask,
    CustomTask,
    GymTask,
    InstructionsTask,
    ProblemsRecipe,
    SandboxSpec,
    ScienceTask,
    ToolUseTask,
)
from glmctl.rl import problems as problems_module
from glmctl.rl import verifier
from glmctl.rl.environment import InfrastructureFailure, Problem, StopReason
from glmctl.rl.sandbox import boxes
from glmctl.rl.sandbox.execute import sandbox
from glmctl.rl.tasks import code, demonstrate, environment, generate, instructions, science, tool_use

needs_box = pytest.mark.skipif(
    all(boxes.missing(level) for level in ("B", "C")), reason="this machine offers no sandbox"
)


def level() -> SandboxSpec:
    return SandboxSpec(level="C" if boxes.missing("B") else "B")


def reward(problem: Problem, content: str) -> float | None:
    env = environment(problem)
    env.reset()
    transition = env.step({"role": "assistant", "content": content})
    assert transition.done
    assert transition.stop is StopReason.ANSWERED
    return transition.reward


def shown(problem: Problem) -> str:
    return str(demonstrate(problem).messages[-1]["content"])


def specs() -> list:
    found = [InstructionsTask(), InstructionsTask(constraints=3)]
    if importlib.util.find_spec("math_verify"):
        found.append(AlgebraTask())
    # some of the package's own narrow pins may be missing beside it
    with contextlib.suppress(ImportError):
        importlib.import_module("reasoning_gym")
        found.append(GymTask(dataset="chain_sum", config={"min_terms": 2, "max_terms": 3}))
    return found


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.type)
def test_demonstrations_earn_one_and_nonsense_nothing(spec) -> None:
    problems = generate(spec, 12, random.Random(0))
    assert problems == generate(spec, 12, random.Random(0))
    assert len({p.prompt for p in problems}) == 12
    for problem in problems:
        assert Problem.from_row(json.loads(json.dumps(problem.to_row())), "x:1") == problem
        assert reward(problem, shown(problem)) == 1.0
        # a gym score may give something for a well-formed try
        assert (reward(problem, "") or 0.0) < 0.1


@needs_box
def test_code_is_judged_by_hidden_cases() -> None:
    problems = generate(CodeTask(), 40, random.Random(1))
    assert {p.state["kind"] for p in problems} == set(code.KINDS)
    with sandbox(level()):
        for problem in problems[:12]:
            assert reward(problem, shown(problem)) == 1.0
        problem = problems[0]
        assert reward(problem, shown(problem).replace("return", "return None and")) == 0.0
        assert reward(problem, "```python\nwhile True: pass\n```") == 0.0
        assert reward(problem, "def f(x): return x") == 0.0
    assert code.written_code("a\n```py\nx\n```\nb\n```\ny\n```") == "y\n"


def test_a_slip_is_wrong_in_every_problem() -> None:
    """A hasty demonstration of code earns nothing: some hidden case sees its slip, and sees none in the other."""
    for problem in generate(CodeTask(max_value=250), 200, random.Random(3)):
        for hasty in (False, True):
            text = demonstrate_code(problem, hasty=hasty)
            scope: dict = {}
            exec(text, scope)
            passed = 0
            for arguments, expected in problem.state["cases"]:
                with contextlib.suppress(TypeError):
                    passed += scope["f"](*arguments) == expected
            assert (passed < len(problem.state["cases"])) == hasty, (problem.prompt, text)


def demonstrate_code(problem: Problem, *, hasty: bool) -> str:
    return str(code.written_code(str(code.demonstrate(problem, hasty=hasty).messages[-1]["content"])))


def test_a_guess_earns_nothing_even_where_it_is_right() -> None:
    for problem in generate(ToolUseTask(max_value=1), 30, random.Random(3)):
        (_, guess) = tool_use.demonstrate(problem, hasty=True).messages
        assert environment(problem).reset()
        assert reward(problem, guess["content"]) == 0.0
        assert reward(problem, str(problem.answer)) == 0.0


@pytest.mark.parametrize("task", [CodeTask(hasty=0.3), ToolUseTask(hasty=0.3), ArithmeticTask(terms=(3, 3), hasty=0.3)])
def test_the_share_of_hasty_demonstrations_is_the_recipes(task) -> None:
    recipe = ProblemsRecipe(name="p", task=task, train=300, heldout=20, cold_start=300, seed=5)
    problems = problems_module.generate(recipe)
    whole = recipe.model_copy(update={"task": task.model_copy(update={"hasty": 0.0})})
    hasty = sum(problems_module.show(p, recipe) != problems_module.show(p, whole) for p in problems)
    assert 0.22 < hasty / len(problems) < 0.38


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("1/2", True),
        ("0.5", True),
        ("x = 1/2", True),
        (r"$\frac{1}{2}$", True),
        ("2", False),
        ("", False),
        ("x", False),
    ],
)
def test_algebra_knows_equal_values(reply: str, right: int) -> None:
    pytest.importorskip("math_verify")
    assert reward(Problem("a", "algebra", "Solve 2x+0=1 for x.", "1/2"), reply) == float(right)


# --------------------------------------------------------------------------- instructions


def test_seven_kinds_of_constraints_and_each_check_can_say_yes_and_no() -> None:
    assert len(instructions.KINDS) == 7
    for name, one in instructions.REGISTRY.items():
        for seed in range(5):
            arguments = one.draw(random.Random(seed))
            assert one.ask.format(**arguments)
            assert one.check(one.example(**arguments), **arguments), name
            texts = [
                "",
                "a, B. C! river stone cloud garden lamp paper window bridge winter music 5\n- x",
                "1,.",
                "Aa.,",
            ]
            assert not all(one.check(text, **arguments) for text in texts), name


@pytest.mark.parametrize(
    ("name", "arguments", "text", "holds"),
    [
        ("keywords/frequency", {"word": "river", "n": 2}, "River, river; rivers", True),
        ("keywords/exclude", {"word": "river"}, "rivers flow", True),
        ("keywords/exclude", {"word": "river"}, " ", False),
        ("length/words_exactly", {"n": 3}, "a well-known fact", True),
        ("length/sentences", {"n": 2}, "One. Two!", True),
        ("length/sentences", {"n": 2}, "One... two", True),
        ("format/json", {}, '```json\n{"a": [1]}\n```', True),
        ("format/json", {}, "[1]", False),
        ("format/bullets", {"n": 2}, "- a\n-b\n- c", True),
        ("content/digits", {"n": 12}, "123 or 412", False),
        ("case/lower", {}, "123", False),
        ("position/ends", {"word": "lamp"}, "a Lamp.", True),
        ("punctuation/exclaim", {"n": 1}, "no", False),
    ],
)
def test_checks_by_hand(name: str, arguments: dict, text: str, holds: bool) -> None:
    assert instructions.obeys(text, [{"name": name, "arguments": arguments}]) is holds


def test_an_unknown_constraint_is_named() -> None:
    with pytest.raises(DataError, match="case/lower"):
        instructions.obeys("x", [{"name": "case/lowr", "arguments": {}}])


# --------------------------------------------------------------------------- science

ROWS = [
    {"question": f"Q{i}?", "choices": ["right", "wrong", "worse"], "answer": 0, "expert_verified": i % 2 == 0}
    for i in range(20)
] + [{"question": "Open?", "answer": "Two words"}]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "science.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_the_filter_keeps_expert_verified_multiple_choice_only(questions: str) -> None:
    strict = generate(ScienceTask(paths=[questions]), 10, random.Random(0))
    assert {p.prompt.split("?")[0] for p in strict} == {f"Q{i}" for i in range(0, 20, 2)}
    mixed = generate(ScienceTask(paths=[questions], filter="mixed"), 21, random.Random(0))
    assert len(mixed) == 21
    with pytest.raises(RecipeError, match="10 of 21 questions are left by filter 'expert_mcq', 11 are asked for"):
        generate(ScienceTask(paths=[questions]), 11, random.Random(0))
    assert len({p.answer for p in strict}) > 1  # shuffled
    assert all(p.verified for p in strict)
    assert sum(p.verified for p in mixed) == 10
    for problem in mixed:
        assert reward(problem, shown(problem)) == 1.0
        if not problem.state["open"]:
            line = next(part for part in problem.prompt.splitlines() if part.endswith("right"))
            assert line.startswith(str(problem.answer))


@pytest.mark.parametrize(
    ("content", "letter"),
    [("B", "B"), ("(b)", "B"), ("The answer is C.", "C"), (r"\boxed{D}", "D"), ("Because A\nAnswer: B", "B"),
     ("A banana", None), ("", None), ("answer is maybe", None)],
)  # fmt: skip
def test_letters(content: str, letter: str | None) -> None:
    assert science.chosen_letter(content) == letter


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({**ROWS[0], "answer": 3}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:2: 'answer'"):
        generate(ScienceTask(paths=[str(path)]), 1, random.Random(0))


# --------------------------------------------------------------------------- own verifiers (reliability R1)

VERIFIER = """
import ctypes, os, sys, time
def length(reply, problem): return float(len(reply) == problem["state"]["row"]["length"])
def raises(reply, problem): raise KeyError("x")
def hangs(reply, problem): time.sleep(600)
def eats(reply, problem): return float(len(bytearray(1 << 60)))
def killed(reply, problem): os.kill(os.getpid(), 9)
def crashes(reply, problem): ctypes.string_at(0)
def leaves(reply, problem): os._exit(0)
def exits(reply, problem): sys.exit(0)
def nan(reply, problem): return float("nan")
def inf(reply, problem): return float("inf")
def text(reply, problem): return "1.0"
def large(reply, problem): return 1e9
def huge(reply, problem): return 10**400
def low(reply, problem): return -1e9
def nothing(reply, problem): return None
def prints(reply, problem): print('{"value": 1.0}'); return 0.0
def tells(reply, problem): open(reply, "w").write(str(os.getpid())); return 0.0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "own_verifier.py").write_text(VERIFIER)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "length": i}) + "\n" for i in range(5)))
    paths = [str(tmp_path), *(p for p in sys.path if p)]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    verifier.stop()
    yield tmp_path
    verifier.stop()


def test_own_problems_are_judged_by_their_function(own: Path) -> None:
    spec = CustomTask(paths=[str(own / "rows.jsonl")], verifier="own_verifier:length")
    problems = generate(spec, 5, random.Random(0))
    for problem in problems:
        wanted = problem.state["row"]["length"]
        assert reward(problem, "x" * wanted) == 1.0
        assert reward(problem, "x" * (wanted + 1)) == 0.0


@pytest.mark.parametrize(
    "how",
    [
        "raises",
        "eats",
        "killed",
        "crashes",
        "leaves",
        "exits",
        "nan",
        "inf",
        "text",
        "large",
        "huge",
        "low",
        "nothing",
        "absent",
    ],
)
def test_a_verifiers_fault_is_infrastructure_and_the_next_one_works(own: Path, how: str) -> None:
    problem = Problem("p", "custom", "p", "", {"verifier": f"own_verifier:{how}", "row": {"length": 2}})
    with pytest.raises(InfrastructureFailure):
        reward(problem, "xx")
    assert verifier.verify("own_verifier:length", "xx", problem) == 1.0
    assert verifier.verify("own_verifier:prints", "xx", problem) == 0.0


def test_a_hanging_verifier_is_ended(own: Path) -> None:
    """At its own limit, in a new process too: what a start and an import may take is not added to it."""
    problem = Problem("p", "custom", "p", "", {"row": {"length": 2}})
    limit = 0.2
    for _ in range(2):  # the second hangs in the process that replaced the first
        began = time.monotonic()
        with pytest.raises(InfrastructureFailure, match=r"no verdict within 0.2 s"):
            verifier.verify("own_verifier:hangs", "xx", problem, limit=limit)
        # a loose bound for a busy machine, and far from START_SECONDS
        assert time.monotonic() - began < limit + 10 < verifier.START_SECONDS
    assert verifier.verify("own_verifier:length", "xx", problem) == 1.0


def test_an_import_has_the_time_of_a_start_and_its_hang_is_ended(own: Path, monkeypatch) -> None:
    problem = Problem("p", "custom", "p", "", {"row": {"length": 2}})
    (own / "slow_verifier.py").write_text("import time\ntime.sleep(1)\ndef zero(reply, problem): return 0.0\n")
    assert verifier.verify("slow_verifier:zero", "xx", problem, limit=0.9) == 0.0
    (own / "stuck_verifier.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(verifier, "START_SECONDS", 0.2)
    with pytest.raises(InfrastructureFailure, match=r"no import within 0.2 s"):
        verifier.verify("stuck_verifier:zero", "xx", problem)


def test_a_verifier_that_dies_between_two_questions_is_infrastructure(own: Path) -> None:
    problem = Problem("p", "custom", "p", "", {"row": {"length": 2}})
    verifier.verify("own_verifier:tells", str(own / "pid"), problem)
    pid = int((own / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(InfrastructureFailure, match="died"):
        verifier.verify("own_verifier:length", "xx", problem)
    assert verifier.verify("own_verifier:length", "xx", problem) == 1.0
