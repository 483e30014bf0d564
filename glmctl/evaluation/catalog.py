"""Our own lm-eval tasks by name. Importable without torch or lm-eval, for `glmctl eval --list`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One task: what it measures, the metric that goes into the summary, and the problems it needs."""

    about: str
    metric: str
    problems: str | None = None
    """the `task` of the rows of `problems` files that it asks; None: it needs no such file"""


OWN_TASKS: dict[str, Entry] = {
    "glmctl_arithmetic": Entry(
        "one answer to each arithmetic problem, verified exactly", "accuracy", problems="arithmetic"
    ),
    "glmctl_tool_use": Entry(
        "the first tool call of each problem: name, parameters and every field equal", "accuracy", problems="tool_use"
    ),
    "glmctl_nothink": Entry("share of /nothink replies that come without reasoning", "obeyed"),
    "glmctl_cloze": Entry("Python and English: which of four continuations is the likeliest", "acc"),
    "glmctl_perplexity": Entry("perplexity of a byte of held-out text", "byte_perplexity"),
}
