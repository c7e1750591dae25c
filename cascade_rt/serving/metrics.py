"""Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .batcher import Answer

_ANSWERING = ("/v1/classify", "/predict", "/v2/models/{name}/infer")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_LAYERS = (1, 2, 3, 4, 6, 8, 9, 12, 14, 15, 18, 24, 36, 48)


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._answered = 0, 0.0
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        member = ("model", "member")
        self.answers = counter("cascade_texts", "Texts answered, by the member that answered", member)
        self.degraded = counter("cascade_degraded", "Texts that a deadline kept from the next member", member)
        self.layers = histogram("cascade_layers", "Encoder layers executed per text", ("model",), buckets=_LAYERS)
        self.batch_texts = histogram("cascade_batch_texts", "Texts per micro-batch", member, buckets=_TEXTS)
        self.batch_tokens = histogram("cascade_batch_tokens", "Padded tokens per micro-batch", member, buckets=_TOKENS)
        self.batch_seconds = histogram("cascade_batch_seconds", "Time of a micro-batch", member, buckets=_SECONDS)
        self.waits = histogram("cascade_wait_seconds", "Time that a text waits for a member", member, buckets=_SECONDS)
        self.requests = histogram("cascade_request_seconds", "Time of a request", ("route", "status"), buckets=_SECONDS)
        self.rejected = counter("cascade_rejected", "Requests that were not answered, by the reason", ("reason",))
        self.reloads = counter("cascade_reloads", "Bundles replaced on disk, by the result", ("model", "result"))

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).observe(seconds)
        if status == HTTPStatus.OK and route in _ANSWERING:
            self._answered = self._answered[0] + 1, self._answered[1] + seconds

    def answered(self) -> tuple[int, float]:
        """Return how many requests with texts were answered, and their seconds together."""
        return self._answered

    def observer(self, model: str, members: Sequence[str]) -> BatchMetrics:
        """Return what a batcher of this model reports to."""
        return BatchMetrics(self, model, members)

    def add_state(self, state: Callable[[], Iterable[Metric]]) -> None:
        """Add metrics that are looked up whenever they are read."""
        self.registry.register(_State(state))


class BatchMetrics:
    """The metrics of one model: see `batcher.Observer`."""

    def __init__(self, metrics: Metrics, model: str, members: Sequence[str]) -> None:
        pairs = [(model, member) for member in members]
        self._answers = [metrics.answers.labels(*pair) for pair in pairs]
        self._degraded = [metrics.degraded.labels(*pair) for pair in pairs]
        self._texts = [metrics.batch_texts.labels(*pair) for pair in pairs]
        self._tokens = [metrics.batch_tokens.labels(*pair) for pair in pairs]
        self._seconds = [metrics.batch_seconds.labels(*pair) for pair in pairs]
        self._waits = [metrics.waits.labels(*pair) for pair in pairs]
        self._layers = metrics.layers.labels(model)

    def batch(self, stage: int, waits: Sequence[float], tokens: int, seconds: float) -> None:
        """Count a micro-batch."""
        self._texts[stage].observe(len(waits))
        self._tokens[stage].observe(tokens)
        self._seconds[stage].observe(seconds)
        for wait in waits:
            self._waits[stage].observe(wait)

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        self._answers[answer.prediction.exit].inc()
        self._layers.observe(answer.prediction.layers)
        if answer.degraded:
            self._degraded[answer.prediction.exit].inc()


class _State(Collector):
    def __init__(self, state: Callable[[], Iterable[Metric]]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        return self._state()


def gauge(name: str, help: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """Return a gauge with these rows: values of its labels, and its value."""
    found = GaugeMetricFamily(name, help, labels=labels)
    for values, value in rows:
        found.add_metric(values, value)
    return found
