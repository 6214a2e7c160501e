"""Prometheus metrics of the server, read at /metrics."""

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochat.serve.service import WorkerPool

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
HISTOGRAMS = {  # the names that Service reports to `observe`
    "first_token_seconds": ("From a request to its first token", SECONDS_BUCKETS),
    "between_tokens_seconds": ("From one token of a request to the next", SECONDS_BUCKETS),
    "step_seconds": ("One step of the running batch", SECONDS_BUCKETS),
    "batch_rows": ("Sequences decoded together", (0, 1, 2, 4, 8, 16, 32, 64, 128)),
}
GAUGES = {  # name: (description, key of WorkerPool.stats)
    "rows_running": ("Sequences in the running batches", "rows_running"),
    "requests_waiting": ("Requests in the queues", "requests_waiting"),
    "prefix_cache_bytes": ("Memory of cached prompt prefixes", "prefix_bytes"),
    "prefix_cache_hit_tokens": ("Prompt tokens taken from the prefix cache", "prefix_hit_tokens"),
    "replicas_replaced": ("Replicas that died and were replaced", "replaced"),
}


@dataclass
class ServerMetrics:
    """Counters and histograms by name; gauges once `watch` has been called."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        registry = self.registry
        self.requests = Counter(
            "nanochat_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Prompt tokens", registry=registry)
        self.completion_tokens = Counter("nanochat_completion_tokens", "Tokens generated", registry=registry)
        self.histograms = {
            name: Histogram(f"nanochat_{name}", description, registry=registry, buckets=buckets)
            for name, (description, buckets) in HISTOGRAMS.items()
        }

    def observe(self, name: str, value: float) -> None:
        """For Service(observe=...). Thread-safe."""
        self.histograms[name].observe(value)

    def watch(self, pool: WorkerPool) -> None:
        """Add gauges that read the pool at each scrape."""
        for name, (description, key) in GAUGES.items():
            gauge = Gauge(f"nanochat_{name}", description, registry=self.registry)
            gauge.set_function(lambda key=key: pool.stats()[key])  # type: ignore[misc]
