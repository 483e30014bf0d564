"""Which figures of a stage people want to see first, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from glmctl.console import number

HEADLINES: dict[str, tuple[str, ...]] = {
    "tokenizer": ("vocab_size", "bytes_per_token"),
    "data": ("tokens_train", "tokens_validation", "documents", "unigram_entropy"),
    "problems": ("train", "heldout", "cold_start"),
    "agentic": ("kept", "trajectories", "tasks", "tools", "turns", "calls"),
    "pretrain": ("validation_loss", "unigram_entropy", "validation_loss_below_unigram", "tokens_per_second", "max_vio"),
    "reward": ("heldout_accuracy", "accuracy", "loss", "steps"),
    "sft": ("loss", "validation_loss", "steps"),
    "rl": ("heldout_start", "heldout_end", "heldout_gain_points", "well_formed_start", "well_formed"),
    "distill": ("*_expert", "*_hybrid", "*_ratio", "direct_obeyed", "thinking_obeyed"),
    "on_policy_distill": ("*_start", "*_student", "*_teacher", "reverse_kl_first", "reverse_kl_last"),
    "logit_distill": ("loss_first", "loss", "steps"),
    "eval": ("*",),
    "convert": ("verified", "tensors", "bytes"),
    "serve": ("reply", "mtp_acceptance", "tokens_per_second"),
}
"""By recipe type, patterns of summary keys in the order in which they are shown."""

BESIDE = (
    *("_stderr", "_acc_norm", "_well_formed", "_thinking_rate", "_mean_tokens", "_answered"),
    *("_word_perplexity", "_bits_per_byte", "_found_worst", "_longest", "_longest_worst"),
)
"""Ends of evaluation keys that stand beside a task's main figure."""

SHARES = (
    "heldout_start",
    "heldout_end",
    "reward_first",
    "reward_last",
    "*acceptance",
    "*_ratio",
    "*_expert",
    "*_hybrid",
    "*_student",
    "*_teacher",
    "*_start",
    "*_obeyed",
    "*well_formed*",
    "*thinking_rate",
    "*accuracy",
    "*arithmetic",
    "*tool_use",
    "*glmctl_cloze*",
    "*glmctl_needle*",
    "*glmctl_code",
    "*glmctl_instructions",
    "*glmctl_think",
    "*glmctl_nothink",
    "*glmctl_chat",
    "*_answered",
    "*pass@*",
    "*avg@*",
)
"""Keys whose value is a share of one, written in percent."""


def headline(kind: str, summary: Mapping[str, Any], limit: int = 8) -> dict[str, Any]:
    """The figures of one stage that its type is about, at most `limit`; the first scalars for an unknown type.

    Of an evaluation the main figures of its last model.
    """
    if kind == "eval" and summary:
        # the last model is the one that the others lead up to
        model = list(summary)[-1].partition("/")[0]
        summary = {k: v for k, v in summary.items() if k.startswith(f"{model}/") and not k.endswith(BESIDE)}
    found: dict[str, Any] = {}
    for pattern in HEADLINES.get(kind, ("*",)):
        found.update({k: v for k, v in summary.items() if _scalar(v) and k not in found and fnmatchcase(k, pattern)})
    chosen = found or {k: v for k, v in summary.items() if _scalar(v)}
    return dict(list(chosen.items())[:limit])


def figure(key: str, value: Any) -> str:
    """One value as people read it; a long text is cut at 60 characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if not math.isfinite(value):
            return str(value)
        share = any(fnmatchcase(key, pattern) for pattern in SHARES)
        return f"{value:.1%}" if share and 0 <= value <= 2 else number(value)
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:59] + "…"


def words(key: str) -> str:
    """A summary key as words: `validation_loss` is `validation loss`."""
    return key.replace("_", " ").strip()


def sentence(kind: str, summary: Mapping[str, Any], limit: int = 4) -> str:
    """`validation loss 3.21, unigram entropy 6.4`."""
    return ", ".join(f"{words(key)} {figure(key, value)}" for key, value in headline(kind, summary, limit).items())


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
