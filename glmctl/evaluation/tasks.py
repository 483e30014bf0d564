"""Our offline lm-eval tasks, built from problem files and from the small sets in `data/`.

Prompts are rendered by the caller's chat template and stand in the documents as text, so any lm-eval model that
tokenises special strings as such can run them; a parity test runs them on lm-eval's own `hf` model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from glmctl.data.chat import ChatTemplate
from glmctl.data.parsing import Parsed, parse
from glmctl.errors import DataError, RecipeError, unknown
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.recipe.schema import Sampling
from glmctl.rl.environment import Problem
from glmctl.rl.tasks import environment
from glmctl.rl.tasks.function_calls import call_problem, step_wise_reward
from glmctl.rl.tasks.tool_use import TOOLS, expected_calls

VERSION = 1.0
_EMPTY_THINK = re.compile(r"<think>\s*</think>")

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskInputs:
    """What our tasks are made from. `problems` are those of the recipe's files, in order."""

    template: ChatTemplate
    sampling: Sampling
    enable_thinking: bool = True
    problems: Sequence[Problem] = ()
    texts: Sequence[Path] = ()
    """JSON lines with a `text` each, for `glmctl_perplexity`; none: the set that ships here"""


def build_task(name: str, inputs: TaskInputs) -> ConfigurableTask:
    """The lm-eval task `name`. RecipeError when it is not ours, or the problems it needs are not given."""
    builders: dict[str, Callable[[TaskInputs], Row]] = {
        "glmctl_arithmetic": _arithmetic,
        "glmctl_tool_use": _tool_use,
        "glmctl_nothink": _nothink,
        "glmctl_cloze": _cloze,
        "glmctl_perplexity": _perplexity,
    }
    if name not in builders:
        raise unknown("task", name, builders)
    return ConfigurableTask(config={"task": name, "metadata": {"version": VERSION}, **builders[name](inputs)})


# ----------------------------------------------------------------------------- generation


def _arithmetic(inputs: TaskInputs) -> Row:
    """One turn; the reward is the environment's."""

    def process_results(doc: Row, results: list[str]) -> dict[str, float]:
        parsed = parse(results[0], thinking=inputs.enable_thinking)
        return judged(parsed, lambda: single_turn_reward(problem_of(doc), parsed))

    return _generation(inputs, _asked(inputs, "glmctl_arithmetic"), process_results)


def _tool_use(inputs: TaskInputs) -> Row:
    """One turn; R = 1 iff the format is correct and the call equals the expected one (spec section 3.5)."""

    def process_results(doc: Row, results: list[str]) -> dict[str, float]:
        parsed = parse(results[0], thinking=inputs.enable_thinking, tools=TOOLS)
        return judged(parsed, lambda: first_call_reward(problem_of(doc), parsed))

    return _generation(inputs, _asked(inputs, "glmctl_tool_use"), process_results)


def _nothink(inputs: TaskInputs) -> Row:
    """Obeyed: no reasoning although the model can reason. Answered: something is said besides."""

    def process_results(doc: Row, results: list[str]) -> dict[str, float]:
        visible = _EMPTY_THINK.sub("", results[0])
        return {
            "obeyed": float("<think>" not in visible and "</think>" not in visible),
            "answered": float(bool(visible.strip())),
        }

    problems = inputs.problems or [
        Problem(f"nothink/{row['prompt']}", "question", row["prompt"], 0) for row in shipped("questions.jsonl")
    ]
    rows = [_document(problem, inputs.template, enable_thinking=False) for problem in problems]
    return {**_generation(inputs, rows, process_results), "metric_list": _means("obeyed", "answered")}


def judged(parsed: Parsed, reward: Callable[[], float]) -> dict[str, float]:
    """`accuracy` (0 for what the parser refuses) and `well_formed` of one reply."""
    return {"accuracy": reward() if parsed.well_formed else 0.0, "well_formed": float(parsed.well_formed)}


def single_turn_reward(problem: Problem, parsed: Parsed) -> float:
    """The reward of ending the episode with this reply; 0 when the environment would go on."""
    episode = environment(problem)
    episode.reset()
    transition = episode.step(parsed.message())
    return transition.reward if transition.done and transition.reward is not None else 0.0


def first_call_reward(problem: Problem, parsed: Parsed) -> float:
    """1 iff the first call obeys the protocol and equals the first one that the problem needs, in every field."""
    if not parsed.tool_calls:
        return 0.0
    call = parsed.tool_calls[0]
    return step_wise_reward(call_problem(call, TOOLS) is None, call, expected_calls(problem)[0])


def problem_of(doc: Mapping[str, Any]) -> Problem:
    """The problem that a document carries."""
    return Problem.from_row(json.loads(doc["problem"]), f"document {doc['id']}")


def _asked(inputs: TaskInputs, name: str) -> list[Row]:
    wanted = OWN_TASKS[name].problems
    found = [problem for problem in inputs.problems if problem.task == wanted]
    if not found:
        raise RecipeError(f"task {name}: no '{wanted}' problem in any file of `problems`")
    return [_document(problem, inputs.template, enable_thinking=inputs.enable_thinking) for problem in found]


def _document(problem: Problem, template: ChatTemplate, *, enable_thinking: bool) -> Row:
    """The prompt as the model sees it. The problem itself is a JSON string: rows of one column must be alike."""
    if problem.task == "question":
        messages, tools = [{"role": "user", "content": problem.prompt}], None
    else:
        messages, tools = environment(problem).reset()
    prompt = template.render(messages, tools, add_generation_prompt=True, enable_thinking=enable_thinking)
    row = json.dumps(problem.to_row(), ensure_ascii=False)
    return {"id": problem.id, "prompt": prompt, "target": str(problem.answer), "problem": row}


def _generation(inputs: TaskInputs, rows: list[Row], process_results: Callable[..., dict[str, float]]) -> Row:
    sampling = inputs.sampling
    return {
        **_data(rows),
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "process_results": process_results,
        "metric_list": _means("accuracy", "well_formed"),
        "generation_kwargs": generation_kwargs(sampling),
    }


def generation_kwargs(sampling: Sampling) -> Row:
    """A recipe's sampling in lm-eval's words. The end tokens stop every model; no other string does."""
    kwargs: Row = {"until": [], "max_gen_toks": sampling.max_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        kwargs |= sampling.model_dump(exclude={"max_tokens"})
    return kwargs


# ----------------------------------------------------------------------------- likelihood


def _cloze(inputs: TaskInputs) -> Row:
    return {
        **_data(shipped("cloze.jsonl")),
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": _means("acc", "acc_norm"),
    }


def _perplexity(inputs: TaskInputs) -> Row:
    if inputs.texts:
        rows = [{"text": row["text"]} for path in inputs.texts for row in read_rows(path, "text")]
    else:
        rows = [{"text": row["text"]} for row in shipped("heldout_text.jsonl")]
    return {
        **_data(rows),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": name, "aggregation": "weighted_perplexity", "higher_is_better": False}
            for name in ("word_perplexity", "byte_perplexity")
        ]
        + [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }


# ----------------------------------------------------------------------------- documents


def shipped(name: str) -> list[Row]:
    """Rows of a JSON-lines file in `glmctl/evaluation/data`."""
    text = resources.files("glmctl.evaluation").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_rows(path: Path, field: str) -> list[Row]:
    """Rows of a JSON-lines file, each with a string `field`. RecipeError or DataError naming file and line."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise DataError(f"{path}:{number}: needs a string '{field}'")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows in this file")
    return rows


def _data(rows: list[Row]) -> Row:
    """The documents without a file: nothing is cached and nothing is looked for on the hub."""

    def custom_dataset(**kwargs: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(rows)}

    return {"custom_dataset": custom_dataset, "test_split": "test"}


def _means(*names: str) -> list[Row]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
