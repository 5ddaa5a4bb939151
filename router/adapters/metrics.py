"""Prometheus metrics, summed over all workers of a gateway.

Import it only after `PROMETHEUS_MULTIPROC_DIR` is set where there is more than one worker: the client library
decides on import where it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from router.core.types import RequestRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_Mode = Literal["min", "max", "sum"]

Gauges = Callable[[], Iterable[tuple[str, dict[str, str], float]]]
"""Readings taken when metrics are rendered: (name of gauge, labels, value)."""


class PrometheusTelemetry:
    """Implements `Telemetry`. `folder` is where workers share their counts, None for a single process; `gauges`
    gives the readings of this worker.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._registry = CollectorRegistry()
        self.gauges: Gauges = tuple

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(name, text, labels, registry=self._registry)

        self._requests = counter(
            "farthing_requests_total",
            "Settled requests",
            ("team", "model", "prompt_class", "cache", "status"),
        )
        self._tokens = counter("farthing_tokens_total", "Tokens by price bucket", ("model", "bucket"))
        self._cost = counter("farthing_cost_nanousd_total", "Cost in nano-USD", ("team", "model"))
        self._refused = counter(
            "farthing_refused_total", "Requests refused before a model answered", ("reason",)
        )
        self._attempts = counter(
            "farthing_upstream_attempts_total", "Calls to providers", ("provider", "outcome")
        )
        self._semantic = counter(
            "farthing_semantic_lookups_total",
            "Look-ups of the semantic cache by what came of them",
            ("outcome",),
        )
        self._semantic_time = Histogram(
            "farthing_semantic_lookup_seconds",
            "Look-up in the semantic cache",
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
            registry=self._registry,
        )
        # Savings can be negative (a dearer model answered), which a counter cannot count.
        self._avoided = Gauge(
            "farthing_avoided_nanousd_total",
            "Baseline less cost in nano-USD",
            ("team",),
            registry=self._registry,
            multiprocess_mode="sum",
        )
        self._duration = Histogram(
            "farthing_request_duration_seconds",
            "Whole request",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "farthing_time_to_first_token_seconds",
            "Until the answer began",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._readings = {
            name: Gauge(name, text, labels, registry=self._registry, multiprocess_mode=cast("_Mode", mode))
            for name, text, labels, mode in (
                ("farthing_breaker_open", "1 while a circuit breaker is open", ("provider", "model"), "max"),
                ("farthing_budget_spent_ratio", "Spent share of a budget's limit", ("budget",), "max"),
                ("farthing_journal_unsettled", "Requests in the journal and not yet in SQL", (), "sum"),
                ("farthing_sql_up", "1 while SQL answers", (), "min"),
                ("farthing_redis_up", "1 while Redis answers", (), "min"),
                (
                    "farthing_floor_labels_missing",
                    "Clean labels a cheaper model lacks before it may answer a class that asks for confidence",
                    ("prompt_class", "model"),
                    "max",
                ),
            )
        }
        # Finding a series by its labels costs more than counting in it.
        self._sample = lru_cache(maxsize=4096)(self._series)
        self._call = lru_cache(maxsize=1024)(self._attempts.labels)
        self._bucket = lru_cache(maxsize=1024)(self._tokens.labels)

    def settled(self, record: RequestRecord) -> None:
        model = record.served_model or "none"
        series = self._sample(record.team, model, record.prompt_class or "none", record.cache, record.status)
        requests, cost, avoided, duration, first_token = series
        if record.cost:
            cost.inc(record.cost)
        if record.baseline is not None and record.cost is not None:
            avoided.inc(record.baseline - record.cost)
        if not record.endpoint.startswith("learn."):  # nobody asked for those: they only cost
            requests.inc()
            duration.observe(record.duration_ms / 1000)
            if record.first_token_ms is not None:
                first_token.observe(record.first_token_ms / 1000)
        for attempt in record.attempts:
            self._call(attempt.provider, attempt.outcome).inc()
            for bucket, quantity in attempt.usage.buckets():
                self._bucket(attempt.model, bucket).inc(quantity)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def semantic(self, outcome: str, seconds: float) -> None:
        self._semantic.labels(outcome).inc()
        if seconds:
            self._semantic_time.observe(seconds)

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        self._readings["farthing_breaker_open"].clear()
        self._readings["farthing_floor_labels_missing"].clear()
        for name, labels, value in self.gauges():
            gauge = self._readings[name]
            (gauge.labels(**labels) if labels else gauge).set(value)
        if self._folder is None:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=str(self._folder))  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _series(
        self, team: str, model: str, prompt_class: str, cache: str, status: str
    ) -> tuple[Counter, Counter, Gauge, Histogram, Histogram]:
        return (
            self._requests.labels(team, model, prompt_class, cache, status),
            self._cost.labels(team, model),
            self._avoided.labels(team),
            self._duration.labels(model),
            self._first_token.labels(model),
        )
