"""Counters in the Prometheus text format (version 0.0.4). They hold numbers only: no prompt, no key, no client."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from glmctl.serving.worker import EngineWorker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Metrics:
    """Counted on the event loop's thread."""

    responses: Counter[int] = field(default_factory=Counter)
    """by HTTP status"""
    rejected: int = 0
    """turned away because the queue was full"""
    aborted: int = 0
    """generations whose client went away"""

    def render(self, worker: EngineWorker) -> str:
        """All metrics as text."""
        stats = worker.stats
        queued = max(0, worker.inside - worker.running)
        rows: list[tuple[str, str, str, float]] = [
            ("requests_running", "gauge", "Generations that hold a cache row.", worker.running),
            ("requests_queued", "gauge", "Generations that wait for one.", queued),
            ("slots", "gauge", "Cache rows.", worker.max_slots),
            ("capacity", "gauge", "Generations that may be inside at once.", worker.capacity),
            ("requests_rejected_total", "counter", "Requests refused because the queue was full.", self.rejected),
            ("generations_aborted_total", "counter", "Generations whose client went away.", self.aborted),
            ("engine_steps_total", "counter", "Engine steps.", stats.steps),
            ("generated_tokens_total", "counter", "Tokens generated.", stats.tokens),
            ("prompt_tokens_total", "counter", "Prompt tokens computed.", stats.prompt_tokens),
            ("drafts_total", "counter", "Tokens drafted by the MTP layer.", stats.drafted),
            ("drafts_accepted_total", "counter", "Drafts that the model confirmed.", stats.accepted),
        ]
        lines = []
        for name, kind, text, value in rows:
            lines += [f"# HELP glmctl_{name} {text}", f"# TYPE glmctl_{name} {kind}", f"glmctl_{name} {value}"]
        lines += [
            "# HELP glmctl_http_responses_total Responses by status.",
            "# TYPE glmctl_http_responses_total counter",
        ]
        for status, count in sorted(self.responses.items()):
            lines.append(f'glmctl_http_responses_total{{status="{status}"}} {count}')
        return "\n".join(lines) + "\n"
