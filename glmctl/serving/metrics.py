"""Metrics for Prometheus. They hold numbers only: no prompt, no key, no client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from glmctl.serving.worker import EngineWorker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """Counted on the event loop's thread, in a registry of the service's own."""

    def __init__(self, worker: EngineWorker) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineCollector(worker))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"glmctl_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"glmctl_{name}", text, buckets=buckets, registry=registry)

        self.responses = counter("http_responses", "Responses by status.", "status")
        self.rejected = counter("requests_rejected", "Requests refused because the queue was full.")
        self.aborted = counter("generations_aborted", "Generations whose client went away.")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival in the engine's queue.", _SECONDS)
        self.duration = histogram("generation_seconds", "From arrival in the engine's queue to the end.", _SECONDS)
        self.prompt_length = histogram("prompt_length_tokens", "Of a generation.", _TOKENS)
        self.answer_length = histogram("answer_length_tokens", "Of a generation.", _TOKENS)

    def render(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self._registry)


class _EngineCollector:
    """What the engine counts itself, read when asked."""

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker, stats = self._worker, self._worker.stats
        used, total = worker.kv_blocks
        gauges = [
            ("requests_running", "Generations that hold a place in the cache.", worker.running),
            ("requests_queued", "Generations that wait for one.", max(0, worker.inside - worker.running)),
            ("slots", "Generations computed at once.", worker.max_slots),
            ("capacity", "Generations that may be inside at once.", worker.capacity),
            ("kv_blocks_used", "Blocks of the cache in use.", used),
            ("kv_blocks", "Blocks of the cache.", total),
            ("weight_version", "Of the weights that are served.", worker.version),
            ("draft_acceptance_length", "Tokens that a pass with MTP drafts emits.", stats.acceptance_length),
        ]
        counters = [
            ("engine_steps", "Engine steps.", stats.steps),
            ("generated_tokens", "Tokens generated.", stats.tokens),
            ("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens),
            ("reused_prompt_tokens", "Prompt tokens found in the cache.", stats.reused_tokens),
            ("preemptions", "Generations put back because the cache was full.", stats.preemptions),
            ("drafts", "Tokens drafted by the MTP layer.", stats.drafted),
            ("drafts_accepted", "Drafts that the model confirmed.", stats.accepted),
        ]
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"glmctl_{name}", text, value=value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"glmctl_{name}", text, value=value)
