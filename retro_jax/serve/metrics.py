"""What a server counts, in Prometheus' text form."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from retro_jax.generate.text_progress import Progress
from retro_jax.serve.engine import Engine, Job, Watcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics(Watcher):
    """The counters of one server."""

    def __init__(self) -> None:
        """A registry of its own, so that several servers may live in one process."""
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "retro_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self._tokens = Counter("retro_generated_tokens", "Tokens generated.", registry=registry)
        self._texts = Counter(
            "retro_texts", "Texts by the reason they ended.", ["ended"], registry=registry
        )
        self._queued = Histogram(
            "retro_queue_seconds", "Time in the queue.", registry=registry, buckets=_SECONDS
        )
        self._steps = Histogram(
            "retro_step_seconds", "Time of a step.", registry=registry, buckets=_SECONDS
        )
        self.request_seconds = Histogram(
            "retro_request_seconds", "Time of a completion.", registry=registry, buckets=_SECONDS
        )
        self._running = Gauge("retro_running_texts", "Texts under way.", registry=registry)
        self._waiting = Gauge("retro_waiting_texts", "Texts in the queue.", registry=registry)
        self._retrieval = Gauge(
            "retro_retrieval_seconds_sum", "Time spent in retrieval.", registry=registry
        )
        self.revision = Gauge("retro_database_revision", "The newest revision.", registry=registry)
        self.swaps = Counter(
            "retro_database_swaps", "Times that another revision was taken up.", registry=registry
        )

    def stepped(self, progress: Sequence[Progress], seconds: float) -> None:
        """Counts a step."""
        self._steps.observe(seconds)
        self._tokens.inc(sum(each.token is not None for each in progress))

    def began(self, job: Job, seconds: float) -> None:
        """Counts a job that got rows."""
        self._queued.observe(seconds)

    def ended(self, reason: str) -> None:
        """Counts a text that ended."""
        self._texts.labels(reason).inc()

    def text(self, engine: Engine) -> bytes:
        """All figures."""
        self._running.set(engine.under_way)
        self._waiting.set(engine.waiting)
        self._retrieval.set(engine.running.retrieval_seconds)
        return generate_latest(self._registry)
