"""Our generation tasks: questions rendered by the model's chat template, replies judged by rules.

A problem of `glmctl.rl` becomes one question and one reply: its verifier judges the first turn.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from glmctl.data.chat import ChatTemplate
from glmctl.data.parsing import Parsed
from glmctl.errors import EnvironmentProblem
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.evaluation.documents import Row, as_dataset, means, shipped
from glmctl.evaluation.statistics import pass_at_k, powers_of_two
from glmctl.recipe.schema import ArithmeticTask, CodeTask, InstructionsTask, Sampling, Task, ToolUseTask
from glmctl.rl.environment import InfrastructureFailure, Problem
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import environment, generate
from glmctl.rl.tasks.function_calls import call_problem, step_wise_reward
from glmctl.rl.tasks.tool_use import TOOLS, expected_calls

GENERATED: dict[str, tuple[Task, int]] = {
    "arithmetic": (ArithmeticTask(), 100),
    "code": (CodeTask(), 60),
    "instructions": (InstructionsTask(), 100),
    "tool_use": (ToolUseTask(), 100),
}
"""what is asked when no problem file is given, and how many: a fixed set, whatever the run's seed"""

_EMPTY_THINK = re.compile(r"<think>\s*</think>")
Judge = Callable[[Row, str], dict[str, float]]
"""(document, reply) -> figures of it"""


@dataclass(frozen=True)
class Asking:
    """How questions are put, the same for all tasks."""

    template: ChatTemplate
    sampling: Sampling
    enable_thinking: bool = True
    problems: Sequence[Problem] = ()
    """those of problem files; none of a task's kind: the generated set"""
    samples: int = 1
    """replies to each question"""


def verified(name: str, asking: Asking) -> Row:
    """The config of a task whose problems have a verifier. `accuracy` is its mean reward, 0 for a broken format."""
    kind = OWN_TASKS[name].problems
    assert kind is not None
    given = [problem for problem in asking.problems if problem.task == kind]
    problems = given or generate(*GENERATED[kind], random.Random(derive_seed("glmctl eval", kind)))
    tools = TOOLS if kind == "tool_use" else None
    reward = first_call_reward if kind == "tool_use" else single_turn_reward

    def judge(doc: Row, reply: str) -> dict[str, float]:
        parsed = asking.template.parse(reply, tools, thinking=asking.enable_thinking)
        problem = problem_of(doc)
        return {
            "accuracy": reward(problem, parsed) if parsed.well_formed else 0.0,
            "well_formed": float(parsed.well_formed),
        }

    rows = [_document(problem, asking.template, enable_thinking=asking.enable_thinking) for problem in problems]
    return _generation(asking, rows, judge, ("accuracy", "well_formed"))


def nothink(asking: Asking) -> Row:
    """Obeyed: no reasoning, as `/nothink` asks, although the model can. Answered: something is said besides."""

    def judge(doc: Row, reply: str) -> dict[str, float]:
        visible = _EMPTY_THINK.sub("", reply)
        obeyed = "<think>" not in visible and "</think>" not in visible
        return {"obeyed": float(obeyed), "answered": float(bool(visible.strip()))}

    rows = [_document(one, asking.template, enable_thinking=False) for one in _asked(asking)]
    return _generation(asking, rows, judge, ("obeyed", "answered"))


def think(asking: Asking) -> Row:
    """Obeyed: a closed think block with something in it comes first. Answered: something is said after it."""

    def judge(doc: Row, reply: str) -> dict[str, float]:
        parsed = asking.template.parse(reply)
        obeyed = parsed.well_formed and bool((parsed.reasoning or "").strip())
        return {"obeyed": float(obeyed), "answered": float(bool(parsed.content.strip()))}

    rows = [_document(one, asking.template, enable_thinking=True) for one in _asked(asking)]
    return _generation(asking, rows, judge, ("obeyed", "answered"))


def chat(asking: Asking) -> Row:
    """Open questions in English and Chinese: what a judge compares. Alone it says only whether there is an answer."""

    def judge(doc: Row, reply: str) -> dict[str, float]:
        parsed = asking.template.parse(reply, thinking=asking.enable_thinking)
        return {"answered": float(bool(parsed.content.strip())), "well_formed": float(parsed.well_formed)}

    problems = [Problem(f"chat/{n}", "question", row["prompt"], 0) for n, row in enumerate(shipped("chat.jsonl"))]
    rows = [_document(one, asking.template, enable_thinking=asking.enable_thinking) for one in problems]
    return _generation(asking, rows, judge, ("answered", "well_formed"))


def single_turn_reward(problem: Problem, parsed: Parsed) -> float:
    """The reward of ending the episode with this reply; 0 when the environment would go on.

    EnvironmentProblem when the verifier or its sandbox failed: that says nothing about the reply.
    """
    episode = environment(problem)
    episode.reset()
    try:
        transition = episode.step(parsed.message())
    except InfrastructureFailure as error:
        raise EnvironmentProblem(
            f"problem {problem.id} could not be judged: {error}", hint="the same command goes on from here"
        ) from error
    return transition.reward if transition.done and transition.reward is not None else 0.0


def first_call_reward(problem: Problem, parsed: Parsed) -> float:
    """1 iff the first call obeys the protocol and equals the first one that the problem needs, in every field."""
    if not parsed.tool_calls:
        return 0.0
    call = parsed.tool_calls[0]
    return step_wise_reward(call_problem(call, TOOLS) is None, call, expected_calls(problem)[0])


def problem_of(doc: Mapping[str, str]) -> Problem:
    """The problem that a document carries."""
    return Problem.from_row(json.loads(doc["problem"]), f"document {doc['id']}")


def generation_kwargs(sampling: Sampling) -> Row:
    """A recipe's sampling in lm-eval's words. The end tokens stop every model; no other string does."""
    kwargs: Row = {"until": [], "max_gen_toks": sampling.max_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        kwargs |= sampling.model_dump(exclude={"max_tokens"})
    return kwargs


def _asked(asking: Asking) -> list[Problem]:
    if asking.problems:
        return list(asking.problems)
    rows = shipped("questions.jsonl")
    return [Problem(f"question/{row['prompt']}", "question", row["prompt"], 0) for row in rows]


def _document(problem: Problem, template: ChatTemplate, *, enable_thinking: bool) -> Row:
    """The prompt as the model sees it. The problem itself is a JSON string: rows of one column must be alike."""
    if problem.task == "question":
        messages, tools = [{"role": "user", "content": problem.prompt}], None
    else:
        messages, tools = environment(problem).reset()
    prompt = template.render(messages, tools, add_generation_prompt=True, enable_thinking=enable_thinking)
    row = json.dumps(problem.to_row(), ensure_ascii=False)
    question = str(messages[-1]["content"])
    return {"id": problem.id, "question": question, "prompt": prompt, "target": str(problem.answer), "problem": row}


def _generation(asking: Asking, rows: list[Row], judge: Judge, metrics: tuple[str, ...]) -> Row:
    """A generation task of `rows`; with several samples the first metric also gets avg@n and pass@k."""
    samples, main = asking.samples, metrics[0]

    def process_results(doc: Row, results: list[list[str]]) -> dict[str, float]:
        (replies,) = results
        judged = [judge(doc, reply) for reply in replies]
        figures = {name: sum(one[name] for one in judged) / samples for name in metrics}
        if samples > 1:
            correct = sum(one[main] >= 1.0 for one in judged)
            figures |= {f"pass@{k}": pass_at_k(samples, correct, k) for k in powers_of_two(samples)}
            figures[f"avg@{samples}"] = figures[main]
        return figures

    beside = [*(f"pass@{k}" for k in powers_of_two(samples)), f"avg@{samples}"] if samples > 1 else []
    return {
        **as_dataset(rows),
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "process_results": process_results,
        "metric_list": means(*metrics, *beside),
        "generation_kwargs": generation_kwargs(asking.sampling),
        "repeats": samples,
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": samples}]}],
    }
