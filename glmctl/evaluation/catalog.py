"""Our own lm-eval tasks and groups by name. Importable without torch or lm-eval, for `glmctl eval --list`."""

from __future__ import annotations

from dataclasses import dataclass

PYTHON_SEED, NUMPY_SEED, TORCH_SEED, FEWSHOT_SEED = 0, 1234, 1234, 1234
"""lm-eval's own defaults, so that shuffled choices and few-shot examples are those of a published score"""


@dataclass(frozen=True)
class Entry:
    """One task: what it measures, the metric that goes into the summary, and the problems it asks."""

    about: str
    metric: str
    problems: str | None = None
    """the `task` of the rows of `problems` files that it asks; without such a file it asks a generated set"""


OWN_TASKS: dict[str, Entry] = {
    "glmctl_arithmetic": Entry("integer expressions, verified exactly", "accuracy", problems="arithmetic"),
    "glmctl_code": Entry("Python functions, hidden unit tests in the sandbox", "accuracy", problems="code"),
    "glmctl_tool_use": Entry(
        "the first tool call: name, parameters and every field equal", "accuracy", problems="tool_use"
    ),
    "glmctl_instructions": Entry(
        "texts under constraints that rules check, all of them held", "accuracy", problems="instructions"
    ),
    "glmctl_nothink": Entry("replies to /nothink that come without reasoning", "obeyed"),
    "glmctl_think": Entry("replies that begin with reasoning when it is asked for", "obeyed"),
    "glmctl_chat": Entry("open questions in English and Chinese, for a judge (--judge)", "answered"),
    "glmctl_cloze": Entry("Python and English: which of four continuations is the likeliest", "acc"),
    "glmctl_needle": Entry("a sentence hidden at every depth of every length, found again", "found"),
    "glmctl_perplexity": Entry("held-out English and Python: bits a byte costs, and perplexity", "bits_per_byte"),
    "glmctl_perplexity_zh": Entry("held-out Chinese: bits a byte costs, and perplexity", "bits_per_byte"),
}

OWN_GROUPS: dict[str, tuple[str, ...]] = {
    "glmctl_hybrid": ("glmctl_think", "glmctl_nothink"),
    "glmctl_base": ("glmctl_cloze", "glmctl_perplexity", "glmctl_perplexity_zh", "glmctl_needle"),
    "glmctl_verified": ("glmctl_arithmetic", "glmctl_code", "glmctl_tool_use", "glmctl_instructions"),
    "glmctl_offline": tuple(OWN_TASKS),
}
"""group -> its tasks; all of them run without a network"""
