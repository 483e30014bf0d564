"""Base, experts and hybrid on every domain: held-out scores, each answer written down as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.distill.experts import Player
from glmctl.distill.sample import SampleJournal, collect
from glmctl.recipe.schema import Sampling
from glmctl.rl.environment import Problem
from glmctl.rl.journal import sample_row
from glmctl.rl.score import GREEDY, Score, summarize
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.metrics import MetricsLog
from glmctl.run.signals import StopFlag

BASE, HYBRID, DIRECT = "base", "hybrid", "hybrid, /nothink"
SHOWN = 3
"""held-out problems of each domain whose answers go into samples.jsonl"""


@dataclass
class Comparison:
    """Greedy held-out scores by model and domain, resumable answer by answer."""

    folder: Path
    """of the run; the answers are kept in `heldout/<model>/<domain>.jsonl` below it"""
    domains: Mapping[str, Sequence[Problem]]
    max_tokens: int
    seed: int
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    _templates: dict[str, ChatTemplate] = field(default_factory=dict)

    def score(
        self,
        model: str,
        folder: str,
        player: Callable[[], Player],
        template: ChatTemplate,
        stop: StopFlag,
        *,
        enable_thinking: bool = True,
    ) -> None:
        """Ask `model` every domain's problems; `folder` is where its answers are kept. Raises Interrupted.

        `template` is the one that its answers are written in.
        """
        self._templates[model] = template
        sampling: Sampling = GREEDY.model_copy(update={"max_tokens": self.max_tokens})
        self.scores[model] = {}
        for domain, problems in self.domains.items():
            found = collect(
                SampleJournal(self.folder / "heldout" / folder / f"{domain}.jsonl"),
                player,
                problems,
                label=f"score {model} on {domain}",
                samples=1,
                sampling=sampling,
                seed=self.seed,
                stop=stop,
                enable_thinking=enable_thinking,
            )
            self.scores[model][domain] = summarize(found)

    def accuracy(self, model: str, domain: str) -> float:
        """Mean reward, 0..1."""
        return self.scores[model][domain].accuracy

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """By model and domain: accuracy, the shares that thought and that answered directly, mean tokens."""
        return {
            model: {
                domain: {
                    "accuracy": score.accuracy,
                    "thinking": score.thinking_rate,
                    "direct": score.direct_rate,
                    "tokens": score.mean_tokens,
                }
                for domain, score in domains.items()
            }
            for model, domains in self.scores.items()
        }

    def publish(self, run: Run) -> None:
        """Write comparison.json, put the models' answers side by side into samples.jsonl, and show the table."""
        table = self.table()
        atomic.write_json(run.path / "comparison.json", table)
        log = MetricsLog(run.samples)
        # a run that was killed here before has written some of them already
        rows = [row for row in log.rows() if "model" not in row]
        for model, domains in self.scores.items():
            for domain, score in domains.items():
                for one in score.samples[:SHOWN]:
                    rows.append({"model": model, "domain": domain, **sample_row(one, self._templates[model])})
        atomic.write_text(run.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        lines = [[model, *(f"{cell['accuracy']:.1%}" for cell in domains.values())] for model, domains in table.items()]
        console.table("held-out accuracy", ["model", *self.domains], lines)


def share_of(scores: Mapping[str, Score], what: Callable[[Score], float]) -> float:
    """Mean of a share over all episodes of all domains."""
    counts = [len(score.samples) for score in scores.values()]
    return sum(what(s) * n for s, n in zip(scores.values(), counts, strict=True)) / sum(counts)


def headline(comparison: Comparison, domains: Sequence[str], expert: Callable[[str], str]) -> dict[str, Any]:
    """Summary keys of every domain: base, expert, hybrid, /nothink, the expert's gain in points and the ratio."""
    result: dict[str, Any] = {}
    for domain in domains:
        base, taught = comparison.accuracy(BASE, domain), comparison.accuracy(expert(domain), domain)
        hybrid = comparison.accuracy(HYBRID, domain)
        result |= {
            f"{domain}_base": base,
            f"{domain}_expert": taught,
            f"{domain}_gain_points": 100.0 * (taught - base),
            f"{domain}_hybrid": hybrid,
            # an expert that solves nothing proves nothing about its pupil
            f"{domain}_ratio": hybrid / taught if taught else 0.0,
            f"{domain}_direct": comparison.accuracy(DIRECT, domain),
        }
    return result | {
        "thinking_obeyed": share_of(comparison.scores[HYBRID], lambda score: score.thinking_rate),
        "direct_obeyed": share_of(comparison.scores[DIRECT], lambda score: score.direct_rate),
    }
