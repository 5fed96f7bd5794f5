"""What /metrics shows, for Prometheus: each server counts for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from llava_jax.generate import Engine

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meters:
    """Counters of what happens, and a look at the engine whenever somebody asks."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "llava_requests", "replies by route and status", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self.first = self._seconds("time_to_first_token", "from a request to its first token")
        self.whole = self._seconds("request", "from a request to the end of its answer")
        self.preparing = self._seconds("preprocessing", "tokenising, decoding and resizing images")
        self._registry.register(self)

    def _seconds(self, name: str, text: str) -> Histogram:
        full = f"llava_{name}_seconds"
        return Histogram(full, text, buckets=_SECONDS, registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's own numbers; called by prometheus_client."""
        engine = self._engine
        yield GaugeMetricFamily("llava_queue_length", "requests that wait", value=engine.queued)
        yield GaugeMetricFamily("llava_slots", "requests that fit at once", value=engine.slots)
        yield GaugeMetricFamily("llava_slots_busy", "slots that have a request", value=engine.busy)
        compiles = CounterMetricFamily(
            "llava_compiles", "programs compiled, by kind", labels=["kind"]
        )
        for kind, count in dict(engine.generator.compiled).items():
            compiles.add_metric([kind], count)
        yield compiles
        # dict() copies in one step, which another thread cannot interrupt.
        counts = dict(engine.counts)
        for name, text in _COUNTS.items():
            yield CounterMetricFamily(f"llava_{name}", text, value=counts.get(name, 0))

    def page(self) -> bytes:
        """What /metrics replies."""
        return generate_latest(self._registry)


_COUNTS = {
    "tokens": "tokens generated",
    "prompt_tokens": "positions of prompts that were read",
    "prompt_tokens_reused": "positions of prompts that were known already",
    "pictures_seen": "pictures the vision tower has seen",
    "pictures_reused": "pictures whose features were there already",
    "ended_stop": "answers that ended by themselves",
    "ended_length": "answers that reached their limit",
    "ended_cancelled": "answers that nobody waited for any more",
    "ended_error": "answers that failed",
}
