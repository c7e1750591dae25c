"""Prometheus metrics, of one process or summed over all that serve together.

With several processes, prometheus-client keeps the values in files in a folder that the environment variable
PROMETHEUS_MULTIPROC_DIR names, and any of the processes can read them all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from .batcher import Answer

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

_ANSWERING = ("/v1/classify", "/predict", "/models/{name}", "/v2/models/{name}/infer")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_LAYERS = (0, 1, 2, 3, 4, 6, 8, 9, 12, 14, 15, 18, 24, 36, 48)


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self) -> None:
        self.shared = FOLDER in os.environ
        """True if values are summed over several processes."""
        registry = CollectorRegistry()
        self._all = CollectorRegistry() if self.shared else registry
        if self.shared:
            MultiProcessCollector(self._all)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        gauge = partial(Gauge, registry=registry)
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

        self.queued = gauge("cascade_queue_texts", "Texts that wait for a member", member, multiprocess_mode="livesum")
        self.bundles = gauge(
            "cascade_model",
            "Processes that serve this version of a bundle",
            ("model", "version"),
            multiprocess_mode="livesum",
        )
        self.drift = gauge(
            "cascade_drift_p_value",
            "Probability of exits that differ this much from those of tuning, if the texts are alike",
            ("model",),
            multiprocess_mode="liveall",  # each process compares the exits of its own texts
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).observe(seconds)

    def measured(self) -> Measured:
        """Return all metrics: of this process, or of all whose values are summed."""
        return Measured(list(self._all.collect()))

    def observer(self, model: str, members: Sequence[str]) -> BatchMetrics:
        """Return what a batcher of this model reports to."""
        return BatchMetrics(self, model, members)


@dataclass(frozen=True)
class Measured:
    """The metrics of one moment."""

    metrics: list[Metric]

    @classmethod
    def of_replicas(cls, found: Iterable[tuple[str, Measured]]) -> Measured:
        """Return the metrics of several servers, by their names, which become the label `replica`."""
        metrics: dict[str, Metric] = {}
        for replica, measured in found:
            for metric in measured.metrics:
                known = metrics.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                known.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in metric.samples]
        return cls(list(metrics.values()))

    def collect(self) -> list[Metric]:
        """Return them; what writes them as text calls this."""
        return self.metrics

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return them in a format that an `Accept` header takes, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self), media_type

    def answered(self) -> tuple[int, float, Mapping[tuple[str, str], int]]:
        """Return the requests with texts that were answered, their seconds together, and texts by model and member."""
        requests, seconds, texts = 0, 0.0, defaultdict[tuple[str, str], int](int)
        for sample in (sample for metric in self.metrics for sample in metric.samples):
            labels = sample.labels
            if sample.name == "cascade_texts_total":
                texts[labels["model"], labels["member"]] += int(sample.value)
            elif labels.get("status") == "200" and labels.get("route") in _ANSWERING:
                requests += int(sample.value) if sample.name == "cascade_request_seconds_count" else 0
                seconds += sample.value if sample.name == "cascade_request_seconds_sum" else 0.0
        return requests, seconds, texts


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
