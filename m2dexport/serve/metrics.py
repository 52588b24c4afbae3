"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32)  # the last is the largest batch


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"m2dexport_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests for embeddings, by status.", "status")
        self.texts = counter("texts", "Texts that got a vector.")
        self.tokens = counter("tokens", "Tokens of those texts.")
        self.truncated = counter("truncated_texts", "Texts that were cut at the maximum length.")
        self.reloads = counter("reloads", "Reloads of the bundle, by result.", "result")
        self.seconds = Histogram(
            "m2dexport_request_seconds",
            "Time from the head of a request to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "m2dexport_batch_texts",
            "Texts that ran together.",
            buckets=_TEXTS,
            registry=registry,
        )
        self._space = Gauge(
            "m2dexport_bundle", "1 for what is served.", ("model", "space_id"), registry=registry
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Report what a function returns when it is asked, as a gauge."""
        Gauge(f"m2dexport_{name}", text, registry=self._registry).set_function(value)

    def serves(self, model: str, space_id: str) -> None:
        """Report which bundle is served now."""
        self._space.clear()
        self._space.labels(model, space_id).set(1)

    def page(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)
