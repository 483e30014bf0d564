"""Our offline lm-eval tasks by name, built for one model: its template, its tokenizer, its context.

Prompts are rendered by the caller's chat template and stand in the documents as text, so any lm-eval model that
tokenises special strings as such can run them; a parity test runs them on lm-eval's own `hf` model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm_eval.api.task import ConfigurableTask

from glmctl.errors import unknown
from glmctl.evaluation import questions
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.evaluation.documents import Row, as_dataset, means, read_rows, shipped
from glmctl.evaluation.needle import needle
from glmctl.evaluation.questions import Asking
from glmctl.recipe.schema import Needle

VERSION = 3.0
"""raised when the documents or the scoring of any of our tasks change: scores of two versions do not compare"""


@dataclass(frozen=True)
class TaskInputs(Asking):
    """What our tasks are made from. `problems` are those of the recipe's files, in order."""

    texts: Sequence[Path] = ()
    """JSON lines with a `text` each, for `glmctl_perplexity`; none: the set that ships here"""
    needle: Needle = field(default_factory=Needle)
    context: int = 0
    """tokens of the model's context, for `glmctl_needle`"""


def build_task(name: str, inputs: TaskInputs) -> ConfigurableTask:
    """The lm-eval task `name`. RecipeError when it is not ours, or its inputs do not fit the model."""
    builders: dict[str, Callable[[TaskInputs], Row]] = {
        "glmctl_nothink": questions.nothink,
        "glmctl_think": questions.think,
        "glmctl_chat": questions.chat,
        "glmctl_cloze": _cloze,
        "glmctl_needle": lambda given: needle(given.needle, given.template.tokenizer, given.context),
        "glmctl_perplexity": _perplexity,
        "glmctl_perplexity_zh": lambda given: _rolling(shipped("heldout_text_zh.jsonl")),
    }
    if name in builders:
        config = builders[name](inputs)
    elif name in OWN_TASKS:
        config = questions.verified(name, inputs)
    else:
        raise unknown("task", name, OWN_TASKS)
    return ConfigurableTask(config={"task": name, "metadata": {"version": VERSION}, **config})


def _cloze(inputs: TaskInputs) -> Row:
    return {
        **as_dataset(shipped("cloze.jsonl")),
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": means("acc", "acc_norm"),
    }


def _perplexity(inputs: TaskInputs) -> Row:
    rows = [row for path in inputs.texts for row in read_rows(path, "text")]
    return _rolling(rows or shipped("heldout_text.jsonl"))


def _rolling(rows: list[Row]) -> Row:
    """Perplexity by the byte, which compares models of different tokenizers; words end at spaces in few scripts."""
    return {
        **as_dataset([{"text": row["text"]} for row in rows]),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    }
