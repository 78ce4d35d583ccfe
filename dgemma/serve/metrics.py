"""What is counted, for Prometheus. A registry of its own for each app."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dgemma.engine.scheduler import Scheduler

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        of_request = ["endpoint", "status"]
        self.requests = Counter("dgemma_requests", "HTTP requests done", of_request, registry=registry)
        self.tokens = Counter("dgemma_tokens", "Tokens by kind", ["kind"], registry=registry)
        self.steps = Counter("dgemma_denoising_steps", "Denoising steps of committed blocks", registry=registry)
        self.prefix_hits = Counter("dgemma_prefix_cache_hits", "Prompts that began in the cache", registry=registry)
        self.first_block = Histogram(
            "dgemma_time_to_first_block_seconds", "From submission", registry=registry, buckets=SECONDS
        )
        self.seconds = Histogram(
            "dgemma_request_duration_seconds", "To a response's end", ["endpoint"], registry=registry, buckets=SECONDS
        )

    def watch(self, scheduler: Scheduler) -> None:
        """Gauges that read the scheduler when they are asked."""
        gauges = {
            "requests_running": ("Requests in work", lambda: len(scheduler.running)),
            "requests_waiting": ("Requests in the queue", lambda: scheduler.queued),
            "prefix_cache_bytes": ("Bytes of kept pages", lambda: scheduler.prefixes.nbytes),
        }
        for name, (told, read) in gauges.items():
            Gauge(f"dgemma_{name}", told, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
